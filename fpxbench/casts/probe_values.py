"""The inputs of a conversion: all of them where they are few, otherwise those on which known faults differ.

Inputs are bits, not numbers: numpy arrays of unsigned integers as wide as the source dtype. No cast of torch is
involved.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from fpxbench.casts.conversion import DTYPES, DType
from fpxbench.casts.number_grid import grid

SEED = 20260
RANDOM = 1 << 16
SCALES_PER_VALUE = 3

_UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_FLOAT: dict[str, type[np.floating]] = {"fp32": np.float32, "fp64": np.float64}


def values(bits: np.ndarray, dtype: DType) -> np.ndarray:
    """Return the numbers of `bits`, float64, exact. NaN is NaN, whatever its payload."""
    if dtype.bits <= 16:
        return grid(dtype).value(bits)
    with np.errstate(invalid="ignore"):     # a signalling NaN becomes a quiet one
        return bits.view(_FLOAT[dtype.name]).astype(np.float64)


def digest(*bits: np.ndarray) -> str:
    """Return the SHA-256 of inputs, shortened to 16 digits."""
    together = hashlib.sha256()
    for array in bits:
        together.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return together.hexdigest()[:16]


@lru_cache(maxsize=8)
def cast_inputs(source: DType, target: DType) -> np.ndarray:
    """Return bits of `source` for a cast to `target`, sorted, each once.

    All of them up to 16 bits. For fp32 and fp64: every value of every 16-bit dtype; every number of every FP8 format
    and of a 16-bit target, every midpoint to the next one, and the neighbours of both one ulp away (for fp64, one ulp
    of fp32 away too, which is where double rounding shows); NaN of every kind; random bits, and random mantissas within
    the range of FP8.
    """
    if source.bits <= 16:
        return np.arange(1 << source.bits, dtype=np.uint64).astype(_UINT[source.bits])
    float_type, integer, fmt = _FLOAT[source.name], _UINT[source.bits], source.format
    rng = np.random.default_rng(SEED)
    magnitudes = [grid(dtype).positive for dtype in DTYPES.values()
                  if dtype is target or (dtype.is_float8 and (dtype.torch or dtype.triton))]
    points = np.concatenate([np.concatenate([numbers, (numbers[:-1] + numbers[1:]) / 2]) for numbers in magnitudes])
    exact = np.concatenate(
        [points, *(values(np.arange(1 << 16, dtype=np.uint16), DTYPES[name]) for name in ("bf16", "fp16"))]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        centre = exact[~np.isnan(exact)].astype(float_type)
        neighbours = [np.nextafter(points.astype(float_type), float_type(end)) for end in (np.inf, -np.inf)]
        if source.name == "fp64":
            neighbours += [
                np.nextafter(points.astype(np.float32), np.float32(end)).astype(np.float64) for end in (np.inf, -np.inf)
            ]
    near = rng.integers(0, 1 << fmt.mantissa_bits, RANDOM, dtype=np.uint64)
    near |= rng.integers(fmt.bias - 20, fmt.bias + 18, RANDOM, dtype=np.uint64) << np.uint64(fmt.mantissa_bits)
    positive = np.concatenate([
        *(part.view(integer) for part in (centre, *neighbours)), near.astype(integer), _special_bits(source, rng),
        rng.integers(0, 1 << source.bits, RANDOM, dtype=np.uint64, endpoint=False).astype(integer) if source.bits < 64
        else rng.integers(0, 1 << 63, RANDOM, dtype=np.uint64),
    ])
    return _sorted_once(np.concatenate([positive, positive ^ integer(fmt.sign_bit)]))


def _sorted_once(bits: np.ndarray) -> np.ndarray:
    """Return the same as `np.unique`, which hashes, and on nearly distinct values takes 20 times as long."""
    bits = np.sort(bits)
    return bits[np.append(True, bits[1:] != bits[:-1])]


def _special_bits(source: DType, rng: np.random.Generator) -> np.ndarray:
    """Return NaN with each single payload bit, with all, and with random ones; the ends of the subnormals, of the
    normals, infinity."""
    fmt = source.format
    one_binade, infinity = 1 << fmt.mantissa_bits, fmt.infinity_code
    payloads = [1 << bit for bit in range(fmt.mantissa_bits)] + [one_binade - 1]
    payloads += [int(payload) for payload in rng.integers(1, one_binade, 64)]
    ends = [0, 1, 2, one_binade - 1, one_binade, infinity - 1, infinity]
    subnormals = rng.integers(1, one_binade, 1024)
    return np.array(
        [infinity | payload for payload in payloads] + ends + [int(bits) for bits in subnormals],
        dtype=_UINT[source.bits],
    )


@lru_cache(maxsize=2)
def product_inputs(source: DType) -> tuple[np.ndarray, np.ndarray]:
    """Return bits of values and of scales of a 16-bit `source`: every value with three scales between 2**-6 and 2**6.
    """
    fmt = source.format
    every = np.tile(cast_inputs(source, source), SCALES_PER_VALUE)
    rng = np.random.default_rng(SEED + 1)
    scales = rng.integers((fmt.bias - 6) << fmt.mantissa_bits, (fmt.bias + 6) << fmt.mantissa_bits, every.size)
    return every, scales.astype(np.uint16)


@lru_cache(maxsize=4)
def bit_inputs(dtype: DType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return two operands of an unsigned integer, and shift counts below its width: every 16-bit value, or random ones
    and single bits."""
    rng, integer = np.random.default_rng(SEED + 2), _UINT[dtype.bits]
    if dtype.bits == 16:
        first = np.tile(np.arange(1 << 16, dtype=np.uint16), 16)
        counts = np.repeat(np.arange(16, dtype=np.uint16), 1 << 16)
    else:
        single_bits = (1 << bit for bit in range(dtype.bits))
        ends = np.array([0, 1, (1 << dtype.bits) - 1, (1 << (dtype.bits - 1)) - 1, *single_bits], dtype=integer)
        first = np.concatenate(
            [ends, rng.integers(0, (1 << dtype.bits) - 1, RANDOM >> 4, dtype=integer, endpoint=True)]
        )
        counts = np.repeat(np.arange(dtype.bits, dtype=integer), first.size)
        first = np.tile(first, dtype.bits)
    second = rng.integers(0, (1 << dtype.bits) - 1, first.size, dtype=integer, endpoint=True)
    return first, second, counts

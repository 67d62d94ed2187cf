"""Encode and decode tensors for any `Format` of up to 8 bits, and for codebooks: the oracle, made fast by tables.

Decoding is a table look-up. So is encoding: the upper bits of a number, with a sticky bit for all below them, round as
the whole number does, and are few enough to index a table made from `fpxbench.numbers.codec_definition`. All arithmetic
is on integers, for the reason given there.

Source of the sticky bit: rounding to odd, with two bits more than the target has, then rounds as if once (Boldo and
Melquiond, "Emulation of FMA and correctly rounded sums", IEEE TC 57(4), 2008).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from fpxbench.numbers.codebook import Codebook, NumberFormat
from fpxbench.numbers.codec_definition import MAX_RANDOM_BITS, SOURCES, rounded_codes, values_of
from fpxbench.numbers.formats import WEIGHT_BITS, Format
from fpxbench.numbers.rounding import Overflow, Rounding

__all__ = ["Overflow", "Rounding", "decode", "decode_table", "encode"]

# Elements per pass on a CPU: the data stays in the second-level cache, and torch uses one thread: with several,
# barriers cost more than they save as soon as anything else runs on the machine.
_CPU_CHUNK = 1 << 15

# Entries. Formats whose numbers are subnormal in the source would need longer tables: they are encoded without one.
_LARGEST_TABLE = 1 << 21


def encode(
    x: Tensor,
    fmt: NumberFormat,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
    *,
    random_bits: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return uint8 codes of `x`, same shape, rounded once from x's own precision (fp64, fp32, bf16 or fp16).

    Infinity counts as past the maximum. The lowest number of an unsigned format, to which smaller ones saturate, is 0,
    or the smallest power of two if it has no zero (e8m0). Stochastic rounding takes the number of `random_bits`, 1 to
    32, and draws ``torch.randint(0, 2**random_bits, [x.numel()], generator=generator)``, in x's order.

    Raises ValueError for NaN where the format has none (not seen under `torch.compile`), for an overflow that the
    format cannot express, and for `random_bits` that is missing, out of range, or given without stochastic rounding.
    """
    if isinstance(fmt, Codebook):
        return _encode_nearest(x, fmt, rounding, overflow)
    check_request(x, fmt, rounding, overflow, random_bits)
    flat = x.detach().reshape(-1)
    if not fmt.has_nan and not torch.compiler.is_compiling() and holds_nan(flat):
        raise ValueError(f"{fmt.name} has no NaN, and the input holds one")
    return encode_checked(flat, fmt, rounding, overflow, random_bits, generator).reshape(x.shape)


def _encode_nearest(x: Tensor, codebook: Codebook, rounding: Rounding, overflow: Overflow) -> Tensor:
    """Return uint8 codes of the nearest values of a `codebook`, same shape as `x`."""
    if rounding is not Rounding.NEAREST_EVEN or overflow is not Overflow.SATURATE:
        raise ValueError(
            f"{codebook.name} is a list of values: only rounding to the nearest with saturation is defined, not"
            f" {rounding}, {overflow}"
        )
    if not torch.compiler.is_compiling() and holds_nan(x.reshape(-1)):
        raise ValueError(f"{codebook.name} has no NaN, and the input holds one")
    thresholds, upper, codes = _codebook_tables(codebook, str(x.device))
    numbers = x.detach().double()       # holds every input and every midpoint of two fp32 values exactly
    place = torch.searchsorted(thresholds, numbers)     # a number at a threshold stays below it
    at_threshold = thresholds[place.clamp(max=len(thresholds) - 1)] == numbers
    return codes[place + (at_threshold & upper[place.clamp(max=len(upper) - 1)])]


@lru_cache(maxsize=16)
def _codebook_tables(codebook: Codebook, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return thresholds between neighbouring values, fp64; whether a number at one goes up; the codes in the values'
    order."""
    midpoints, upper = zip(*codebook.thresholds(), strict=True)
    return (torch.tensor(midpoints, dtype=torch.float64, device=device), torch.tensor(upper, device=device),
            torch.tensor([code for _, code in codebook.ascending()], dtype=torch.uint8, device=device))


def check_request(x: Tensor, fmt: Format, rounding: Rounding, overflow: Overflow, random_bits: int | None) -> None:
    """Raise the errors of `encode` that do not depend on the numbers in `x`."""
    if x.dtype not in SOURCES:
        raise TypeError(f"encode takes float64, float32, bfloat16 or float16, not {x.dtype}")
    if fmt.bits > WEIGHT_BITS:
        raise ValueError(f"encode takes formats of up to {WEIGHT_BITS} bits, not {fmt.name} of {fmt.bits}")
    fmt.check_overflow(overflow)
    if rounding is Rounding.STOCHASTIC:
        if random_bits is None or not 1 <= random_bits <= MAX_RANDOM_BITS:
            raise ValueError(f"stochastic rounding needs random_bits from 1 to {MAX_RANDOM_BITS}, not {random_bits}")
    elif random_bits is not None:
        raise ValueError(f"random_bits={random_bits} is for stochastic rounding; {rounding} rounding draws none")


def holds_nan(flat: Tensor) -> bool:
    """Return whether any element is NaN, in one pass: the maximum of a tensor with a NaN is NaN."""
    return flat.numel() > 0 and math.isnan(flat.max())


def encode_checked(
    flat: Tensor,
    fmt: Format,
    rounding: Rounding,
    overflow: Overflow,
    random_bits: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Return the codes of one-dimensional `flat`, without the checks of `encode`."""
    if torch.compiler.is_compiling():
        return _encode_by_definition(flat, fmt, rounding, overflow, random_bits, generator)
    if rounding is not Rounding.STOCHASTIC:
        requests = _requests(fmt, rounding, overflow, flat.dtype, str(flat.device))
        if requests.need_table(flat.numel()):
            return encode_by_table(flat, fmt, rounding, overflow)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for part, out in _chunks(flat, codes):
        out.copy_(_encode_by_definition(part, fmt, rounding, overflow, random_bits, generator))
    return codes


class _Requests:
    """Counts the numbers encoded with the same options: a table that is longer than their total costs more than it
    saves."""

    def __init__(self, length: int) -> None:
        self.missing = length if length <= _LARGEST_TABLE else None

    def need_table(self, count: int) -> bool:
        """Count `count` more numbers, and return whether to use a table from now on."""
        if self.missing is None:
            return False
        if self.missing > 0:
            self.missing -= count
        return self.missing <= 0


@lru_cache(maxsize=128)      # as many as tables, so that both are evicted together
def _requests(fmt: Format, rounding: Rounding, overflow: Overflow, source: torch.dtype, device: str) -> _Requests:
    return _Requests(1 << _index_bits(fmt, source))


def _encode_by_definition(
    part: Tensor,
    fmt: Format,
    rounding: Rounding,
    overflow: Overflow,
    random_bits: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    if rounding is not Rounding.STOCHASTIC:
        return rounded_codes(part, fmt, rounding, overflow)
    random = torch.randint(1 << random_bits, part.shape, generator=generator, device=part.device)
    return rounded_codes(part, fmt, rounding, overflow, random_bits=random_bits, random=random)


def encode_by_table(flat: Tensor, fmt: Format, rounding: Rounding, overflow: Overflow) -> Tensor:
    """Return uint8 codes of one-dimensional `flat`, by five passes over integers and one look-up. Not for stochastic
    rounding."""
    integer = SOURCES[flat.dtype][0]
    bits = _index_bits(fmt, flat.dtype)
    table = _encode_table(fmt, rounding, overflow, flat.dtype, str(flat.device))
    shift = 8 * integer.itemsize - bits
    left_behind = (1 << shift) - 1
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    scratch = torch.empty(
        _chunk_size(flat), dtype=torch.int64 if integer is torch.int64 else torch.int32, device=flat.device
    )
    for part, out in _chunks(flat.contiguous().view(integer), codes):
        index = scratch[:len(part)]
        if shift:       # the sum carries into bit `shift`, which is the index's lowest, if any bit below it is set
            torch.bitwise_and(part, left_behind, out=index)
            index.add_(left_behind).bitwise_or_(part).bitwise_right_shift_(shift)
        else:
            index.copy_(part)
        torch.index_select(table, 0, index.bitwise_and_((1 << bits) - 1), out=out)
    return codes


def _index_bits(fmt: Format, source: torch.dtype) -> int:
    """Return the number of upper bits of a `source` number, the lowest of them sticky, that decide its code under any
    rounding."""
    integer, mantissa_bits, bias = SOURCES[source]
    # Half a step of the format must lie above the sticky bit: for normals, the format's mantissa and one bit more; for
    # the source's subnormals, whose leading bit moves, as many bits as the format's smallest step needs.
    half_step = math.frexp(fmt.min_subnormal)[1] - 2
    kept = max(fmt.mantissa_bits + 2, 2 - bias - half_step)
    return 8 * integer.itemsize - mantissa_bits + min(kept, mantissa_bits)


@lru_cache(maxsize=128)
def _encode_table(fmt: Format, rounding: Rounding, overflow: Overflow, source: torch.dtype, device: str) -> Tensor:
    """Return the uint8 code of every upper part of a `source` number."""
    integer = SOURCES[source][0]
    bits = _index_bits(fmt, source)
    numbers = torch.arange(1 << bits, device=device) << (8 * integer.itemsize - bits)
    return rounded_codes(numbers.to(integer).view(source), fmt, rounding, overflow)


@lru_cache(maxsize=64)
def _decode_table(fmt: NumberFormat, device: str) -> Tensor:
    return torch.tensor([fmt.value(code) for code in range(1 << fmt.bits)], dtype=torch.float32, device=device)


def decode_table(fmt: NumberFormat, device: str | torch.device = "cpu") -> Tensor:
    """Return the number of every code: fp32 ``[2**bits]``, exact."""
    return _decode_table(fmt, str(device)).clone()


def decode(codes: Tensor, fmt: NumberFormat) -> Tensor:
    """Return fp32 values of uint8 `codes`, same shape, exact. Raise TypeError for codes of another dtype."""
    if codes.dtype is not torch.uint8:
        raise TypeError(f"decode takes codes as uint8, not {codes.dtype}; `encode` makes codes of numbers")
    if torch.compiler.is_compiling():
        return (
            _decode_table(fmt, str(codes.device))[codes.int()] if isinstance(fmt, Codebook) else values_of(codes, fmt)
        )
    flat = codes.reshape(-1).contiguous()
    if flat.device.type == "cpu" and flat.storage_offset() % 2 == 0 and not flat.numel() % 2:
        return _decode_in_pairs(flat, fmt).reshape(codes.shape)
    values = torch.empty(flat.shape, device=codes.device)
    _look_up(_decode_table(fmt, str(codes.device)), flat, values)
    return values.reshape(codes.shape)


def _decode_in_pairs(flat: Tensor, fmt: NumberFormat) -> Tensor:
    """Look up two codes at once: a CPU gathers 8 bytes as fast as 4, and the table of all pairs fits the second-level
    cache."""
    size = 1 << fmt.bits
    if fmt.bits < 8 and flat.numel() and (largest := int(flat.max())) >= size:
        raise IndexError(f"{largest} is not a code of {fmt.name}, which has {size}")
    values = torch.empty(flat.shape)
    _look_up(_pair_table(fmt), flat.view(torch.uint16), values.view(torch.float64))
    return values


def _look_up(table: Tensor, index: Tensor, out: Tensor) -> None:
    if index.numel() <= _chunk_size(index):
        torch.index_select(table, 0, index.to(torch.int32), out=out)
        return
    scratch = torch.empty(_chunk_size(index), dtype=torch.int32, device=index.device)
    for part, values in _chunks(index, out):
        torch.index_select(table, 0, scratch[:len(part)].copy_(part), out=values)


@lru_cache(maxsize=16)
def _pair_table(fmt: NumberFormat) -> Tensor:
    """Return the two fp32 values of every pair of codes, indexed by the bits of both: ``[65536]`` elements of 8 bytes,
    of a dtype that is only moved."""
    values = torch.zeros(256)
    values[: 1 << fmt.bits] = _decode_table(fmt, "cpu")
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.uint8)
    return values[codes.int()].view(torch.float64)


def _chunk_size(flat: Tensor) -> int:
    return max(1, min(flat.numel(), _CPU_CHUNK) if flat.device.type == "cpu" else flat.numel())


def _chunks(flat: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = _chunk_size(flat)
    return zip(flat.split(size), out.split(size), strict=True)

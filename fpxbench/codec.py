"""Encode and decode for any `Format`, from its definition: the oracle.

Integer arithmetic on the bits of the input, so that no cast of the PyTorch under test takes part: PyTorch's own
casts differ between versions and between eager, compiled and device.
"""

from __future__ import annotations

from enum import StrEnum
from functools import lru_cache

import torch
from torch import Tensor

from fpxbench.formats import Format


class Rounding(StrEnum):
    """What happens to a value between two codes."""

    NEAREST_EVEN = "nearest_even"
    NEAREST_AWAY = "nearest_away"
    TOWARD_ZERO = "toward_zero"


class Overflow(StrEnum):
    """What happens to a value that rounds past the largest finite number."""

    SATURATE = "saturate"
    INFINITY = "infinity"
    NAN = "nan"


# source dtype: (integer of its width, mantissa bits, exponent bias)
_SOURCES = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}

# Elements worked on at a time on a CPU: the fifteen passes of `_encode` then run out of cache, not memory.
_CPU_CHUNK = 1 << 17


@lru_cache(maxsize=64)
def _decode_table(fmt: Format, device: str) -> Tensor:
    values = [fmt.value(code) for code in range(1 << fmt.bits)]
    return torch.tensor(values, dtype=torch.float32, device=device)


def decode_table(fmt: Format, device: str | torch.device = "cpu") -> Tensor:
    """What every code stands for: fp32 `[2**bits]`, exact."""
    return _decode_table(fmt, str(device)).clone()


def decode(codes: Tensor, fmt: Format) -> Tensor:
    """fp32 values of uint8 `codes`, same shape, exact."""
    table = _decode_table(fmt, str(codes.device))
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)


def encode(
    x: Tensor,
    fmt: Format,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow = Overflow.SATURATE,
) -> Tensor:
    """uint8 codes of `x`, same shape, rounded once from x's own precision (fp64, fp32, bf16 or fp16).

    Infinity counts as past the maximum. Raises ValueError for NaN where the format has none, for an overflow that
    the format cannot express, and for formats without a zero (e8m0: see `fpxbench.scaling.floor_power_of_two`).
    """
    if not fmt.signed and fmt.mantissa_bits == 0:
        raise ValueError(f"{fmt.name} holds powers of two only: use fpxbench.scaling.floor_power_of_two")
    if overflow is Overflow.INFINITY and not fmt.has_infinity:
        raise ValueError(f"{fmt.name} has no infinity to overflow to: use saturate{' or nan' if fmt.has_nan else ''}")
    if overflow is Overflow.NAN and not fmt.has_nan:
        raise ValueError(f"{fmt.name} has no NaN to overflow to: use saturate")
    if x.dtype not in _SOURCES:
        if x.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"encode takes float64, float32, bfloat16 or float16, not {x.dtype}")
        x = x.float()   # exact
    if not fmt.has_nan and bool(torch.isnan(x).any()):
        raise ValueError(f"{fmt.name} has no NaN, and the input holds one")
    flat = x.reshape(-1)
    if flat.device.type != "cpu" or flat.numel() <= _CPU_CHUNK:
        return _encode(flat, fmt, rounding, overflow).reshape(x.shape)
    codes = torch.empty(flat.shape, dtype=torch.uint8)
    for start in range(0, flat.numel(), _CPU_CHUNK):
        part = slice(start, start + _CPU_CHUNK)
        codes[part] = _encode(flat[part], fmt, rounding, overflow)
    return codes.reshape(x.shape)


def _encode(x: Tensor, fmt: Format, rounding: Rounding, overflow: Overflow) -> Tensor:
    integer, mantissa_bits, source_bias = _SOURCES[x.dtype]
    raw = x.contiguous().view(integer)
    magnitude = raw & torch.iinfo(integer).max
    exponent_field = magnitude >> mantissa_bits
    # value = significand * 2**(exponent - source_bias - mantissa_bits)
    exponent = exponent_field.clamp(min=1)
    significand = (magnitude & ((1 << mantissa_bits) - 1)) | ((exponent_field > 0).to(integer) << mantissa_bits)

    # How far the target's unit in the last place lies above the source's: fixed for normals, growing below them.
    subnormal_shift = (1 - fmt.bias - fmt.mantissa_bits) + source_bias + mantissa_bits - exponent
    if fmt.is_integer:
        shift, binade = subnormal_shift, None
    else:
        shift = subnormal_shift.clamp(min=mantissa_bits - fmt.mantissa_bits)
        binade = (exponent - source_bias + fmt.bias - 1).clamp(min=0)
    # Past these ends nothing changes: everything is shifted out, or far beyond the format's maximum.
    shift = shift.clamp(min=1, max=mantissa_bits + 2)

    half = 1 << (shift - 1)
    if rounding is Rounding.NEAREST_EVEN:
        parity = significand >> shift
        if fmt.mantissa_bits == 0 and binade is not None:
            parity = parity + binade        # no mantissa to be even: the code is (IEEE P3109)
        significand = significand + (half - 1) + (parity & 1)
    elif rounding is Rounding.NEAREST_AWAY:
        significand = significand + half
    code = significand >> shift
    if binade is not None:
        code = code + (binade << fmt.mantissa_bits)     # a carry out of the mantissa lands in the exponent, as it should

    past_max = code > fmt.max_code
    if overflow is Overflow.SATURATE:
        code = code.clamp(max=fmt.max_code)
    else:
        target = fmt.infinity_code if overflow is Overflow.INFINITY else fmt.nan_code
        code = torch.where(past_max, target, code)

    negative = raw < 0
    if fmt.twos_complement:
        code = torch.where(negative, -code, code) & ((1 << fmt.bits) - 1)
    elif fmt.signed:
        sign = 1 << (fmt.bits - 1)
        if fmt.specials == "fnuz":
            negative = negative & (code != 0) & (code != fmt.nan_code)
        code = torch.where(negative, code | sign, code)
    else:
        code = torch.where(negative, 0, code)
    if fmt.has_nan:
        is_nan = magnitude > (((1 << (integer.itemsize * 8 - 1 - mantissa_bits)) - 1) << mantissa_bits)
        code = torch.where(is_nan, fmt.nan_code, code)
    return code.to(torch.uint8)

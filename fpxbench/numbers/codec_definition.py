"""The definition of encode and decode on tensors, by integer arithmetic on the bits of the numbers.

Of PyTorch's casts, only widening ones are used, which are exact: narrowing casts round differently between versions,
and between eager, compiled and devices. `fpxbench.numbers.tensor_codec` makes its tables from this; a compiled graph
uses it directly. `Format.value` and `Format.round` define the same for one number, and the tests compare the two.

Sources: IEEE 754-2019 §4.3 (rounding directions) and §7.4 (overflow); IEEE P3109 (formats without mantissa bits,
stochastic rounding); OCP Microscaling Formats (MX) v1.0 §5.4 (E8M0). docs/codec.md has the choices they leave open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.numbers.formats import Format
from fpxbench.numbers.rounding import Overflow, Rounding

SOURCES = {
    torch.float64: (torch.int64, 52, 1023),
    torch.float32: (torch.int32, 23, 127),
    torch.bfloat16: (torch.int16, 7, 127),
    torch.float16: (torch.int16, 10, 15),
}
"""Source dtypes: dtype -> (integer dtype of its width, mantissa bits, exponent bias)."""

MAX_RANDOM_BITS = 32


def rounded_codes(
    x: Tensor,
    fmt: Format,
    rounding: Rounding,
    overflow: Overflow,
    *,
    random_bits: int = 0,
    random: Tensor | None = None,
) -> Tensor:
    """Return the codes of `x`, same shape, each rounded once: uint8, or integers of the source's width for formats
    above 8 bits.

    Stochastic rounding takes `random`, int64 in ``[0, 2**random_bits)``, one for each element. NaN gives the format's
    NaN; for a format without NaN, the input must hold none.
    """
    if rounding is Rounding.STOCHASTIC or fmt.min_subnormal < 2.0**-126:
        x = x.double()      # room for the random bits; and fp32's subnormals get a leading bit
    elif x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    integer, mantissa_bits, source_bias = SOURCES[x.dtype]
    raw = x.contiguous().view(integer)
    negative, magnitude = raw < 0, raw & torch.iinfo(integer).max
    infinity = ((1 << (integer.itemsize * 8 - 1 - mantissa_bits)) - 1) << mantissa_bits

    # |x| = significand * 2**(exponent - source_bias - mantissa_bits)
    exponent_field = magnitude >> mantissa_bits
    significand = (magnitude & ((1 << mantissa_bits) - 1)) | ((exponent_field > 0).to(integer) << mantissa_bits)
    kept, remainder, half = _cut(significand, exponent_field.clamp(min=1), mantissa_bits, source_bias, fmt, random_bits)
    code = kept + _rounded_up(kept, remainder, half, negative, rounding)
    if rounding is Rounding.STOCHASTIC:
        code = (code + random) >> random_bits

    inward = _rounds_inward(negative, rounding) & (magnitude != infinity)
    past = {Overflow.SATURATE: fmt.max_code, Overflow.INFINITY: fmt.infinity_code, Overflow.NAN: fmt.nan_code}[overflow]
    code = torch.where(code > fmt.max_code, torch.where(inward, fmt.max_code, past), code)
    if fmt.signed:
        code = _with_sign(code, negative, fmt)
    else:
        code = _unsigned(code, negative, magnitude == 0, inward, fmt, overflow)
    if fmt.has_nan:
        code = torch.where(magnitude > infinity, fmt.nan_code, code)
    return code.to(torch.uint8) if fmt.bits <= 8 else code


def _cut(
    significand: Tensor, exponent: Tensor, mantissa_bits: int, source_bias: int, fmt: Format, random_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the code at or below each magnitude, extended by `random_bits` low bits; the remainder of the magnitude;
    and half the distance to the next code, in the remainder's unit."""
    # A format without zero has the codes of a format with zero, except the first, which would be zero's.
    bias = fmt.bias if fmt.has_zero else fmt.bias + 1
    # Exponent of the target's unit in the last place over the source's: fixed for normals, growing below them.
    shift = (1 - bias - fmt.mantissa_bits) + source_bias + mantissa_bits - exponent
    if fmt.is_integer:
        binade = torch.zeros_like(exponent)
        shift = shift.clamp(min=mantissa_bits - 8)      # beyond it every number is far past the maximum
    else:
        binade = (exponent - source_bias + bias - 1).clamp(min=0)
        shift = shift.clamp(min=mantissa_bits - fmt.mantissa_bits)
    shift = (shift - random_bits).clamp(max=mantissa_bits + 2)      # beyond it every bit is shifted out
    kept = significand >> shift
    remainder = significand - (kept << shift)
    # The code holds the exponent above the mantissa, so a carry out of the mantissa goes into the exponent.
    code = kept + (binade << (fmt.mantissa_bits + random_bits))
    if not fmt.has_zero:
        code = code - (1 << random_bits)
    return code, remainder, 1 << (shift - 1)


def _rounded_up(code: Tensor, remainder: Tensor, half: Tensor, negative: Tensor, rounding: Rounding) -> Tensor | int:
    """Return the increment of each code, 0 or 1. Ties to even choose the even code, also in formats without mantissa
    bits (P3109)."""
    match rounding:
        case Rounding.NEAREST_EVEN | Rounding.STOCHASTIC:
            return remainder + (code & 1) > half
        case Rounding.NEAREST_AWAY:
            return remainder >= half
        case Rounding.UP:
            return (remainder > 0) & ~negative
        case Rounding.DOWN:
            return (remainder > 0) & negative
        case Rounding.TO_ODD:
            return (remainder > 0) & (code & 1 == 0)
    return 0


def _rounds_inward(negative: Tensor, rounding: Rounding) -> Tensor:
    """Return where numbers are rounded toward zero: there, a finite number does not overflow (IEEE 754 §7.4)."""
    match rounding:
        case Rounding.TOWARD_ZERO | Rounding.TO_ODD:
            return torch.ones_like(negative)
        case Rounding.UP:
            return negative
        case Rounding.DOWN:
            return ~negative
    return torch.zeros_like(negative)


def _unsigned(
    code: Tensor, negative: Tensor, is_zero: Tensor, inward: Tensor, fmt: Format, overflow: Overflow
) -> Tensor:
    """Return codes of an unsigned format. Its lowest number is 0, or the smallest power of two if zero has no code; no
    code stands for -infinity."""
    below = negative & (code != 0) if fmt.has_zero else is_zero | negative
    code = torch.where(below, 0, code).clamp(min=0)
    if overflow is not Overflow.SATURATE:
        code = torch.where(below & ~inward if fmt.has_zero else below, fmt.nan_code, code)
    return code


def _with_sign(code: Tensor, negative: Tensor, fmt: Format) -> Tensor:
    """Return codes of signed numbers from those of their magnitudes."""
    if fmt.twos_complement:
        return torch.where(negative, -code, code) & ((1 << fmt.bits) - 1)
    if fmt.specials == "fnuz":
        negative = negative & (code != 0) & (code != fmt.nan_code)
    return torch.where(negative, code | (1 << (fmt.bits - 1)), code)


def values_of(codes: Tensor, fmt: Format) -> Tensor:
    """Return fp32 values of uint8 `codes`, same shape, exact: `Format.value` for a tensor."""
    code = codes.int()
    if fmt.twos_complement:
        unused = 32 - fmt.bits
        return ((code << unused) >> unused).float() * fmt.min_subnormal
    magnitude = code & fmt.magnitude_mask
    negative = code > magnitude
    significand = magnitude & ((1 << fmt.mantissa_bits) - 1)
    exponent = magnitude >> fmt.mantissa_bits
    lowest = 1 if fmt.has_zero else 0       # the exponent of the first binade that has a leading bit
    significand = significand | ((exponent >= lowest).int() << fmt.mantissa_bits)
    power = exponent.clamp(min=lowest) - (fmt.bias + fmt.mantissa_bits)
    # Two factors, each a normal number of fp32, which 2**power need not be.
    values = significand.float() * _power_of_two(power >> 1) * _power_of_two(power - (power >> 1))
    if fmt.has_infinity:
        values = torch.where(magnitude >= fmt.infinity_code, torch.inf, values)
    values = torch.where(negative, -values, values)
    if fmt.specials == "fnuz":
        return torch.where(code == fmt.nan_code, torch.nan, values)
    if fmt.has_nan:
        first_nan = fmt.infinity_code + 1 if fmt.has_infinity else fmt.nan_code
        return torch.where(magnitude >= first_nan, torch.nan, values)
    return values


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return fp32 ``2**exponent`` for int32 `exponent` in [-126, 127], made from its bits."""
    return ((exponent + 127) << 23).view(torch.float32)

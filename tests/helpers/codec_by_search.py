"""Encoding by search, for the tests: the numbers of a format in order, and the two that a number lies between.

Nothing of the codec is in it but `Format.value`; numbers and their middles are exact in fp64.
"""

from dataclasses import replace

import numpy as np

from fpxbench.numbers.formats import Format
from fpxbench.numbers.tensor_codec import Overflow, Rounding

DETERMINISTIC = tuple(rounding for rounding in Rounding if rounding is not Rounding.STOCHASTIC)


def overflows(fmt: Format) -> list[Overflow]:
    """Return what the format can overflow to."""
    can = {Overflow.SATURATE: True, Overflow.INFINITY: fmt.has_infinity, Overflow.NAN: fmt.has_nan}
    return [overflow for overflow in Overflow if can[overflow]]


def magnitudes(fmt: Format) -> np.ndarray:
    """Return the finite numbers of codes 0, 1, ... without a sign, and the one that would come next."""
    numbers = [fmt.value(code) for code in range(fmt.max_code + 1)]
    if fmt.max == 0:
        beyond = fmt.min_subnormal
    elif fmt.mantissa_bits == 0:
        beyond = 2 * fmt.max
    elif fmt.has_nan and fmt.max_code < fmt.magnitude_mask:
        # With more exponents, fp64 holds it; under some biases the format's own range of fp32 ends before it.
        beyond = replace(fmt, specials="none", exponent_bits=9).value(fmt.max_code + 1)
    else:
        beyond = 2 * numbers[-1] - numbers[-2]
    return np.array([*numbers, beyond])


def search_codes(x: np.ndarray, fmt: Format, rounding: Rounding, overflow: Overflow) -> np.ndarray:
    """Return codes of fp64 `x`, one-dimensional. NaN only where the format has one."""
    numbers = magnitudes(fmt)
    size, negative = np.abs(x), np.signbit(x)
    low = np.searchsorted(numbers, size, side="right") - 1      # -1: below the smallest, where there is no zero
    lower, upper = numbers[low.clip(0)], numbers[(low + 1).clip(max=len(numbers) - 1)]
    inexact, middle = lower != size, (lower + upper) / 2
    with np.errstate(invalid="ignore"):
        goes_up = {
            Rounding.NEAREST_EVEN: (size > middle) | ((size == middle) & (low % 2 == 1)),
            Rounding.NEAREST_AWAY: size >= middle,
            Rounding.TOWARD_ZERO: np.zeros_like(negative),
            Rounding.UP: inexact & ~negative,
            Rounding.DOWN: inexact & negative,
            Rounding.TO_ODD: inexact & (low % 2 == 0),
        }[rounding]
    code = np.where(low < 0, 0, low + (goes_up & (low <= fmt.max_code)))

    inward = {Rounding.TOWARD_ZERO: True, Rounding.TO_ODD: True, Rounding.UP: negative, Rounding.DOWN: ~negative}.get(
        rounding, False
    )
    stays = inward & np.isfinite(x)
    past = {Overflow.SATURATE: fmt.max_code, Overflow.INFINITY: fmt.infinity_code, Overflow.NAN: fmt.nan_code}[overflow]
    code = np.where(code > fmt.max_code, np.where(stays, fmt.max_code, past), code)
    if fmt.twos_complement:
        code = np.where(negative, -code, code) % (1 << fmt.bits)
    elif fmt.signed:
        has_negative = (code != 0) & (code != fmt.nan_code) if fmt.specials == "fnuz" else True
        code = np.where(negative & has_negative, code + (1 << (fmt.bits - 1)), code)
    else:
        below = negative & (code != 0) if fmt.has_zero else negative | (x == 0)
        stays = stays & fmt.has_zero
        floor = 0 if overflow is Overflow.SATURATE else fmt.nan_code
        code = np.where(below, np.where(stays, 0, floor), code)
    return np.where(np.isnan(x), fmt.nan_code if fmt.has_nan else code, code).astype(np.uint8)


def discriminating_numbers(fmt: Format, dtype: type[np.floating]) -> np.ndarray:
    """Return every number of the format and every middle of two, the neighbours of each in `dtype`, one unit in the
    last place away; what lies past the maximum; the ends of `dtype`, and NaN."""
    numbers = magnitudes(fmt)
    top = numbers[-1]
    values = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, top * np.array([1.25, 1.5, 2, 1000])])
    ends = [0, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max, np.inf, np.nan]
    with np.errstate(over="ignore"):
        values = np.concatenate([values.astype(dtype), np.array(ends, dtype)])
        values = np.concatenate([values, np.nextafter(values, dtype(np.inf)), np.nextafter(values, dtype(0))])
    return np.unique(np.concatenate([values, -values, [dtype(-0.0)]]).view(f"u{dtype().itemsize}")).view(dtype)

"""Arithmetic of IEEE 754 floats, given as bits of a `Format`, in exact arithmetic: what the standard says, not what
this machine's libraries do."""

from __future__ import annotations

import math
from fractions import Fraction

from fpxbench.numbers.formats import Format
from fpxbench.numbers.rounding import Overflow, Rounding


def nearest(fmt: Format, number: float | Fraction) -> int:
    """Return the bits of the nearest number of `fmt`, ties to even, infinity past the maximum."""
    return fmt.round(number, Rounding.NEAREST_EVEN, Overflow.INFINITY)


def toward_zero(fmt: Format, number: float | Fraction) -> int:
    """Return the bits of the next number of `fmt` that is no larger in magnitude."""
    return fmt.round(number, Rounding.TOWARD_ZERO, Overflow.INFINITY)


def flushed(fmt: Format, bits: int) -> int:
    """Return those bits, with a subnormal number of an IEEE format as zero of its sign."""
    assert fmt.infinity_code is not None        # its exponent field is all ones
    return bits if bits & fmt.infinity_code else bits & fmt.sign_bit


def product(a: float, b: float) -> float:
    """Return a product, exact for numbers of up to 24 significant bits."""
    return math.nan if (math.isinf(a) and b == 0) or (math.isinf(b) and a == 0) else a * b


def total(a: float, b: float) -> float | Fraction:
    """Return an exact sum; zero with IEEE's sign."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    exact = Fraction(a) + Fraction(b)
    return exact if exact else a + b


def least(a: float, b: float) -> float:
    """Return the smaller as PTX defines it: of a NaN and a number the number, and -0 is less than 0."""
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return min(a, b, key=lambda x: (x, math.copysign(1.0, x)))


def greatest(a: float, b: float) -> float:
    """Return the larger, likewise."""
    return -least(-a, -b)

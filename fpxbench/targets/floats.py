"""Arithmetic on the bits of fp32, fp16 and bf16 numbers, each result rounded once, to nearest even.

In exact arithmetic, so that a result is what IEEE 754 says and not what this machine's libraries do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Float:
    """An IEEE binary format by its widths."""

    bits: int
    exponent_bits: int

    @property
    def mantissa_bits(self) -> int:
        return self.bits - 1 - self.exponent_bits

    @property
    def _least_exponent(self) -> int:
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def _infinity(self) -> int:
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits

    @property
    def nan(self) -> int:
        """The NaN that GPUs give: every bit but the sign."""
        return (1 << (self.bits - 1)) - 1

    def value(self, bits: int) -> float:
        """The number that those bits are."""
        magnitude = bits & ((1 << (self.bits - 1)) - 1)
        sign = -1.0 if bits >> (self.bits - 1) else 1.0
        if magnitude >= self._infinity:
            return sign * math.inf if magnitude == self._infinity else math.nan
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        if exponent:
            mantissa |= 1 << self.mantissa_bits
        return sign * math.ldexp(mantissa, max(exponent, 1) - 1 + self._least_exponent - self.mantissa_bits)

    def nearest(self, number: float | Fraction) -> int:
        """The bits of the nearest number of this format, ties to even."""
        return self._rounded(number, round, self._infinity)

    def toward_zero(self, number: float | Fraction) -> int:
        """The bits of the next number of this format that is no larger in magnitude."""
        return self._rounded(number, math.floor, self._infinity - 1)

    def _rounded(self, number: float | Fraction, round_steps: Callable[[Fraction], int], most: int) -> int:
        if isinstance(number, float) and not math.isfinite(number):
            if math.isnan(number):
                return self.nan
            return self._infinity | (number < 0) << (self.bits - 1)
        negative = number < 0 or (isinstance(number, float) and math.copysign(1.0, number) < 0)
        magnitude = abs(Fraction(number))
        bits = 0
        if magnitude:
            exponent = max(_floor_log2(magnitude), self._least_exponent)
            steps = round_steps(magnitude / Fraction(2) ** (exponent - self.mantissa_bits))
            bits = min(((exponent - self._least_exponent) << self.mantissa_bits) + steps, most)
        return bits | negative << (self.bits - 1)

    def flushed(self, bits: int) -> int:
        """Those bits, with a subnormal number as zero of its sign."""
        subnormal = bits & self._infinity == 0
        return bits & (1 << (self.bits - 1)) if subnormal else bits


FP32, FP16, BF16 = Float(32, 8), Float(16, 5), Float(16, 8)


def product(a: float, b: float) -> float:
    """Exact for numbers of up to 24 significant bits."""
    return math.nan if (math.isinf(a) and b == 0) or (math.isinf(b) and a == 0) else a * b


def total(a: float, b: float) -> float | Fraction:
    """Exact; zero with IEEE's sign."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return a + b
    exact = Fraction(a) + Fraction(b)
    return exact if exact else a + b


def least(a: float, b: float) -> float:
    """The smaller, where a NaN gives way to a number and -0 is below 0, as PTX has it."""
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return min(a, b, key=lambda x: (x, math.copysign(1.0, x)))


def greatest(a: float, b: float) -> float:
    """The larger, likewise."""
    return -least(-a, -b)


def _floor_log2(number: Fraction) -> int:
    guess = number.numerator.bit_length() - number.denominator.bit_length()
    return guess if Fraction(2) ** guess <= number else guess - 1

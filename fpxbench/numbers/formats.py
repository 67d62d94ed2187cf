"""Number formats, as data, and their exact definition, one number at a time.

`Format.value` is the number that a code stands for and `Format.round` the code that a number becomes, in exact
arithmetic, for formats of up to 64 bits. `fpxbench.numbers.codec_definition` defines the same for tensors and formats
of up to 8 bits; it is tested against this module. Imports no torch.

Sources: IEEE 754-2019 §3.4, §4.3 and §7.4; OCP 8-bit Floating Point Specification (OFP8) v1.0 §5; OCP Microscaling
Formats (MX) v1.0 §5.3-5.4; "8-bit Numerical Formats for Deep Neural Networks" (FNUZ), arXiv:2206.02915; IEEE P3109
(formats without mantissa bits, stochastic rounding). docs/codec.md lists the choices that they leave open.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from fpxbench.numbers.rounding import Overflow, Rounding

SPECIALS = ("none", "ieee", "fn", "fnuz")

WEIGHT_BITS = 8
"""Bits of the widest format that weights are stored in and the tensor codec takes."""


@dataclass(frozen=True)
class Format:
    """The bits of a number and what they mean.

    name : as users write it, e.g. ``e4m3fn``
    exponent_bits, mantissa_bits : widths; with `signed` one more bit for the sign. 0 exponent bits: an integer grid
    bias : a normal code is ``2**(E - bias) * (1 + M / 2**mantissa_bits)``, a subnormal one
        ``2**(1 - bias) * M / 2**mantissa_bits``
    specials : what the top codes mean. ``none``: every code is a number; ``ieee``: the top exponent is infinity and
        NaN; ``fn``: all ones are NaN, no infinity; ``fnuz``: the code of -0 is the one NaN, no infinity, no -0
    signed : whether there is a sign bit (e8m0 has none)
    twos_complement : negative codes count down from zero (int8) instead of carrying a sign bit

    Raises ValueError for fields that contradict each other, and for numbers out of the range of fp32 (up to 8 bits) or
    float64 (above).
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "none"
    signed: bool = True
    twos_complement: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 64:
            raise ValueError(f"format {self.name!r} has {self.bits} bits; a format has 1 to 64")
        if self.specials not in SPECIALS:
            raise ValueError(
                f"format {self.name!r}: specials must be one of {', '.join(SPECIALS)}, not {self.specials!r}"
            )
        if self.specials == "ieee" and (self.exponent_bits == 0 or self.mantissa_bits == 0):
            raise ValueError(f"format {self.name!r}: IEEE specials need exponent and mantissa bits")
        if self.specials == "fnuz" and not self.signed:
            raise ValueError(f"format {self.name!r}: FNUZ puts NaN at the code of -0, so it needs a sign")
        if self.twos_complement and (self.exponent_bits or self.specials != "none" or not self.signed):
            raise ValueError(
                f"format {self.name!r}: two's complement is for signed integers: no exponent bits, no specials"
            )
        if self.magnitude_mask == 0 and self.specials == "fn":
            raise ValueError(f"format {self.name!r} has no number: its only magnitude is NaN")
        lowest, end, held_by = (-149, 128, "fp32") if self.bits <= WEIGHT_BITS else (-1074, 1024, "float64")
        if not lowest <= self._lowest_exponent < end or self._exact(self.max_code) >= 2**end or self.mantissa_bits > 52:
            raise ValueError(
                f"format {self.name!r}: with bias {self.bias} its numbers lie past the range of {held_by}, "
                "which codes are decoded to"
            )

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def has_infinity(self) -> bool:
        return self.specials == "ieee"

    @property
    def has_nan(self) -> bool:
        return self.specials != "none"

    @property
    def has_negative_zero(self) -> bool:
        return self.signed and not self.twos_complement and self.specials != "fnuz"

    @property
    def is_integer(self) -> bool:
        return self.exponent_bits == 0

    @property
    def has_zero(self) -> bool:
        """Whether zero has a code. Without sign and mantissa there are powers of two only (e8m0)."""
        return self.signed or self.mantissa_bits > 0

    @property
    def magnitude_mask(self) -> int:
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    @property
    def sign_bit(self) -> int:
        """The sign's bit, as a code; 0 where there is none."""
        return self.magnitude_mask + 1 if self.signed else 0

    # Code to number.

    def value(self, code: int) -> float:
        """Return the number that `code` stands for, exactly. Raise ValueError for what is not a code."""
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self.name} has {1 << self.bits} codes; {code} is not one of them")
        magnitude, negative = code & self.magnitude_mask, bool(code & self.sign_bit)
        if self.twos_complement:
            return float(self._exact(magnitude) - negative * self._exact(self.sign_bit))
        if self.has_infinity and magnitude == self.infinity_code:
            return -math.inf if negative else math.inf
        if self._is_nan(magnitude, negative):
            return math.nan
        number = float(self._exact(magnitude))
        return -number if negative else number

    def _is_nan(self, magnitude: int, negative: bool) -> bool:
        match self.specials:
            case "fnuz":
                return negative and magnitude == 0
            case "fn":
                return magnitude == self.magnitude_mask
            case "ieee":
                return magnitude > self.infinity_code
        return False

    def _exact(self, magnitude: int) -> Fraction:
        """Return the number of a code without its sign bit, as if no code were special."""
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        if self.is_integer:
            exponent, mantissa = 0, magnitude
        lowest = 1 if self.has_zero else 0      # the first exponent field with a leading bit
        if exponent >= lowest and not self.is_integer:
            mantissa |= 1 << self.mantissa_bits
        power = max(exponent, lowest) - self.bias - self.mantissa_bits
        return Fraction(mantissa << power) if power >= 0 else Fraction(mantissa, 1 << -power)

    # Number to code.

    def round(
        self,
        number: float | Fraction,
        rounding: Rounding = Rounding.NEAREST_EVEN,
        overflow: Overflow = Overflow.SATURATE,
        *,
        random_bits: int = 0,
        random: int = 0,
    ) -> int:
        """Return the code of `number`, rounded once. The scalar form of `fpxbench.numbers.tensor_codec.encode`.

        Infinity counts as past the maximum. Stochastic rounding takes `random`, in ``[0, 2**random_bits)``. The lowest
        number of an unsigned format is 0, or the smallest power of two if it has no zero (e8m0).

        Raises ValueError for NaN where the format has none, and for an overflow that it cannot express.
        """
        self.check_overflow(overflow)
        if number != number:
            if not self.has_nan:
                raise ValueError(f"{self.name} has no NaN to round NaN to")
            return self.nan_code
        negative = number < 0 or (number == 0 and isinstance(number, float) and math.copysign(1.0, number) < 0)
        infinite = isinstance(number, float) and math.isinf(number)
        # IEEE 754 §7.4: a finite number that is rounded inward does not overflow.
        inward = not infinite and (rounding in (Rounding.TOWARD_ZERO, Rounding.TO_ODD)
                                   or rounding is (Rounding.UP if negative else Rounding.DOWN))
        code = self.max_code + 1
        if not infinite:
            code = _rounded(self._position(abs(Fraction(number))), rounding, negative, random_bits, random)
        if code > self.max_code:
            code = self.max_code if inward else self._past_max(overflow)
        return (
            self._with_sign(code, negative) if self.signed else self._unsigned(code, number, negative, inward, overflow)
        )

    def check_overflow(self, overflow: Overflow) -> None:
        """Raise ValueError for an overflow that the format cannot express."""
        if overflow is Overflow.INFINITY and not self.has_infinity:
            way_out = "saturate or nan" if self.has_nan else "saturate"
            raise ValueError(f"{self.name} has no infinity to overflow to: use {way_out}")
        if overflow is Overflow.NAN and not self.has_nan:
            raise ValueError(f"{self.name} has no NaN to overflow to: use saturate")

    def _position(self, magnitude: Fraction) -> Fraction:
        """Return the position of a magnitude among the codes: the code of the number below it, plus the fraction of the
        distance to the next number."""
        if magnitude == 0:
            return Fraction(0 if self.has_zero else -1)
        bias = self.bias if self.has_zero else self.bias + 1
        binade = 0 if self.is_integer else max(_floor_log2(magnitude) - (1 - bias), 0)
        steps = magnitude / Fraction(2) ** (binade + 1 - bias - self.mantissa_bits)
        # The exponent lies above the mantissa, so codes are consecutive. A format without zero lacks zero's code.
        return steps + (binade << self.mantissa_bits) - (not self.has_zero)

    def _past_max(self, overflow: Overflow) -> int:
        return {Overflow.SATURATE: self.max_code, Overflow.INFINITY: self.infinity_code, Overflow.NAN: self.nan_code}[
            overflow
        ]

    def _with_sign(self, code: int, negative: bool) -> int:
        if not negative:
            return code
        if self.twos_complement:
            return -code & ((1 << self.bits) - 1)
        if self.specials == "fnuz" and code in (0, self.nan_code):
            return code
        return code | self.sign_bit

    def _unsigned(self, code: int, number: float | Fraction, negative: bool, inward: bool, overflow: Overflow) -> int:
        """Return the code of a number in an unsigned format, given the code of its magnitude. There is no -infinity: a
        number below the range saturates or becomes NaN."""
        below = negative and code != 0 if self.has_zero else number <= 0
        if not below:
            return max(code, 0)
        inward = inward and self.has_zero
        return 0 if overflow is Overflow.SATURATE or inward else self.nan_code

    # The ends of the range, and single codes.

    @cached_property
    def max_code(self) -> int:
        """The code of the largest finite number."""
        if self.has_infinity:
            return self.infinity_code - 1
        return self.magnitude_mask - (self.specials == "fn")

    @cached_property
    def max(self) -> float:
        return self.value(self.max_code)

    @property
    def emax(self) -> int:
        """Exponent of the largest finite number: floor(log2(max))."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_normal(self) -> float:
        return 2.0 ** (self._lowest_exponent + self.mantissa_bits)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive number, which is also the spacing of subnormal numbers; `min_normal` in a format
        without mantissa bits.
        """
        return 2.0**self._lowest_exponent

    @property
    def _lowest_exponent(self) -> int:
        return (1 if self.has_zero else 0) - self.bias - self.mantissa_bits

    @property
    def nan_code(self) -> int | None:
        """The NaN that an encoder writes: all magnitude bits set, or FNUZ's only one; None where there is none."""
        if self.specials == "none":
            return None
        return self.sign_bit if self.specials == "fnuz" else self.magnitude_mask

    @property
    def infinity_code(self) -> int | None:
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits if self.has_infinity else None

    @cached_property
    def sibling(self) -> Format | None:
        """The 8-bit format with the same fields and the other convention (FNUZ: bias one higher, NaN at -0): E4M3FN for
        E4M3FNUZ and back. None if there is none."""
        if self.bits != 8 or self.specials == "none" or not self.signed:
            return None
        base = f"e{self.exponent_bits}m{self.mantissa_bits}"
        if self.specials != "fnuz":
            return replace(self, name=f"{base}fnuz", bias=self.bias + 1, specials="fnuz")
        suffix, specials = ("fn", "fn") if self.mantissa_bits == 3 else ("", "ieee")
        return replace(self, name=base + suffix, bias=self.bias - 1, specials=specials)

    def describe_code(self, code: int) -> str:
        """Return a code as text, in hexadecimal and by its fields: ``0x7e 0.1111.110``."""
        text = f"{code:0{self.bits}b}"
        parts = [text[:1]] if self.signed else []
        start = len(parts)
        parts += [text[start:start + self.exponent_bits], text[start + self.exponent_bits:]]
        return f"0x{code:02x} " + ".".join(part for part in parts if part)


def _rounded(position: Fraction, rounding: Rounding, negative: bool, random_bits: int, random: int) -> int:
    """Return one of the two codes beside `position`."""
    if rounding is Rounding.STOCHASTIC:     # nearest even at `random_bits` more, then a random carry
        return (round(position * (1 << random_bits)) + random) >> random_bits
    code = math.floor(position)
    left = position - code
    match rounding:
        case Rounding.NEAREST_EVEN:
            return round(position)      # of a Fraction: exact, ties to even
        case Rounding.NEAREST_AWAY:
            return code + (left >= Fraction(1, 2))
        case Rounding.TOWARD_ZERO:
            return code
        case Rounding.UP | Rounding.DOWN:
            return code + (left > 0 and negative == (rounding is Rounding.DOWN))
        case Rounding.TO_ODD:
            return code | (left > 0)
    raise ValueError(f"no rounding {rounding!r}: one of {', '.join(Rounding)}")


def _floor_log2(number: Fraction) -> int:
    """Return the exponent of the largest power of two that is not above `number` > 0."""
    exponent = number.numerator.bit_length() - number.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= number else exponent - 1


FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        Format("e4m3fn", 4, 3, 7, "fn"),
        Format("e4m3fnuz", 4, 3, 8, "fnuz"),
        Format("e5m2", 5, 2, 15, "ieee"),
        Format("e5m2fnuz", 5, 2, 16, "fnuz"),
        Format("e3m4", 3, 4, 3, "ieee"),
        Format("e3m2", 3, 2, 3),
        Format("e2m3", 2, 3, 1),
        Format("e2m1", 2, 1, 1),
        Format("e8m0", 8, 0, 127, "fn", signed=False),
        # An integer is a float without exponent: every code is a "subnormal" of step 1.
        Format("int8", 0, 7, -6, twos_complement=True),
        Format("int4", 0, 3, -2, twos_complement=True),
    )
}
"""The formats that weights and scales are stored in, by name."""

FP16 = Format("fp16", 5, 10, 15, "ieee")
BF16 = Format("bf16", 8, 7, 127, "ieee")
FP32 = Format("fp32", 8, 23, 127, "ieee")
FP64 = Format("fp64", 11, 52, 1023, "ieee")

_BY_PARTS = re.compile(r"(?P<u>u)?e(?P<e>[1-8])m(?P<m>[0-7])(?:b(?P<b>-?\d+))?(?P<specials>fnuz|fn|ieee)?")


def format_named(name: str) -> Format:
    """Return the format of that name, or one made from its parts: ``e2m2``, ``e3m4b5``, ``e5m1fnuz``, ``ue5m3`` (no
    sign).

    Parts default to bias ``2**(E-1) - 1`` (one more for FNUZ) and to numbers only, as in OCP MX's FP6 and FP4.
    Raises ValueError naming the part that is wrong.
    """
    if name in FORMATS:
        return FORMATS[name]
    match = _BY_PARTS.fullmatch(name)
    if match is None:
        raise ValueError(
            f"no format {name!r}: one of {', '.join(FORMATS)}, or by its parts as in e2m2, e3m4b5, e4m3fnuz"
        )
    exponent_bits, specials = int(match["e"]), match["specials"] or "none"
    bias = int(match["b"]) if match["b"] else (1 << (exponent_bits - 1)) - (specials != "fnuz")
    mantissa_bits, signed = int(match["m"]), match["u"] is None
    if (bits := signed + exponent_bits + mantissa_bits) > WEIGHT_BITS:
        raise ValueError(f"format {name!r} has {bits} bits; a weight's has 1 to {WEIGHT_BITS}")
    fmt = Format(name, exponent_bits, mantissa_bits, bias, specials, signed)
    if not (fmt.min_subnormal >= 2.0**-126 and fmt.max < 2.0**127):
        raise ValueError(
            f"format {name!r} runs from {fmt.min_subnormal:g} to {fmt.max:g}, past the normal range of fp32, "
            "which weights are decoded to"
        )
    return fmt

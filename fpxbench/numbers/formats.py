"""Number formats up to 8 bits, as data.

A format says what each code means; `Format.value` is that definition, in exact arithmetic, read straight off the
fields. Everything faster (`fpxbench.numbers.codec`) is tested against it.

Sources: OCP 8-bit Floating Point Specification (OFP8) v1.0 §5; OCP Microscaling Formats (MX) v1.0 §5.3-5.4;
"8-bit Numerical Formats for Deep Neural Networks" (FNUZ), arXiv:2206.02915.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

SPECIALS = ("none", "ieee", "fn", "fnuz")


@dataclass(frozen=True)
class Format:
    """An element's bits.

    Parameters
    ----------
    name : as users write it, e.g. ``e4m3fn``
    exponent_bits, mantissa_bits : widths; with `signed` one more bit for the sign. 0 exponent bits: an integer grid.
    bias : a normal code is ``2**(E - bias) * (1 + M / 2**mantissa_bits)``, a subnormal one ``2**(1 - bias) * M / 2**mantissa_bits``
    specials : what the top codes mean.
        ``none``: numbers, every one of them; ``ieee``: the top exponent is infinity and NaN; ``fn``: all ones are NaN,
        no infinity; ``fnuz``: the code of -0 is the one NaN, no infinity, no -0.
    signed : whether there is a sign bit (e8m0 has none)
    twos_complement : negative codes count down from zero (int8) instead of carrying a sign bit
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "none"
    signed: bool = True
    twos_complement: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"format {self.name!r} has {self.bits} bits; fpxbench takes 1 to 8")
        if self.specials not in SPECIALS:
            raise ValueError(f"format {self.name!r}: specials must be one of {', '.join(SPECIALS)}, not {self.specials!r}")
        if self.specials == "ieee" and (self.exponent_bits == 0 or self.mantissa_bits == 0):
            raise ValueError(f"format {self.name!r}: IEEE specials need exponent and mantissa bits")
        if self.specials == "fnuz" and not self.signed:
            raise ValueError(f"format {self.name!r}: FNUZ puts NaN at the code of -0, so it needs a sign")
        if self.twos_complement and (self.exponent_bits or self.specials != "none" or not self.signed):
            raise ValueError(f"format {self.name!r}: two's complement is for signed integers: no exponent bits, no specials")
        if self.magnitude_mask == 0 and self.specials == "fn":
            raise ValueError(f"format {self.name!r} has no number: its only magnitude is NaN")
        if not (-149 <= self._lowest_exponent <= 127 and self.max < 2.0**128):
            raise ValueError(f"format {self.name!r}: with bias {self.bias} its numbers lie past the range of fp32, which codes are decoded to")

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
    def is_integer(self) -> bool:
        return self.exponent_bits == 0

    @property
    def has_zero(self) -> bool:
        """Whether zero has a code. Without sign and mantissa there are powers of two only (e8m0)."""
        return self.signed or self.mantissa_bits > 0

    @property
    def magnitude_mask(self) -> int:
        return (1 << (self.exponent_bits + self.mantissa_bits)) - 1

    def value(self, code: int) -> float:
        """The number that `code` stands for: the definition, one code at a time. Exact in float64."""
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self.name} has {1 << self.bits} codes; {code} is none of them")
        if self.twos_complement:
            signed_code = code - (1 << self.bits) if code >> (self.bits - 1) else code
            return float(signed_code * self._step(1 - self.bias))
        negative = self.signed and bool(code >> (self.bits - 1))
        magnitude = code & self.magnitude_mask
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude & ((1 << self.mantissa_bits) - 1)
        top = (1 << self.exponent_bits) - 1
        if self.specials == "fnuz" and negative and magnitude == 0:
            return math.nan
        if self.specials == "fn" and magnitude == self.magnitude_mask:
            return math.nan
        if self.specials == "ieee" and exponent == top:
            return math.nan if mantissa else (-math.inf if negative else math.inf)
        if not self.has_zero:
            number = Fraction(2) ** (exponent - self.bias)
        elif exponent == 0:
            number = mantissa * self._step(1 - self.bias)
        else:
            number = ((1 << self.mantissa_bits) + mantissa) * self._step(exponent - self.bias)
        return -float(number) if negative else float(number)

    def _step(self, exponent: int) -> Fraction:
        """Distance between neighbours in the binade of 2**exponent."""
        return Fraction(2) ** (exponent - self.mantissa_bits)

    @cached_property
    def max_code(self) -> int:
        """The code of the largest finite number."""
        top = self.magnitude_mask if not self.twos_complement else (1 << (self.bits - 1)) - 1
        return next(code for code in range(top, -1, -1) if math.isfinite(self.value(code)))     # they ascend

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
        """The smallest positive number, and the distance of its neighbours; without mantissa bits it is `min_normal`."""
        return 2.0**self._lowest_exponent

    @property
    def _lowest_exponent(self) -> int:
        return (1 if self.has_zero else 0) - self.bias - self.mantissa_bits

    @property
    def nan_code(self) -> int | None:
        """The NaN that an encoder writes: all magnitude bits set, or FNUZ's only one; None where there is none."""
        if self.specials == "none":
            return None
        return 1 << (self.bits - 1) if self.specials == "fnuz" else self.magnitude_mask

    @property
    def infinity_code(self) -> int | None:
        return ((1 << self.exponent_bits) - 1) << self.mantissa_bits if self.has_infinity else None

    def describe_code(self, code: int) -> str:
        """A code as people read it: ``0x7e 0.1111.110``."""
        text = f"{code:0{self.bits}b}"
        parts = [text[:1]] if self.signed else []
        start = len(parts)
        parts += [text[start:start + self.exponent_bits], text[start + self.exponent_bits:]]
        return f"0x{code:02x} " + ".".join(part for part in parts if part)


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

TORCH_DTYPES: dict[str, str] = {
    "e4m3fn": "float8_e4m3fn",
    "e4m3fnuz": "float8_e4m3fnuz",
    "e5m2": "float8_e5m2",
    "e5m2fnuz": "float8_e5m2fnuz",
}
"""Formats that torch has a dtype for, and its name (``torch.float8_e4m3fn``)."""

_BY_PARTS = re.compile(r"(?P<u>u)?e(?P<e>[1-8])m(?P<m>[0-7])(?:b(?P<b>-?\d+))?(?P<specials>fnuz|fn|ieee)?")


def format_named(name: str) -> Format:
    """The format of that name, or one made from its parts: ``e2m2``, ``e3m4b5``, ``e5m1fnuz``, ``ue5m3`` (no sign).

    Parts default to bias ``2**(E-1) - 1`` (one more for FNUZ) and to numbers only, as in OCP MX's FP6 and FP4.
    Raises ValueError naming the part that is wrong.
    """
    if name in FORMATS:
        return FORMATS[name]
    match = _BY_PARTS.fullmatch(name)
    if match is None:
        raise ValueError(f"no format {name!r}: one of {', '.join(FORMATS)}, or by its parts as in e2m2, e3m4b5, e4m3fnuz")
    exponent_bits, specials = int(match["e"]), match["specials"] or "none"
    bias = int(match["b"]) if match["b"] else (1 << (exponent_bits - 1)) - (specials != "fnuz")
    fmt = Format(name, exponent_bits, int(match["m"]), bias, specials, signed=match["u"] is None)
    if not (fmt.min_subnormal >= 2.0**-126 and fmt.max < 2.0**127):
        raise ValueError(f"format {name!r} runs from {fmt.min_subnormal:g} to {fmt.max:g}, past the normal range of fp32, which weights are decoded to")
    return fmt

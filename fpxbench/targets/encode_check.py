"""Whether an encode rounds as it was asked to: its PTX is run on the numbers where roundings differ, and compared with the codec.

Those are every number of the format, every midpoint between neighbours, and the source's own neighbours of all of these, up to the format's maximum:
past it, and for NaN, formats leave the choice to whoever encodes.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

from fpxbench.numbers.formats import BF16, FP16, FP32, Format, format_named
from fpxbench.numbers.rounding import Overflow, Rounding
from fpxbench.records.kinds import Kind, sibling_kind
from fpxbench.targets.floats import nearest
from fpxbench.targets.ptx import converted

SOURCES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}


@lru_cache(maxsize=64)
def discriminating_inputs(fmt: Format, source: Format) -> tuple[int, ...]:
    """Bits of `source` numbers."""
    magnitudes = [fmt.value(code) for code in range(fmt.max_code + 1)]
    points = {*magnitudes, *((a + b) / 2 for a, b in itertools.pairwise(magnitudes))}
    bits = {nearest(source, point) + step for point in points for step in (-1, 0, 1)}
    kept = sorted(b for b in bits if b >= 0 and source.value(b) <= fmt.max)
    return (*kept, *(b | source.sign_bit for b in kept))


def mistake(ptx: str, format_name: str, source_name: str, rounding: str, elements_a_thread: int) -> tuple[Kind, str, str] | None:
    """What is wrong with an encode: kind, cause, and an example; None if it gives the code that was asked for every time.

    Raises Unmodelled where that cannot be told.
    """
    fmt, source = format_named(format_name), SOURCES[source_name]
    inputs = discriminating_inputs(fmt, source)
    codes = converted(ptx, inputs, source.bits // 8, 1, elements_a_thread)
    asked = Rounding.NEAREST_EVEN if rounding == "rtne" else Rounding.TOWARD_ZERO
    right = _codes(fmt, source_name, asked)
    wrong = [at for at, (code, due) in enumerate(zip(codes, right, strict=True)) if code != due]
    if not wrong:
        return None
    kind, cause = _named(codes, fmt, source_name, asked)
    some = wrong[0]
    words = (f"{len(wrong)} of {len(inputs)} inputs at and about numbers and midpoints: {source.value(inputs[some])!r} to "
             f"{fmt.describe_code(codes[some])} instead of {fmt.describe_code(right[some])}")
    return kind, cause, words


@lru_cache(maxsize=256)
def _codes(fmt: Format, source_name: str, rounding: Rounding, through: str = "", first: Rounding = Rounding.NEAREST_EVEN, by: Format | None = None) -> tuple[int, ...]:
    """The codec's codes of the inputs that tell for `fmt`; by way of fp16 or bf16 if so asked, rounded there by `first`; or those of
    another format."""
    source = SOURCES[source_name]
    numbers = [source.value(bits) for bits in discriminating_inputs(fmt, source)]
    if through:
        way = SOURCES[through]
        numbers = [way.value(way.round(number, first, Overflow.INFINITY)) for number in numbers]
    return tuple((by or fmt).round(number, rounding) for number in numbers)


def _named(codes: list[int], fmt: Format, source_name: str, asked: Rounding) -> tuple[Kind, str]:
    """The known mistake that gives exactly these codes."""
    asked_as = "to nearest even" if asked is Rounding.NEAREST_EVEN else "towards zero"
    found = tuple(codes)
    for rounding, kind, said in (
        (Rounding.TOWARD_ZERO, Kind.TRUNCATED, "rounds towards zero"), (Rounding.NEAREST_AWAY, Kind.TIES_AWAY, "rounds ties away from zero"),
        (Rounding.NEAREST_EVEN, Kind.INACCURATE, "rounds to nearest even"),
    ):
        if found == _codes(fmt, source_name, rounding):
            return kind, f"{said}, and was asked to round {asked_as}"
        for through, first in itertools.product(("fp16", "bf16"), (Rounding.NEAREST_EVEN, Rounding.TOWARD_ZERO)):
            if through != source_name and found == _codes(fmt, source_name, rounding, through, first):
                before = "to nearest even" if first is Rounding.NEAREST_EVEN else "towards zero"
                return Kind.DOUBLE_ROUNDING, f"rounds {before} to {through} first, and then {said.removeprefix('rounds ')}"
    other = fmt.sibling
    if other is not None and found == _codes(fmt, source_name, asked, by=other):
        return sibling_kind(fmt.specials), f"gives {other.name}'s codes"
    if all(code == due or _is_subnormal(due, fmt) for code, due in zip(codes, _codes(fmt, source_name, asked), strict=True)):
        return Kind.SUBNORMAL_WRONG, "gives subnormal numbers another code"
    return Kind.INACCURATE, f"gives another code than rounding {asked_as} does"


def _is_subnormal(code: int, fmt: Format) -> bool:
    """Or zero, or the least normal number, which subnormal ones round up to."""
    return code & fmt.magnitude_mask <= 1 << fmt.mantissa_bits

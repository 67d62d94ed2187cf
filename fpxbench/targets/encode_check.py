"""Check that an encode rounds as requested: execute its PTX on inputs where roundings differ, and compare the codes.

The inputs are every number of the format, every midpoint between neighbours, and the source's neighbours of all these,
up to the format's maximum: beyond it, and for NaN, the result is the encoder's choice.
"""

from __future__ import annotations

import itertools
from functools import lru_cache

from fpxbench.numbers.formats import BF16, FP16, FP32, Format, format_named
from fpxbench.numbers.rounding import Overflow, Rounding
from fpxbench.records.kinds import Kind, sibling_kind
from fpxbench.targets.floats import nearest
from fpxbench.targets.ptx_execution import converted

SOURCES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}


@lru_cache(maxsize=64)
def discriminating_inputs(fmt: Format, source: Format) -> tuple[int, ...]:
    """Return the bits of `source` numbers on which roundings to `fmt` differ."""
    magnitudes = [fmt.value(code) for code in range(fmt.max_code + 1)]
    points = {*magnitudes, *((a + b) / 2 for a, b in itertools.pairwise(magnitudes))}
    bits = {nearest(source, point) + step for point in points for step in (-1, 0, 1)}
    kept = sorted(b for b in bits if b >= 0 and source.value(b) <= fmt.max)
    return (*kept, *(b | source.sign_bit for b in kept))


def encode_fault(ptx: str, format_name: str, source_name: str, rounding: str, elements_a_thread: int) -> tuple[Kind,
        str, str] | None:
    """Return kind, cause and an example of an encode's fault; None if every code is as requested.

    Raises Unmodelled, and Miscompiled.
    """
    fmt, source = format_named(format_name), SOURCES[source_name]
    inputs = discriminating_inputs(fmt, source)
    codes = converted(ptx, inputs, source.bits // 8, 1, elements_a_thread)
    expected = Rounding.NEAREST_EVEN if rounding == "rtne" else Rounding.TOWARD_ZERO
    right = _codes(fmt, source_name, expected)
    wrong = [at for at, (code, due) in enumerate(zip(codes, right, strict=True)) if code != due]
    if not wrong:
        return None
    kind, cause = _named(codes, fmt, source_name, expected)
    some = wrong[0]
    message = (f"{len(wrong)} of {len(inputs)} inputs at numbers, midpoints and neighbours: "
               f"{source.value(inputs[some])!r} to {fmt.describe_code(codes[some])} "
               f"instead of {fmt.describe_code(right[some])}")
    return kind, cause, message


@lru_cache(maxsize=256)
def _codes(fmt: Format, source_name: str, rounding: Rounding, through: str = "",
           first: Rounding = Rounding.NEAREST_EVEN, by: Format | None = None) -> tuple[int, ...]:
    """Return the codec's codes of the discriminating inputs, optionally through fp16 or bf16 (rounded by `first`), or
    of another format.
    """
    source = SOURCES[source_name]
    numbers = [source.value(bits) for bits in discriminating_inputs(fmt, source)]
    if through:
        way = SOURCES[through]
        numbers = [way.value(way.round(number, first, Overflow.INFINITY)) for number in numbers]
    return tuple((by or fmt).round(number, rounding) for number in numbers)


def _named(codes: list[int], fmt: Format, source_name: str, expected: Rounding) -> tuple[Kind, str]:
    """Return the known encode fault with exactly these codes, and its cause."""
    requested = "to nearest even" if expected is Rounding.NEAREST_EVEN else "towards zero"
    found = tuple(codes)
    for rounding, kind, does in ((Rounding.TOWARD_ZERO, Kind.TRUNCATED, "rounds towards zero"),
                                 (Rounding.NEAREST_AWAY, Kind.TIES_AWAY, "rounds ties away from zero"),
                                 (Rounding.NEAREST_EVEN, Kind.INACCURATE, "rounds to nearest even")):
        if found == _codes(fmt, source_name, rounding):
            return kind, f"{does}, and was asked to round {requested}"
        for through, first in itertools.product(("fp16", "bf16"), (Rounding.NEAREST_EVEN, Rounding.TOWARD_ZERO)):
            if through != source_name and found == _codes(fmt, source_name, rounding, through, first):
                before = "to nearest even" if first is Rounding.NEAREST_EVEN else "towards zero"
                then = does.removeprefix("rounds ")
                return Kind.DOUBLE_ROUNDING, f"rounds {before} to {through} first, and then {then}"
    other = fmt.sibling
    if other is not None and found == _codes(fmt, source_name, expected, by=other):
        return sibling_kind(fmt.specials), f"gives {other.name}'s codes"
    if all(code == due or _is_subnormal(due, fmt)
           for code, due in zip(codes, _codes(fmt, source_name, expected), strict=True)):
        return Kind.SUBNORMAL_WRONG, "gives subnormal numbers another code"
    return Kind.INACCURATE, f"gives another code than rounding {requested} does"


def _is_subnormal(code: int, fmt: Format) -> bool:
    """Return whether a code is subnormal, zero, or the least normal number, to which subnormal ones round up."""
    return code & fmt.magnitude_mask <= 1 << fmt.mantissa_bits

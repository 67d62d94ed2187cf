"""The codes of other libraries, and the table in docs/codec.md of the differences by design."""

from dataclasses import dataclass

import gfloat
import numpy as np
from codec_by_search import search_codes
from gfloat.formats import format_info_ocp_e8m0
from gfloat.types import Domain, RoundMode
from places import DOCS
from test_formats import ML_DTYPES, gfloat_format

from fpxbench.numbers.formats import Format, format_named
from fpxbench.numbers.tensor_codec import Overflow, Rounding

NO_CODE = -1
GFLOAT_MODES = {
    Rounding.NEAREST_EVEN: RoundMode.TiesToEven,
    Rounding.NEAREST_AWAY: RoundMode.TiesToAway,
    Rounding.TOWARD_ZERO: RoundMode.TowardZero,
    Rounding.UP: RoundMode.TowardPositive,
    Rounding.DOWN: RoundMode.TowardNegative,
}
ML_OVERFLOW = {
    "e4m3fn": Overflow.NAN,
    "e4m3fnuz": Overflow.NAN,
    "e5m2fnuz": Overflow.NAN,
    "e4m3b11fnuz": Overflow.NAN,
    "e8m0": Overflow.NAN,
    "e5m2": Overflow.INFINITY,
    "e3m4": Overflow.INFINITY,
    "e4m3ieee": Overflow.INFINITY,
    "e3m2": Overflow.SATURATE,
    "e2m3": Overflow.SATURATE,
    "e2m1": Overflow.SATURATE,
}
"""What ml_dtypes does past the maximum, format by format: its choice, and not the same in all of them."""


def gfloat_info(fmt: Format) -> gfloat.FormatInfo:
    """Return `fmt` in gfloat's terms; integers and e8m0 too."""
    if fmt.twos_complement:
        return gfloat.FormatInfo(fmt.name, fmt.bits, fmt.bits, bias=fmt.bias, is_signed=True, domain=Domain.Finite,
                                 has_nz=False, num_high_nans=0, has_subnormals=True, is_twos_complement=True)
    return format_info_ocp_e8m0 if fmt.name == "e8m0" else gfloat_format(fmt)


def gfloat_codes(x: np.ndarray, fmt: Format, rounding: Rounding, saturates: bool = True) -> np.ndarray:
    """Return codes by gfloat of fp64 `x`; `NO_CODE` where it ends at a number that the format does not have."""
    info = gfloat_info(fmt)
    with np.errstate(all="ignore"):
        rounded = gfloat.round_ndarray(info, x, GFLOAT_MODES[rounding], sat=saturates)
        lost = (rounded < info.min) & np.isfinite(rounded) | (np.isinf(rounded) & ~fmt.has_infinity)
        return np.where(lost, NO_CODE, gfloat.encode_ndarray(info, np.where(lost, info.max, rounded)).astype(np.int16))


def ml_dtypes_codes(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Return codes by ml_dtypes of fp32 or fp64 `x`."""
    with np.errstate(all="ignore"):
        return x.astype(ML_DTYPES[fmt.name]).view(np.uint8)


@dataclass(frozen=True)
class Difference:
    """A row of the table: of all numbers of a kind, such as `number`, `library` makes another code than this codec
    does."""

    library: str
    fmt: Format
    kind: str
    number: float
    source: str
    rounding: Rounding
    theirs: int
    here: int


def listed_differences() -> list[Difference]:
    """Return the rows of "Differences by design" in docs/codec.md."""
    section = (DOCS / "codec.md").read_text().split("## Differences by design")[1].split("\n## ")[0]
    # not the rule under the header
    rows = [
        [cell.strip(" `") for cell in line.strip("|\n").split("|")]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    return [
        Difference(
            library, format_named(fmt), kind, _number(number), source, Rounding(rounding), _code(theirs), _code(here)
        )
        for library, fmt, kind, number, source, rounding, theirs, here in rows[1:]
    ]


def _number(text: str) -> float:
    return float.fromhex(text) if "0x" in text else float(text)


def _code(text: str) -> int:
    return NO_CODE if text == "none" else int(text, 16)


def numbers_of_kind(kind: str, x: np.ndarray, fmt: Format, rounding: Rounding) -> np.ndarray:
    """Return which of fp64 `x` a row with this `kind` is about."""
    def found(how: Rounding, to_what: Overflow) -> np.ndarray:
        return search_codes(x, fmt, how, to_what)

    to_what = Overflow.INFINITY if fmt.has_infinity else Overflow.NAN
    match kind:
        case "past the maximum":
            return (found(rounding, Overflow.SATURATE) != found(rounding, to_what)) & ((x > 0) | fmt.signed)
        case "zero":
            return x == 0
        case "negative":
            return x < 0
        case "a tie":
            return found(Rounding.NEAREST_EVEN, to_what) != found(Rounding.NEAREST_AWAY, to_what)
        case "subnormal in fp32":
            return (x > fmt.min_normal) & (x < 1.5 * fmt.min_normal)
        case "below the smallest":
            half = fmt.min_normal / 2  # a power of two that the format does not have
            return (x > 0) & {
                Rounding.UP: x <= half,
                Rounding.TOWARD_ZERO: x < 2 * half,
                Rounding.DOWN: x < 2 * half,
            }.get(rounding, x < 1.5 * half)
        case "past the symmetric range":
            return {
                Rounding.UP: x <= -fmt.max - 1, Rounding.TOWARD_ZERO: x <= -fmt.max - 1, Rounding.DOWN: x < -fmt.max,
            }.get(rounding, x <= -fmt.max - 0.5)
    raise ValueError(f"docs/codec.md lists a kind of number {kind!r}, which no test knows")

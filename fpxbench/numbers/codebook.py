"""Number formats that are a list of values: NF4, bitsandbytes' FP4, or any list of up to 256. Imports no torch.

A code is an index into the list. A number is encoded as the nearest value; `ties` decides for one midway between two.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from fpxbench.numbers.formats import Format

TABLES_VARIABLE = "FPX_TABLES"
"""Environment variable that names the folder to search for ``table.NAME``; if unset, the current folder."""
_MOST_BYTES = 1 << 16


@dataclass(frozen=True)
class Codebook:
    """A format given by its values. It has the interface of a `Format`, except exponent and mantissa.

    Parameters
    ----------
    name : as users write it
    values : the value of each code, 2 to 256 finite numbers that fp32 holds
    source : where it is defined
    ties : ``lower`` or ``toward_zero``: which of two equally near values a number becomes
    threshold_error : largest relative error of the thresholds that quantizers compare with, as fp32 cannot represent
        the midpoints
    """

    name: str
    values: tuple[float, ...]
    source: str
    ties: str = "lower"
    threshold_error: float = 2.0**-23

    def __post_init__(self) -> None:
        if not 2 <= len(self.values) <= 256:
            raise ValueError(f"codebook {self.name!r} has {len(self.values)} values; it must have 2 to 256")
        if any(not math.isfinite(value) or abs(value) >= 2.0**127 for value in self.values):
            raise ValueError(f"codebook {self.name!r} holds a value that is not finite in fp32")
        if not any(self.values):
            raise ValueError(f"codebook {self.name!r} holds nothing but zeros")

    signed = True
    twos_complement = has_nan = has_infinity = is_integer = False
    nan_code = infinity_code = sibling = None
    specials = "none"

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def has_zero(self) -> bool:
        return 0.0 in self.values

    @property
    def max(self) -> float:
        """The largest magnitude: what a block's largest weight is scaled to."""
        return max(abs(value) for value in self.values)

    @property
    def max_code(self) -> int:
        return max(range(len(self.values)), key=lambda code: self.values[code])

    def value(self, code: int) -> float:
        """Return the number that `code` stands for; codes past the end of the list are 0."""
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self.name} has {1 << self.bits} codes; {code} is not one of them")
        return self.values[code] if code < len(self.values) else 0.0

    def ascending(self) -> list[tuple[float, int]]:
        """Return the distinct values with their codes, ascending; for equal values, as 0 and -0, the first code."""
        first: dict[float, int] = {}
        for code, value in enumerate(self.values):
            first.setdefault(value, code)
        return sorted(first.items())

    def thresholds(self) -> list[tuple[float, bool]]:
        """Return the midpoint of each two neighbours in `ascending`, and whether a number at the midpoint becomes the
        upper one."""
        return [((low + high) / 2, self.ties == "toward_zero" and abs(high) < abs(low))
                for (low, _), (high, _) in pairwise(self.ascending())]

    def describe_code(self, code: int) -> str:
        return f"{code:#04x} ({self.value(code):g})"


NumberFormat = Format | Codebook
"""A format of a weight's codes."""

_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)

CODEBOOKS: dict[str, Codebook] = {
    codebook.name: codebook
    for codebook in (
        Codebook(
            "nf4",
            (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
             -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
             0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
             1.0),
            "Dettmers et al., QLoRA, arXiv:2305.14314, appendix E",
        ),
        Codebook(
            "bnbfp4",
            (*_FP4_MAGNITUDES, *(-value for value in _FP4_MAGNITUDES)),
            "bitsandbytes, csrc/kernels.cu: dDequantizeFP4Tree",
            ties="toward_zero",
            threshold_error=2.0**-19,       # the source gives them with six digits: 0.00260417 for 1/384
        ),
    )
}


@lru_cache(maxsize=64)
def table_named(name: str, folder: str | None = None) -> Codebook:
    """Read the codebook ``table.NAME`` from NAME.json (a list) or NAME.txt (numbers) in `folder`, else in $FPX_TABLES.

    Raises ValueError if the file does not exist or is not a list of numbers.
    """
    place = Path(folder or os.environ.get(TABLES_VARIABLE) or ".")
    stem = name.removeprefix("table.")
    files = [place / f"{stem}{suffix}" for suffix in (".json", ".txt")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"no table {stem!r}: neither {files[0].name} nor {files[1].name} is in {place}"
                         f" ({TABLES_VARIABLE} names the folder to search)")
    with open(file, encoding="utf-8") as stream:
        text = stream.read(_MOST_BYTES + 1)
    try:
        numbers = json.loads(text) if file.suffix == ".json" else text.replace(",", " ").split()
        values = tuple(float(number) for number in numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: not a list of numbers ({str(error)[:100]})") from None
    return Codebook(f"table.{stem}", values, str(file.name))

"""How fast the codec and the packing are, beside other libraries in the same run: the rows of the speed table.

Imports no torch: a child process times the rows (`fpxbench.casts.codec_timing`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from fpxbench.sweep.isolation import Isolation

OWN = "fpxbench"
COPY = "copy"
"""The entry that only copies: it reads and writes as many bytes in total, into fresh memory like the others."""

K = 4096
ROWS_AT_LEAST = 64
"""Codes are [N, 4096] with N a multiple of this, which every layout supports."""

ELEMENTS = 1 << 22
BUDGET_S = 0.5
_TIMEOUT_S = 120.0
MEASURE_ROW = "fpxbench.casts.codec_timing:measure_row"


class SpeedRatio(NamedTuple):
    """A ratio of speeds: the median over rounds, and the quartiles."""

    median: float
    low: float
    high: float


class CallTimes(BaseModel):
    """The calls of one entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    elements: int = Field(gt=0)
    """Elements per call; a slow library gets fewer."""
    nbytes: int = Field(gt=0)
    """Fewest bytes that a call must read and write, results included."""
    seconds: list[float] = Field(min_length=1)
    """Seconds of each call, in the order of the rounds."""

    @property
    def per_element_s(self) -> float:
        return statistics.median(self.seconds) / self.elements

    @property
    def elements_per_s(self) -> float:
        return 1 / self.per_element_s

    @property
    def gb_per_s(self) -> float:
        return self.nbytes / self.elements * self.elements_per_s / 1e9

    @property
    def spread(self) -> float:
        """Half the interquartile range, relative to the median."""
        low, median, high = _quartiles(self.seconds)
        return (high - low) / 2 / median


class SpeedRow(BaseModel):
    """One row of the table: interleaved calls in one process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: str
    """``encode/FORMAT/fp32``, ``encode/FORMAT/bf16``, ``decode/FORMAT``, ``pack/LAYOUT/BITS`` or ``unpack/LAYOUT/BITS``
    """
    threads: int = 0
    """PyTorch's threads; ml_dtypes, gfloat and the copy use one."""
    timed: dict[str, CallTimes] = {}
    missing: dict[str, str] = {}
    """Why an entry is missing: not installed, or without this function."""
    died: str = ""
    """Why the child process died, if it did; nothing is timed then."""

    def ratio(self, other: str) -> SpeedRatio | None:
        """Return how many times as fast as `other` this codec is, per element and round by round; None without it."""
        if OWN not in self.timed or other not in self.timed:
            return None
        own, theirs = self.timed[OWN], self.timed[other]
        low, median, high = _quartiles([
            (their_s / theirs.elements) / (own_s / own.elements)
            for own_s, their_s in zip(own.seconds, theirs.seconds, strict=True)
        ])
        return SpeedRatio(median, low, high)


def rows(only: Sequence[str], isolation: Isolation) -> list[str]:
    """Return the rows that match a glob of `only`, or all. Raise ValueError for a glob that matches none."""
    outcome = isolation.call("fpxbench.casts.codec_timing:every_row", timeout_s=_TIMEOUT_S)
    if outcome.value is None:
        raise RuntimeError(f"the codec could not be loaded: {outcome.failure.summary}\n{outcome.log_tail}".rstrip())
    known = outcome.read(list[str])
    for glob in only:
        if not any(fnmatchcase(row, glob) for row in known):
            raise ValueError(
                f"no row of the codec's speed table matches {glob!r}: they are like {known[0]} and {known[-1]}"
            )
    return [row for row in known if not only or any(fnmatchcase(row, glob) for glob in only)]


def measure_rows(
    asked: Sequence[str], isolation: Isolation, elements: int = ELEMENTS, budget_s: float = BUDGET_S,
    starting: Callable[[str], None] = lambda row: None,
) -> Iterator[SpeedRow]:
    """Yield each row, timed for about `budget_s` seconds on about `elements` elements. `starting` is called with each
    name first."""
    for row in asked:
        starting(row)
        outcome = isolation.call(MEASURE_ROW, row, elements, budget_s, timeout_s=_TIMEOUT_S)
        if outcome.value is None:
            yield SpeedRow(row=row, died=outcome.failure.summary)
        else:
            yield outcome.read(SpeedRow)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high

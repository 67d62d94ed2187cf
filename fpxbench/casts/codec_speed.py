"""How fast the codec and the packing are, beside others in one run: the rows of the table, and what each came to.

Imports no torch: the measure_rows themselves (`fpxbench.casts.codec_timing`) are held in the watched child.
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
"""The contender that only copies: as many bytes read and written in all, into fresh memory as everybody's are."""

K = 4096
ROWS_AT_LEAST = 64
"""Codes are [N, 4096], N a multiple of this, which every layout takes."""

ELEMENTS = 1 << 22
BUDGET_S = 0.5
_TIMEOUT_S = 120.0
MEASURE_ROW = "fpxbench.casts.codec_timing:measure_row"


class SpeedRatio(NamedTuple):
    """How many times as fast: the median over rounds, and the quartiles."""

    median: float
    low: float
    high: float


class CallTimes(BaseModel):
    """One contender's calls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    elements: int = Field(gt=0)
    """That a call works on; a slow contender gets fewer."""
    nbytes: int = Field(gt=0)
    """That a call has to read and to write, results included, at the least."""
    seconds: list[float] = Field(min_length=1)
    """Of each call, in the order of the rounds."""

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
        """Half the distance of the quartiles, as a part of the median."""
        low, median, high = _quartiles(self.seconds)
        return (high - low) / 2 / median


class SpeedRow(BaseModel):
    """One row of the table: everybody's calls took turns in the same process."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: str
    """``encode/FORMAT/fp32``, ``encode/FORMAT/bf16``, ``decode/FORMAT``, ``pack/LAYOUT/BITS`` or ``unpack/LAYOUT/BITS``"""
    threads: int = 0
    """PyTorch's; ml_dtypes, gfloat and the copy use one."""
    timed: dict[str, CallTimes] = {}
    missing: dict[str, str] = {}
    """Contenders that are not installed or do not do this, and why."""
    died: str = ""
    """What ended the child, if it ended; nothing is timed then."""

    def ratio(self, other: str) -> SpeedRatio | None:
        """How many times as fast as `other` this codec is, element for element, each round by itself; None without it."""
        if OWN not in self.timed or other not in self.timed:
            return None
        own, theirs = self.timed[OWN], self.timed[other]
        low, median, high = _quartiles([
            (their_s / theirs.elements) / (own_s / own.elements)
            for own_s, their_s in zip(own.seconds, theirs.seconds, strict=True)
        ])
        return SpeedRatio(median, low, high)


def rows(only: Sequence[str], isolation: Isolation) -> list[str]:
    """The rows that match a glob of `only`, all without one. Raises ValueError for a glob that matches none."""
    outcome = isolation.call("fpxbench.casts.codec_timing:every_row", timeout_s=_TIMEOUT_S)
    if outcome.value is None:
        raise RuntimeError(f"the codec could not be loaded: {outcome.verdict.summary}\n{outcome.log_tail}".rstrip())
    known = outcome.read(list[str])
    for glob in only:
        if not any(fnmatchcase(row, glob) for row in known):
            raise ValueError(f"no row of the codec's speed table matches {glob!r}: they are like {known[0]} and {known[-1]}")
    return [row for row in known if not only or any(fnmatchcase(row, glob) for glob in only)]


def measure_rows(
    asked: Sequence[str], isolation: Isolation, elements: int = ELEMENTS, budget_s: float = BUDGET_S,
    starting: Callable[[str], None] = lambda row: None,
) -> Iterator[SpeedRow]:
    """Hold the contest of each row, about `budget_s` seconds long, on about that many elements. `starting` hears of each first."""
    for row in asked:
        starting(row)
        outcome = isolation.call(MEASURE_ROW, row, elements, budget_s, timeout_s=_TIMEOUT_S)
        if outcome.value is None:
            yield SpeedRow(row=row, died=outcome.verdict.summary)
        else:
            yield outcome.read(SpeedRow)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high

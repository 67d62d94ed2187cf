"""The points of a series index as arrays, and their places in the arrays of panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fpxbench.records.record import Build
from fpxbench.regressions.series import Verdicts
from fpxbench.regressions.series_index import METRICS, Part

_TEXTS = "device", "build", "case", "source", "status", "kind", "message", "summary"
_VERDICT = ["status", "kind", "message"]


@dataclass(frozen=True)
class PanelLayout:
    """The places of one panel's points in its arrays. If two points have one place, the later one counts."""

    points: NDArray[np.intp]
    row: NDArray[np.int32]
    column: NDArray[np.int32]
    cases: list[int]
    """The case of each row."""
    builds: int

    def arranged(self, values: NDArray, missing: float) -> NDArray:
        """Arrange per-point values as [cases, builds]; `missing` elsewhere."""
        array = np.full((len(self.cases), self.builds), missing, dtype=values.dtype)
        array[self.row, self.column] = values[self.points]
        return array


@dataclass(frozen=True)
class Points:
    """An index with one point per row, in the order of recording. Columns of numbers are read one by one."""

    NUMBERS: ClassVar = ("outputs", "weights", "seed", *METRICS)

    parts: list[Part]
    devices: list[str]
    builds: list[Build]
    cases: list[str]
    verdicts: list[Verdicts]
    device: NDArray[np.int32]
    build: NDArray[np.int32]
    case: NDArray[np.int32]
    source: NDArray[np.int32]
    verdict: NDArray[np.int32]
    """Each point's index into these lists; the numbers in `source` only tell whether two sources are the same."""

    @classmethod
    def read(cls, parts: list[Part]) -> Points:
        """Read the text columns of an index."""
        frame = pl.concat([part.rows.select(_TEXTS) for part in parts]).collect()
        (devices, device), (texts, build), (cases, case), (_, source) = (
            _numbered(frame.get_column(name)) for name in _TEXTS[:4])
        verdicts, verdict = _numbered_verdicts(frame.select(_TEXTS[4:]))
        builds = [Build.model_validate_json(text) for text in texts]
        # A build may be described in several ways, with and without its date: the first one counts.
        identities = [(one.key, one.variant) for one in builds]
        same = {identity: number for number, identity in reversed(list(enumerate(identities)))}
        build = np.array([same[identity] for identity in identities], dtype=np.int32)[build]
        return cls(parts, devices, builds, cases, verdicts, device, build, case, source, verdict)

    def measured(self) -> list[tuple[int, int]]:
        """Return every pair of a device and a build measured on it, as indices."""
        count = len(self.builds)
        pairs = np.bincount(self.device.astype(np.intp) * count + self.build)
        return [divmod(pair, count) for pair in np.flatnonzero(pairs).tolist()]

    def layout(self, device: int, builds: list[int]) -> PanelLayout:
        """Return the layout of a device's points with these builds as columns."""
        place = np.full(len(self.builds), -1, dtype=np.int32)
        place[builds] = np.arange(len(builds))
        column = place[self.build]
        chosen = np.flatnonzero((self.device == device) & (column >= 0))
        case = self.case[chosen]
        present = np.bincount(case, minlength=len(self.cases)) > 0
        row = (np.cumsum(present, dtype=np.int32) - 1)[case]
        return PanelLayout(chosen, row, column[chosen], np.flatnonzero(present).tolist(), len(builds))

    def arranged(self, layouts: Sequence[PanelLayout], name: str) -> list[NDArray[np.float64]]:
        """Return a column of numbers as one array [cases, builds] per layout; NaN where a record has none."""
        column = pl.concat([part.rows.select(name) for part in self.parts]).collect().to_series()
        values = column.cast(pl.Float64).fill_null(np.nan).to_numpy()
        return [layout.arranged(values, np.nan) for layout in layouts]


def _numbered(column: pl.Series) -> tuple[list[str], NDArray[np.int32]]:
    """Return the distinct texts of a column, sorted, and each row's index into them."""
    distinct = column.unique()
    distinct = distinct.gather(distinct.cast(pl.String).arg_sort())
    codes = distinct.to_physical().to_numpy()
    place = np.zeros(int(codes.max(initial=0)) + 1, dtype=np.int32)
    place[codes] = np.arange(len(codes))
    return distinct.cast(pl.String).to_list(), place[column.to_physical().to_numpy()]


def _numbered_verdicts(frame: pl.DataFrame) -> tuple[list[Verdicts], NDArray[np.int32]]:
    """Return the distinct verdicts, each with its first summary, and each row's index into them."""
    firsts = frame.unique(_VERDICT, keep="first", maintain_order=True)
    factors = [_codes(frame, name).max(initial=0) + 1 for name in _VERDICT]

    def combined(rows: pl.DataFrame) -> NDArray[np.uint64]:
        total = np.zeros(len(rows), dtype=np.uint64)
        for name, factor in zip(_VERDICT, factors, strict=True):
            total = total * factor + _codes(rows, name)
        return total

    known = combined(firsts)
    order = np.argsort(known).astype(np.int32)
    return [Verdicts(*row) for row in firsts.iter_rows()], order[np.searchsorted(known[order], combined(frame))]


def _codes(frame: pl.DataFrame, name: str) -> NDArray[np.uint64]:
    return frame.get_column(name).to_physical().to_numpy().astype(np.uint64)

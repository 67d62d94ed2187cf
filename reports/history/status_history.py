"""Find since which build a case has had its status.

The series of all builds (`fpxbench.regressions.series`) have it, so the page of one build reads no other's records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fpxbench.builds.timeline import commit_hash
from fpxbench.counted import counted
from fpxbench.records.record import Build, Record
from fpxbench.records.verdict import BY_SEVERITY, Status
from fpxbench.regressions.series import Panel

RECENT = 12
"""Number of builds, up to the current one, whose status a cell of the matrix shows."""


@dataclass(frozen=True)
class StatusHistory:
    """How long a case has had its status on a build."""

    since: str
    """The tag of the first build of the unbroken run. Builds on which the case was not measured do not break it."""
    builds: int
    """Number of measured builds in that run, including this one."""
    before: Status | None
    """Its status on the build before `since`; None if `since` is the first build measured."""
    recent: tuple[Status | None, ...]
    """Its status on the last `RECENT` builds, oldest first; None where it was not measured."""
    history: str = ""
    """URL of the page of its series, relative to the site's root, if it has one."""

    @property
    def summary(self) -> str:
        """``since 2.12.0 (3 builds)``; empty for the only build there is."""
        if self.before is None and self.builds == 1:
            return ""
        since = "the first build measured" if self.before is None else self.since
        return f"since {since} ({counted(self.builds, 'build')})"


class StatusHistories:
    """The status history of every case of one machine on every build."""

    def __init__(self, panels: Iterable[Panel], histories: Mapping[tuple[str, str, str, str], str]) -> None:
        """Index the panels. `histories` : URLs of pages of series by device, variant, channel and case"""
        self._panels = {(panel.device, panel.variant, panel.channel): _StatusRuns(panel) for panel in panels}
        self._histories = histories
        self._keys: dict[Build, str] = {}

    def of(self, record: Record) -> StatusHistory | None:
        """Return the history of a record's case up to its build; None for a build that cannot be on the timeline."""
        runs, place, key = self._found(record)
        return runs.history(record.case.id, key, self._histories.get((*place, record.case.id), "")) if runs else None

    def tag(self, record: Record) -> str:
        """Return the tag of a record's build; empty for a build that cannot be on the timeline."""
        runs, _, key = self._found(record)
        return runs.tag(key) if runs else ""

    def links(self, stem: str) -> dict[str, str]:
        """Return the pages of series, by case, of the builds whose records file has this stem."""
        of_panel = {place for place, runs in self._panels.items() if runs.columns(stem)}
        return {case: link for (*place, case), link in sorted(self._histories.items()) if tuple(place) in of_panel}

    def state(self, stem: str) -> list[object]:
        """Return everything that `of` and `tag` return, except links, for the builds whose records file has this stem.
        """
        return [(place, runs.state(column)) for place, runs in sorted(self._panels.items())
                for column in runs.columns(stem)]

    def _found(self, record: Record) -> tuple[_StatusRuns | None, tuple[str, str, str], str]:
        build = record.build
        if build not in self._keys:
            self._keys[build] = commit_hash(build)
        place = f"{record.machine.device} ({record.machine.arch})", build.variant, build.channel
        return self._panels.get(place), place, self._keys[build]


class _StatusRuns:
    """For each case and build of a panel, the run of equal statuses that it belongs to."""

    def __init__(self, panel: Panel) -> None:
        self._panel = panel

    def columns(self, stem: str) -> list[int]:
        """Return the columns of builds whose records file has this stem."""
        return self._by_stem.get(stem, [])

    @cached_property
    def _by_stem(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for column, build in enumerate(self._panel.builds):
            found.setdefault(build.stem, []).append(column)
        return found

    def state(self, column: int) -> tuple[object, ...]:
        """Return everything that `history` returns for the cases of a build."""
        recent = self._panel.severity[:, max(0, column - RECENT + 1):column + 1]
        since = [self._panel.tags[start] if start >= 0 else "" for start in self._runs[0][:, column].tolist()]
        return (self._panel.tags[column], self._panel.cases, since, recent.tolist(),
                *(values[:, column].tolist() for values in self._runs[1:]))

    def tag(self, key: str) -> str:
        return self._panel.tags[self._panel.column[key]] if key in self._panel.column else ""

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arrays [cases, builds]: first build of the run, its length so far, and the status before it (-1: none)."""
        status = self._panel.severity
        start, length, before = (np.full(status.shape, -1, dtype=np.int32) for _ in range(3))
        last, began, count, earlier = (np.full(len(status), value) for value in (-1, 0, 0, -1))
        for column in range(status.shape[1]):
            now = status[:, column]
            measured = now >= 0
            continues = measured & (now == last)
            starts = measured & ~continues
            earlier = np.where(starts, last, earlier)
            began = np.where(starts, column, began)
            count = np.where(starts, 1, count + continues)
            last = np.where(measured, now, last)
            start[:, column], length[:, column], before[:, column] = began, count, earlier
        return start, length, before

    def history(self, case: str, key: str, history: str) -> StatusHistory | None:
        row, column = self._panel.row.get(case), self._panel.column.get(key)
        if row is None or column is None or self._panel.severity[row, column] < 0:
            return None
        start, length, before = (int(values[row, column]) for values in self._runs)
        recent = self._panel.severity[row, max(0, column - RECENT + 1):column + 1]
        return StatusHistory(
            self._panel.tags[start], length, None if before < 0 else BY_SEVERITY[before],
            tuple(None if status < 0 else BY_SEVERITY[status] for status in recent.tolist()), history)

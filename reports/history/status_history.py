"""Since when a case has had the status that it has: the matrix's axis in time.

Told from the digest of all builds (`fpxbench.regressions.series`), so that the page of one build reads no other's records.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fpxbench.builds.timeline import commit_hash
from fpxbench.records.record import Build, Record
from fpxbench.records.verdict import BY_SEVERITY, Status
from fpxbench.regressions.series import Panel

RECENT = 12
"""Builds, up to the one shown, of which a cell of the matrix shows the status."""


@dataclass(frozen=True)
class Standing:
    """How long a case has had the status that it has on a build."""

    since: str
    """The tag of the first build of which that is so without interruption. Builds on which it was not measured interrupt nothing."""
    builds: int
    """Measured ones from that build on, this one included."""
    before: Status | None
    """Its status on the build before; None where `since` is the first build measured."""
    recent: tuple[Status | None, ...]
    """On the last `RECENT` builds, oldest first; None where it was not measured."""
    history: str = ""
    """URL of the page of its series, relative to the site's root, if it has one."""

    @property
    def words(self) -> str:
        """``since 2.12.0 (3 builds)``; empty for the only build there is."""
        if self.before is None and self.builds == 1:
            return ""
        since = "the first build measured" if self.before is None else self.since
        return f"since {since} ({self.builds} {'build' if self.builds == 1 else 'builds'})"


class Standings:
    """The standing of every case of one machine on every build."""

    def __init__(self, panels: Iterable[Panel], histories: Mapping[tuple[str, str, str, str], str]) -> None:
        """`histories`: pages by device, variant, channel and case."""
        self._panels = {(panel.device, panel.variant, panel.channel): _Runs(panel) for panel in panels}
        self._histories = histories
        self._keys: dict[Build, str] = {}

    def of(self, record: Record) -> Standing | None:
        """None for a record whose build has no place in time."""
        runs, place, key = self._found(record)
        return runs.standing(record.case.id, key, self._histories.get((*place, record.case.id), "")) if runs else None

    def tag(self, record: Record) -> str:
        """That of its build; empty for one that has no place in time."""
        runs, _, key = self._found(record)
        return runs.tag(key) if runs else ""

    def _found(self, record: Record) -> tuple[_Runs | None, tuple[str, str, str], str]:
        build = record.build
        if build not in self._keys:
            self._keys[build] = commit_hash(build)
        place = f"{record.machine.device} ({record.machine.arch})", build.variant, build.channel
        return self._panels.get(place), place, self._keys[build]


class _Runs:
    """For each case and build of a panel: where the run of equal statuses began, and how many builds it has."""

    def __init__(self, panel: Panel) -> None:
        self._panel = panel

    def tag(self, key: str) -> str:
        return self._panel.tags[self._panel.column[key]] if key in self._panel.column else ""

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[cases, builds] each: the build at which the run began, its length so far, the status before it."""
        status = self._panel.severity
        start, length, before = (np.full(status.shape, -1) for _ in range(3))
        last, began, count, earlier = (np.full(len(status), value) for value in (-1, 0, 0, -1))
        for column in range(status.shape[1]):
            now = status[:, column]
            measured = now >= 0
            goes_on = measured & (now == last)
            begins = measured & ~goes_on
            earlier = np.where(begins, last, earlier)
            began = np.where(begins, column, began)
            count = np.where(begins, 1, count + goes_on)
            last = np.where(measured, now, last)
            start[:, column], length[:, column], before[:, column] = began, count, earlier
        return start, length, before

    def standing(self, case: str, key: str, history: str) -> Standing | None:
        row, column = self._panel.row.get(case), self._panel.column.get(key)
        if row is None or column is None or self._panel.severity[row, column] < 0:
            return None
        start, length, before = (int(values[row, column]) for values in self._runs)
        recent = self._panel.severity[row, max(0, column - RECENT + 1):column + 1]
        return Standing(
            self._panel.tags[start], length, None if before < 0 else BY_SEVERITY[before],
            tuple(None if status < 0 else BY_SEVERITY[status] for status in recent.tolist()), history)

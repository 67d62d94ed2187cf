"""The changes of each build on all machines: the list of builds, and a page for each."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote

import numpy as np

from fpxbench.builds.environments.installations import Installation
from fpxbench.builds.timeline import Entry, in_order
from fpxbench.records.record import Build
from fpxbench.records.verdict import BY_SEVERITY, Status
from fpxbench.regressions.change_report import Direction, MachineMove
from fpxbench.regressions.confirmation import upstream_range
from fpxbench.regressions.series import UNKNOWN_DAY, Panel
from fpxbench.reports.casts.conversion_pages import CastChanges, CastSweep
from fpxbench.reports.history.regression_groups import RegressionGroup


@dataclass(frozen=True)
class BuildMeasurement:
    """A build on one machine, for one variant."""

    machine: str
    """Name of its folder."""
    device: str
    variant: str
    triton: str | None
    counts: dict[Status, int]
    page: str
    """The sweep's page, relative to the site's root; empty if it has none."""


class MeasuredBuild(NamedTuple):
    """A build of a panel."""

    build: Build
    measurement: BuildMeasurement
    compared: bool
    """Whether an earlier build of its channel and variant was measured there."""


def measured_builds(panel: Panel, sweeps: Container[str]) -> list[MeasuredBuild]:
    """Return the builds of a panel. `sweeps` : names of the folders of builds that have a page."""
    found = []
    for column, build in enumerate(panel.builds):
        places = panel.severity[:, column]
        counts = {BY_SEVERITY[place]: count for place, count in enumerate(np.bincount(places[places >= 0]).tolist())
                  if count}
        page = f"machines/{quote(panel.machine)}/{quote(build.stem)}/index.html" if build.stem in sweeps else ""
        measurement = BuildMeasurement(panel.machine, panel.device, panel.variant, build.triton, counts, page)
        found.append(MeasuredBuild(build, measurement, column > 0))
    return found


@dataclass(frozen=True)
class FailedInstallation:
    """An installation that failed."""

    where: str
    variant: str
    when: str
    why: str
    log_tail: str


@dataclass
class BuildPage:
    """The page of one build and its changes."""

    entry: Entry
    measured: list[BuildMeasurement] = field(default_factory=list)
    compared: bool = False
    """Whether some machine also measured an earlier build of its channel and variant."""
    groups: list[RegressionGroup] = field(default_factory=list)
    """Changes that began with this build, worst first."""
    moves: list[MachineMove] = field(default_factory=list)
    has_casts: bool = False
    """Whether some machine checked its casts."""
    conversions: list[tuple[CastSweep, CastChanges]] = field(default_factory=list)
    """Casts that differ from the build before."""
    failed_installations: list[FailedInstallation] = field(default_factory=list)
    earlier: BuildPage | None = field(default=None, repr=False)
    """The build before it of the same channel."""

    @property
    def tag(self) -> str:
        return self.entry.tag

    @property
    def page(self) -> str:
        """Path of the page, relative to the site's root, as are all links."""
        return f"builds/{self.tag}.html"

    @property
    def url(self) -> str:
        return quote(self.page)

    @property
    def upstream(self) -> str:
        """URL of the commits since the build before; may be empty."""
        return upstream_range(self.earlier.entry, self.entry) or "" if self.earlier else ""

    @property
    def tritons(self) -> list[str]:
        """Triton versions measured with it, on all machines."""
        return sorted({one for one in (self.entry.own_triton, *(each.triton for each in self.measured)) if one})

    @property
    def notes(self) -> list[str]:
        """Notes for the list of builds, next to the counts."""
        variants = sorted({failed.variant for failed in self.failed_installations})
        notes = [f"did not install for {', '.join(variants)}"] if variants else []
        if self.conversions or self.has_casts and not self.measured:
            notes.append("casts changed" if self.conversions else "no sweep, casts only")
        return notes + ["the machine, or dense, changed"] * bool(self.moves)

    def count(self, direction: Direction) -> int:
        """Return the number of changes in that direction."""
        return sum(len(group.lines) for group in self.of(direction))

    def of(self, direction: Direction) -> list[RegressionGroup]:
        return [group for group in self.groups if group.first.direction is direction]


class BuildPages:
    """Collects the results of each build, machine by machine."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        """Group records by build; `entries` are the timeline's."""
        self._entries = {entry.key: entry for entry in entries}
        self._pages: dict[str, BuildPage] = {}

    def _page(self, build: Build) -> BuildPage | None:
        """Return the page of a build; None if it cannot be on the timeline, since records may come from anywhere."""
        try:
            entry = Entry.of(build, UNKNOWN_DAY)
        except ValueError:
            return None
        key = entry.key
        self._entries[key] = self._entries[key].merge(entry) if key in self._entries else entry
        return self._pages.setdefault(key, BuildPage(entry))

    def add_requested(self, build: Build, group: RegressionGroup) -> None:
        """Add a confirmation that was requested by hand; `build` must fit the timeline."""
        page = self._page(build)
        assert page is not None
        page.groups.append(group)

    def add_measured(self, measured: Iterable[MeasuredBuild], groups: Iterable[RegressionGroup],
                     moves: Iterable[MachineMove]) -> None:
        """Add the builds measured on one machine, and their changes."""
        for one in measured:
            known = self._page(one.build)
            if known is not None:
                known.measured.append(one.measurement)
                known.compared |= one.compared
        # A build that cannot be on the timeline has no page.
        for group in groups:
            if group.first.since_key in self._pages:
                self._pages[group.first.since_key].groups.append(group)
        for move in moves:
            if move.first.key in self._pages:
                self._pages[move.first.key].moves.append(move)

    def add_casts(self, casts: CastSweep, changes: CastChanges | None) -> None:
        page = self._page(casts.build)
        if page is None:
            return
        page.has_casts = True
        if changes is not None and changes.changes:
            page.conversions.append((casts, changes))

    def add_installations(self, installations: Iterable[Installation]) -> None:
        """Add the failed installations among `installations`, and those that only the timeline notes."""
        known = set()
        for one in installations:
            page = self._page(one.build)
            if page is not None:
                known.add((page.entry.key, one.build.variant))
                if one.status == "failed":
                    page.failed_installations.append(FailedInstallation(
                        f"{one.machine.name}, {one.id}", one.build.variant, one.at, one.why, one.log_tail))
        for entry in list(self._entries.values()):
            for variant, failure in entry.failures.items():
                if (entry.key, variant) not in known:
                    page = self._pages.setdefault(entry.key, BuildPage(entry))
                    page.failed_installations.append(FailedInstallation("", variant, failure.day, "", failure.log_tail))

    def in_order(self) -> list[BuildPage]:
        """Return the pages, oldest build first."""
        last: dict[str, BuildPage] = {}
        found = []
        for entry in in_order(self._entries.values()):
            page = self._pages.get(entry.key)
            if page is None:
                continue
            page.entry, page.earlier = entry, last.get(entry.channel)
            page.groups.sort(key=lambda group: (list(Direction).index(group.first.direction), group.first.rank))
            last[entry.channel] = page
            found.append(page)
        return found

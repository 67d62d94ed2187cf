"""Write the pages about more than one build: regressions, their series, and the changes of each build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from fpxbench.builds.environments.installations import Installation
from fpxbench.builds.timeline import Entry, Timeline
from fpxbench.records.record import Build
from fpxbench.records.store import Store, latest
from fpxbench.regressions.change_report import MachineMove
from fpxbench.regressions.confirmation import Confirmation
from fpxbench.regressions.result_changes import PanelChanges, by_suspect, changes_of_machine
from fpxbench.reports.casts.conversion_pages import CastChanges, CastSweep
from fpxbench.reports.history.build_pages import BuildPages, MeasuredBuild, measured_builds
from fpxbench.reports.history.regression_groups import (
    RegressionGroup,
    group_lines,
    regression_lines,
    regression_problems,
    requested_line,
    summarize,
    with_pages,
    with_sparklines,
)
from fpxbench.reports.history.series_pages import series_pages
from fpxbench.reports.history.status_history import StatusHistories
from fpxbench.reports.pages import Pages
from fpxbench.reports.sweep.case_row import page_of_id
from fpxbench.reports.sweep.problems import ReportProblem

BUILDS_IN_FULL = 10
"""Number of builds of each machine, channel and variant with a page for every case; a page per case and night would
add up to millions."""


@dataclass(frozen=True)
class MachineHistory:
    """Changes on one machine, without its series."""

    troubles: list[str]
    older: int
    """Number of sweeps without a page of their own."""
    measured: list[MeasuredBuild] = field(default_factory=list)
    groups: list[RegressionGroup] = field(default_factory=list)
    moves: list[MachineMove] = field(default_factory=list)


@dataclass(frozen=True)
class HistoryInputs:
    """Inputs that the series of all machines share."""

    results: Path
    entries: list[Entry]
    """The entries of the timeline."""
    confirmations: dict[str, Confirmation]
    """Confirmations by suspect."""
    in_full: int
    """Number of newest builds of each machine, channel and variant with a page for every case."""

    def of_machine(self, machine: str, paths: Iterable[Path], pages: Pages,
                   ) -> tuple[MachineHistory, list[Path], StatusHistories]:
        """Write the pages of a machine's series. Return its changes, the records files that get pages, and the status
        histories of their cases."""
        of_machine, troubles = changes_of_machine(self.results, machine, self.confirmations, self.entries)
        known = {build.stem for one in of_machine for build in one.panel.builds}
        full = {build.stem for one in of_machine for build in one.panel.builds[-self.in_full:]}
        shown = [path for path in paths if path.stem in full or path.stem not in known]
        history = MachineHistory(troubles, len(known - full))
        links: dict[tuple[str, str, str, str], str] = {}
        for one in of_machine:
            panel = one.panel
            links |= {(panel.device, panel.variant, panel.channel, case): quote(page)
                      for case, page in self._write(one, full, pages, history).items()}
        return history, shown, StatusHistories((one.panel for one in of_machine), links)

    def _write(self, one: PanelChanges, full: set[str], pages: Pages, history: MachineHistory) -> dict[str, str]:
        """Write the pages of a panel's series, and return them by case."""
        lines, by_case = with_pages(one.panel, regression_lines(one))

        def page_of(build: Build, case: str) -> str:
            if build.stem not in full:
                return ""
            return f"machines/{quote(one.panel.machine)}/{quote(build.stem)}/{quote(page_of_id(case))}"

        for series in series_pages(one, lines, self.confirmations, by_case, page_of):
            pages.write(series.page, pages.series, series)
        history.measured.extend(measured_builds(one.panel, full))
        history.groups.extend(with_sparklines(one.panel, group_lines(lines)))
        history.moves.extend(one.moves)
        return by_case


class HistoryChapter:
    """Collects the changes machine by machine, and writes the pages about all machines."""

    def __init__(self, results: Path, timeline: Timeline | None, pages: Pages, in_full: int) -> None:
        """Read timeline and confirmations. Raise TimelineError if the timeline cannot be read."""
        self._results, self._pages = results, pages
        entries = timeline.entries() if timeline else []
        self._builds = BuildPages(entries)
        self._groups: list[RegressionGroup] = []
        self._moves: list[MachineMove] = []
        self._confirmations, broken = Store(results, Confirmation).read_all()
        self._troubles = [str(line) for line in broken]
        self.inputs = HistoryInputs(results, entries, by_suspect(self._confirmations), in_full)
        self.older: Counter[str] = Counter()
        """Number of sweeps without a page of their own, by machine."""

    def add(self, machine: str, history: MachineHistory) -> None:
        """Add the changes on one machine."""
        self._troubles += history.troubles
        self.older[machine] = history.older
        self._builds.add_measured(history.measured, history.groups, history.moves)
        self._groups += history.groups
        self._moves += history.moves

    def problems(self, broken: Container[tuple[str, str]]) -> list[ReportProblem]:
        """Return the problems for the first page, except those of `broken` cases (machine, id), which have their own.
        """
        return regression_problems(self._groups, broken)

    def write_rest(self, casts: Iterable[tuple[CastSweep, CastChanges | None]], known: set[str]) -> list[str]:
        """Write the pages of regressions and builds, after all machines. Return messages about the records that are not
        in `known`."""
        for sweep, changes in casts:
            self._builds.add_casts(sweep, changes)
        installations, broken = Store(self._results, Installation).read_all()
        self._builds.add_installations(latest(installations))
        for confirmation in latest(self._confirmations):
            if not confirmation.suspect:
                self._add_asked(confirmation)
        troubles = [trouble for trouble in (*self._troubles, *map(str, broken)) if trouble not in known]
        builds = self._builds.in_order()
        self._groups.sort(key=lambda group: group.rank)
        summary = summarize(self._groups, self._moves, len(builds), sum(build.compared for build in builds))
        self._pages.write("regressions.html", self._pages.regressions, summary, troubles)
        self._pages.write("builds.html", self._pages.builds, builds)
        for build in builds:
            self._pages.write(build.page, self._pages.build, build)
        return troubles

    def _add_asked(self, confirmation: Confirmation) -> None:
        try:
            [group] = group_lines([requested_line(confirmation)])
        except ValueError:
            self._troubles.append(
                f"a confirmation on {confirmation.machine.name} is about PyTorch {confirmation.good.torch} and "
                f"{confirmation.build.torch}, one of which cannot be on the timeline: left out")
            return
        self._builds.add_requested(confirmation.build, group)
        self._groups.append(group)

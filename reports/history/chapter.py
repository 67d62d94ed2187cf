"""Pages about more than one build: regressions, the series behind them, and what each build changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from fpxbench.builds.environments.installations import Installation
from fpxbench.builds.timeline import Timeline
from fpxbench.records.record import Build
from fpxbench.records.store import Store, latest
from fpxbench.regressions.change_report import MachineMove
from fpxbench.regressions.confirmation import Confirmation
from fpxbench.regressions.result_changes import PanelChanges, by_suspect, changes_by_machine
from fpxbench.reports.casts.conversion_pages import CastChanges, CastSweep
from fpxbench.reports.history.build_pages import BuildPages
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
from fpxbench.reports.sweep.problems import ReportProblem
from fpxbench.reports.sweep.sweep_table import page_of_id

BUILDS_IN_FULL = 10
"""Builds of each machine, channel and variant with a page for every case: for every night, years of nightlies would
make millions."""


class HistoryChapter:
    """Collects changes machine after machine, one in memory at a time, and writes their pages."""

    def __init__(self, results: Path, timeline: Timeline | None, pages: Pages, in_full: int,
                 say: Callable[[str], None]) -> None:
        self._say = say
        self._results, self._timeline, self._pages, self._in_full = results, timeline, pages, in_full
        self._builds = BuildPages(timeline.entries() if timeline else ())
        self._groups: list[RegressionGroup] = []
        self._moves: list[MachineMove] = []
        self._confirmations, broken = Store(results, Confirmation).read_all()
        self._troubles = [str(line) for line in broken]
        self.older: Counter[str] = Counter()
        """Sweeps without a page of their own, by machine."""

    def machines(self, files: Iterable[Path]) -> Iterator[tuple[list[Path], StatusHistories]]:
        """Yield for each machine the records files that get pages, and the status histories of their cases. Write the
        pages of its series."""
        confirmations = by_suspect(self._confirmations)
        paths: dict[str, list[Path]] = {}
        for path in files:
            paths.setdefault(path.parent.parent.name, []).append(path)
        for machine in Store(self._results).machines():
            self._say(f"{machine}: changes from build to build")
            [(of_machine, troubles)] = changes_by_machine(self._results, confirmations, self._timeline, machine)
            self._troubles += troubles
            known = {build.stem for one in of_machine for build in one.panel.builds}
            full = {build.stem for one in of_machine for build in one.panel.builds[-self._in_full:]}
            shown = [path for path in paths[machine] if path.stem in full or path.stem not in known]
            self.older[machine] = len(known - full)
            links: dict[tuple[str, str, str, str], str] = {}
            for one in of_machine:
                panel = one.panel
                of_panel = self._of_panel(one, confirmations, full)
                links |= {(panel.device, panel.variant, panel.channel, case): quote(page)
                          for case, page in of_panel.items()}
            yield shown, StatusHistories((one.panel for one in of_machine), links)

    def _of_panel(self, one: PanelChanges, confirmations: dict[str, Confirmation], full: set[str]) -> dict[str, str]:
        """Write the pages of a panel's series, and return them by case."""
        lines, pages = with_pages(one.panel, regression_lines(one))
        groups = with_sparklines(one.panel, group_lines(lines))

        def page_of(build: Build, case: str) -> str:
            page = f"machines/{quote(one.panel.machine)}/{quote(build.stem)}/{quote(page_of_id(case))}"
            return page if build.stem in full else ""

        for series in series_pages(one, lines, confirmations, pages, page_of):
            self._pages.write(series.page, self._pages.series, series)
        self._builds.add_examined(one, groups, full)
        self._groups += groups
        self._moves += one.moves
        return pages

    def problems(self, broken: Container[tuple[str, str]]) -> list[ReportProblem]:
        """Return the problems of the first page; `broken` cases, by machine and id, have theirs already."""
        return regression_problems(self._groups, broken)

    def write_rest(self, casts: Iterable[tuple[CastSweep, CastChanges | None]], known: set[str]) -> list[str]:
        """Write the page of regressions and those of the builds, after every machine. Return messages about the
        records, without those in `known`."""
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
                f"{confirmation.build.torch}, one of which "
                                  "has no place on the timeline: left out")
            return
        self._builds.add_requested(confirmation.build, group)
        self._groups.append(group)

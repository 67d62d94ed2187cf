"""The pages that are about more than one build: regressions, the series behind them, and what each build changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

from fpxbench.builds.environments.installations import Installation
from fpxbench.builds.timeline import Timeline
from fpxbench.records.record import Build
from fpxbench.records.store import Store, latest
from fpxbench.regressions.confirmation import Confirmation
from fpxbench.regressions.examination import Examined, by_suspect, examine
from fpxbench.regressions.series_index import machines
from fpxbench.regressions.suspect import MachineMove
from fpxbench.reports.casts.conversion_pages import Judged, Since
from fpxbench.reports.history.build_pages import Builds
from fpxbench.reports.history.regression_groups import (
    Group,
    by_hand,
    drawn,
    findings_on,
    grouped,
    lines_of,
    summary_of,
    with_pages,
)
from fpxbench.reports.history.series_pages import histories
from fpxbench.reports.history.status_history import Standings
from fpxbench.reports.pages import Pages, write_page
from fpxbench.reports.sweep.problems import Finding
from fpxbench.reports.sweep.table import page_of_id

BUILDS_IN_FULL = 10
"""Builds of each machine, channel and variant of which every case has a page: with a page for each case and night, years of nightlies
would be millions."""


class OverTime:
    """Goes through the machines once, one in memory at a time; what is kept of each is what its pages say."""

    def __init__(self, results: Path, timeline: Timeline | None, pages: Pages, output: Path, in_full: int, say: Callable[[str], None]) -> None:
        self._say = say
        self._results, self._timeline, self._pages, self._output, self._in_full = results, timeline, pages, output, in_full
        self._builds = Builds(timeline.entries() if timeline else ())
        self._groups: list[Group] = []
        self._moves: list[MachineMove] = []
        self._confirmations, broken = Store(results, Confirmation).read_all()
        self._troubles = [str(line) for line in broken]
        self.older: Counter[str] = Counter()
        """By machine, sweeps that have no page of their own."""

    def machines(self, files: Iterable[Path]) -> Iterator[tuple[list[Path], Standings]]:
        """For each machine the records files that get pages of their own, and since when their cases are what they are. Writes the
        pages of its series."""
        looks = by_suspect(self._confirmations)
        paths: dict[str, list[Path]] = {}
        for path in files:
            paths.setdefault(path.parent.parent.name, []).append(path)
        for machine in machines(self._results):
            self._say(f"{machine}: what its builds changed")
            [(of_machine, troubles)] = examine(self._results, looks, self._timeline, machine)
            self._troubles += troubles
            known = {build.stem for one in of_machine for build in one.panel.builds}
            full = {build.stem for one in of_machine for build in one.panel.builds[-self._in_full:]}
            shown = [path for path in paths[machine] if path.stem in full or path.stem not in known]
            self.older[machine] = len(known - full)
            links: dict[tuple[str, str, str, str], str] = {}
            for one in of_machine:
                panel = one.panel
                of_panel = self._of_panel(one, looks, full)
                links |= {(panel.device, panel.variant, panel.channel, case): quote(page) for case, page in of_panel.items()}
            yield shown, Standings((one.panel for one in of_machine), links)

    def _of_panel(self, one: Examined, looks: dict[str, Confirmation], full: set[str]) -> dict[str, str]:
        """Writes the pages of a panel's series, and returns them by case."""
        lines, pages = with_pages(one.panel, lines_of(one))
        groups = drawn(one.panel, grouped(lines))

        def page_of(build: Build, case: str) -> str:
            return f"machines/{quote(one.panel.machine)}/{quote(build.stem)}/{quote(page_of_id(case))}" if build.stem in full else ""

        for history in histories(one, lines, looks, pages, page_of):
            write_page(self._output / history.page, self._pages.history(history))
        self._builds.saw(one, groups, full)
        self._groups += groups
        self._moves += one.moves
        return pages

    def findings(self, broken: Container[tuple[str, str]]) -> list[Finding]:
        """Sentences for the overview, on which the `broken` cases have theirs already."""
        return findings_on(self._groups, broken)

    def write_rest(self, judged: Iterable[tuple[Judged, Since | None]], told: set[str]) -> list[str]:
        """Writes the page of regressions and those of the builds, once every machine has been gone through; returns what is to be known of
        the records beyond what was `told`."""
        for one, since in judged:
            self._builds.converted(one, since)
        installations, broken = Store(self._results, Installation).read_all()
        self._builds.installed(latest(installations))
        for look in latest(self._confirmations):
            if not look.suspect:
                self._add_asked(look)
        troubles = [trouble for trouble in (*self._troubles, *map(str, broken)) if trouble not in told]
        builds = self._builds.in_order()
        self._groups.sort(key=lambda group: group.rank)
        summary = summary_of(self._groups, self._moves, len(builds), sum(build.compared for build in builds))
        write_page(self._output / "regressions.html", self._pages.regressions(summary, troubles))
        write_page(self._output / "builds.html", self._pages.builds(builds))
        for build in builds:
            write_page(self._output / build.page, self._pages.build(build))
        return troubles

    def _add_asked(self, look: Confirmation) -> None:
        try:
            [group] = grouped([by_hand(look)])
        except ValueError:
            self._troubles.append(f"a confirmation on {look.machine.name} is about PyTorch {look.good.torch} and {look.build.torch}, of which one can have "
                                  "no place in time: left out")
            return
        self._builds.asked(look.build, group)
        self._groups.append(group)

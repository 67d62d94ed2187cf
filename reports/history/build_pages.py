"""What each build changed, over all machines: the list of builds, and a page for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import quote

from fpxbench.builds.environments.installations import Installation
from fpxbench.builds.timeline import Entry, in_order
from fpxbench.records.record import Build
from fpxbench.records.verdict import BY_SEVERITY, Status
from fpxbench.regressions.confirmation import upstream_range
from fpxbench.regressions.examination import Examined
from fpxbench.regressions.series import UNKNOWN_DAY
from fpxbench.regressions.suspect import Direction, MachineMove
from fpxbench.reports.casts.conversion_pages import Judged, Since
from fpxbench.reports.history.regression_groups import Group


@dataclass(frozen=True)
class Measured:
    """A build on one machine, for one variant."""

    machine: str
    """Name of its folder."""
    device: str
    variant: str
    triton: str | None
    counts: dict[Status, int]
    page: str
    """The sweep's, relative to the site's root; empty where it has none."""


@dataclass(frozen=True)
class Refusal:
    """An installation that did not succeed."""

    where: str
    variant: str
    when: str
    why: str
    log_tail: str


@dataclass
class BuildPage:
    """One build and what is known of it."""

    entry: Entry
    measured: list[Measured] = field(default_factory=list)
    compared: bool = False
    """It was measured where an earlier build was, of the same channel and variant."""
    groups: list[Group] = field(default_factory=list)
    """Changes of which it is the first build, worst first."""
    moves: list[MachineMove] = field(default_factory=list)
    judged: bool = False
    """What its casts do is known, of one machine or more."""
    conversions: list[tuple[Judged, Since]] = field(default_factory=list)
    """Casts that are other than in the build before."""
    refusals: list[Refusal] = field(default_factory=list)
    earlier: BuildPage | None = field(default=None, repr=False)
    """The one before of the same channel."""

    @property
    def tag(self) -> str:
        return self.entry.tag

    @property
    def page(self) -> str:
        """Relative to the site's root, as are all links."""
        return f"builds/{self.tag}.html"

    @property
    def url(self) -> str:
        return quote(self.page)

    @property
    def upstream(self) -> str:
        """Where the commits since the build before can be read."""
        return upstream_range(self.earlier.entry, self.entry) or "" if self.earlier else ""

    @property
    def tritons(self) -> list[str]:
        """Beside it, on whichever machine."""
        return sorted({one.triton for one in self.measured if one.triton} | ({self.entry.own_triton} - {None}))

    @property
    def besides(self) -> list[str]:
        """What the list says of it beyond counts."""
        refused = sorted({refusal.variant for refusal in self.refusals})
        said = [f"did not install for {', '.join(refused)}"] if refused else []
        casts = "casts changed" if self.conversions else "no sweep, casts judged"
        return said + [casts] * bool(self.conversions or self.judged and not self.measured) + ["the machine, or dense, moved"] * bool(self.moves)

    def count(self, direction: Direction) -> int:
        """Findings of that direction."""
        return sum(len(group.lines) for group in self.groups if group.first.direction is direction)

    def of(self, direction: Direction) -> list[Group]:
        return [group for group in self.groups if group.first.direction is direction]


class Builds:
    """Collects what is known of each build, machine after machine."""

    def __init__(self, held: Iterable[Entry]) -> None:
        """`held`: the timeline's."""
        self._entries = {entry.key: entry for entry in held}
        self._pages: dict[str, BuildPage] = {}

    def _page(self, build: Build) -> BuildPage | None:
        """None for a build that can have no place in time: a record's from elsewhere."""
        try:
            entry = Entry.of(build, UNKNOWN_DAY)
        except ValueError:
            return None
        key = entry.key
        self._entries[key] = self._entries[key].merge(entry) if key in self._entries else entry
        return self._pages.setdefault(key, BuildPage(entry))

    def asked(self, build: Build, group: Group) -> None:
        """What somebody asked about and was told of `build`, which can have a place in time."""
        self._page(build).groups.append(group)

    def saw(self, one: Examined, groups: Iterable[Group], sweeps: Iterable[str]) -> None:
        """What a panel says of its builds; `sweeps`: names of the builds' folders that have a page."""
        panel, sweeps = one.panel, set(sweeps)
        for column, build in enumerate(panel.builds):
            places, counts = panel.severity[:, column], {}
            for place in sorted(set(places[places >= 0].tolist())):
                counts[BY_SEVERITY[place]] = int((places == place).sum())
            page = f"machines/{quote(panel.machine)}/{quote(build.stem)}/index.html" if build.stem in sweeps else ""
            known = self._page(build)
            known.measured.append(Measured(panel.machine, panel.device, panel.variant, build.triton, counts, page))
            known.compared |= column > 0
        for group in groups:
            self._pages[group.first.since_key].groups.append(group)
        for move in one.moves:
            self._pages[move.first.key].moves.append(move)

    def converted(self, judged: Judged, since: Since | None) -> None:
        page = self._page(judged.build)
        if page is None:
            return
        page.judged = True
        if since is not None and since.changes:
            page.conversions.append((judged, since))

    def installed(self, installations: Iterable[Installation]) -> None:
        """What did not install: by these, and by the timeline's own notes where they say nothing."""
        told = set()
        for one in installations:
            page = self._page(one.build)
            if page is not None:
                told.add((page.entry.key, one.build.variant))
                if one.status == "failed":
                    page.refusals.append(Refusal(f"{one.machine.name}, {one.id}", one.build.variant, one.at, one.why, one.log_tail))
        for entry in list(self._entries.values()):
            for variant, failure in entry.failures.items():
                if (entry.key, variant) not in told:
                    page = self._pages.setdefault(entry.key, BuildPage(entry))
                    page.refusals.append(Refusal("", variant, failure.day, "", failure.log_tail))

    def in_order(self) -> list[BuildPage]:
        """Oldest first."""
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

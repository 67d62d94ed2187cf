"""What changed from build to build, as the pages tell it: findings in words, those of one cause together, worst first.

The rule behind them is docs/decision-rule.md; § marks its sections here and on the pages.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote

from fpxbench.builds.timeline import Entry
from fpxbench.records.case import split_id
from fpxbench.regressions.confirmation import Confirmation, upstream_range
from fpxbench.regressions.events import FIGURES, RECENT
from fpxbench.regressions.examination import Examined
from fpxbench.regressions.series import UNKNOWN_DAY, Panel
from fpxbench.regressions.suspect import Direction, Event, MachineMove, State, Suspect
from fpxbench.reports.history.sparkline import Spark, spark_of
from fpxbench.reports.sweep.problems import REGRESSED, SUSPECTED, Finding

RECENT_BUILDS = 30
"""What is over, or is no regression, has a page of its series while it is no older than so many builds."""
MOST_SERIES = 200
"""Pages of series for each machine, channel and variant, the worst first: what nobody has looked at for years must not fill a disk."""

STATES: dict[State, str] = {
    State.CONFIRMED: "Both builds were run again, in turn, and differ (Confirmation). It stands on the newest build.",
    State.OPEN: "Seen in the records, and nobody has looked again. A verdict or an exact figure is what it is said to be (§8); a time is a "
                "suspicion, and about one a year in each case is noise (§3).",
    State.UNDECIDED: "Both builds were run again, and the answer is not clear within the time allowed (Confirmation).",
    State.FIXED: "A later build changed back: the time stepped the other way (§6), the verdict is no worse than before, or the figure is "
                 "nearer to what it was (§8).",
    State.REFUTED: "Both builds were run again, and do not differ (Confirmation). The series goes on as if nothing had been said (§6).",
}
"""What each state means, in the order in which the page has them."""


@dataclass(frozen=True)
class Line:
    """One finding, as pages list it."""

    id: str
    state: State
    direction: Direction
    machine: str
    """Name of its folder."""
    device: str
    channel: str
    variant: str
    case: str
    metric: str
    what: str
    """``+6.1% [5.2, 7.0] time``, ``ok → crash (compiler_abort): …``."""
    since: str
    since_key: str
    before: str
    """Tags: the first build after the change, and the last one before."""
    last_seen: str
    """The tag of the build on which it was over, if it is."""
    evidence: tuple[str, ...]
    said: str
    """What a second look said; empty before there is one."""
    between: tuple[str, ...]
    """Tags of the two builds to bisect between; nothing where it lies between neighbours for sure."""
    upstream: str
    """Where the commits between the two builds can be read, if they say which they are of."""
    cause: tuple[str, ...]
    """Findings that share it are told in one."""
    size: float
    """Larger is worse, within one metric."""
    page: str = ""
    """URL of its series' page, relative to the site's root, if it has one."""
    spark: Spark | None = None

    @property
    def implementation(self) -> str:
        return self.case.partition("/")[0]

    @property
    def words(self) -> str:
        """The figure's name."""
        return {"median_us": "time", "verdict": "verdict"}.get(self.metric) or FIGURES[self.metric].words

    @property
    def stands(self) -> bool:
        return self.state not in (State.REFUTED, State.FIXED)

    @property
    def rank(self) -> tuple:
        """Verdicts before times before figures; worse ones first."""
        metrics = ["verdict", "median_us", *FIGURES]
        return list(STATES).index(self.state), metrics.index(self.metric), -self.size, self.case


@dataclass(frozen=True)
class Group:
    """Findings of one implementation on one machine that began with one build in one way; the worst first."""

    lines: tuple[Line, ...]

    @property
    def first(self) -> Line:
        return self.lines[0]

    @property
    def rank(self) -> tuple:
        """Worst first: by its worst; of equals, what hits the most cases."""
        return *self.first.rank[:3], -len(self.lines), self.first.case


def lines_of(one: Examined) -> list[Line]:
    """Every finding of a panel, in the order of the builds."""
    return [_line(one.panel, finding) for finding in (*one.suspects, *one.events)]


def _line(panel: Panel, finding: Suspect | Event) -> Line:
    series = finding.series
    what, evidence, cause, size = _of_suspect(finding) if isinstance(finding, Suspect) else _of_event(finding)
    if finding.implementation_changed:
        evidence.append("the implementation's own source changed too, so that it may be that and not PyTorch (§7)")
    implementation = series.case.partition("/")[0]
    machine = panel.machine
    between = (panel.tag_of(finding.surely_good), panel.tag_of(finding.raised_at)) if isinstance(finding, Suspect) else ()
    return Line(
        id=finding.id, state=finding.state, direction=finding.direction, machine=machine, device=series.device, channel=series.channel,
        variant=series.variant, case=series.case, metric=series.metric, what=what, since=finding.first_bad_tag,
        since_key=finding.first_bad.key, before=finding.last_good_tag, last_seen=panel.tag_of(finding.ended_at) if finding.ended_at else "",
        evidence=tuple(evidence), said=finding.said, between=between, upstream=upstream_range(finding.last_good, finding.first_bad) or "",
        cause=(implementation, machine, series.device, series.channel, series.variant, finding.first_bad.key, series.metric,
               str(finding.state), str(finding.direction), *cause),
        size=size,
    )


def _of_suspect(suspect: Suspect) -> tuple[str, list[str], tuple[str, ...], float]:
    low, high = (f"{100 * end:+.1f}" for end in suspect.interval)
    evidence = [f"seen in {suspect.builds_after} builds after {suspect.builds_before} (§3)",
                f"{abs(suspect.z):.1f} standard errors at a noise of {suspect.noise:.1%} a build"]
    if suspect.control is not None:
        evidence.append(f"the dense product of the same runs: {suspect.control:+.1%} (§5)")
    return f"{suspect.change:+.1%} [{low}, {high}] time", evidence, (), abs(suspect.change)


def _of_event(event: Event) -> tuple[str, list[str], tuple[str, ...], float]:
    words = "" if event.series.metric == "verdict" else f"{FIGURES[event.series.metric].words} "
    times = "once" if event.changes_before == 1 else f"{event.changes_before} times"
    evidence = [f"it changed {times} in the {RECENT} builds before (§8)"] if event.changes_before else []
    cause = tuple(re.sub(r"\d+", "#", text.partition(":")[0]) for text in (event.before, event.after)) if not words else ()
    return f"{words}{event.before} → {event.after}", evidence, cause, -float(event.severity)


def grouped(lines: Iterable[Line]) -> list[Group]:
    """Those of one cause together, worst first."""
    groups: dict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.cause].append(line)
    found = [Group(tuple(sorted(group, key=lambda line: (not line.page, line.rank)))) for group in groups.values()]
    return sorted(found, key=lambda group: group.rank)


def by_hand(look: Confirmation) -> Line:
    """A confirmation of what no rule had found: somebody asked. Raises ValueError if one of its builds can have no place in time."""
    good, bad = (Entry.of(build, UNKNOWN_DAY) for build in (look.good, look.build))
    return Line(
        id=hashlib.sha256(look.id.encode()).hexdigest()[:10], state=State(look.outcome), direction=Direction(look.direction),
        machine=look.machine.name, device=f"{look.machine.device} ({look.machine.arch})", channel=look.build.channel,
        variant=look.build.variant, case=look.case.id, metric="verdict" if look.metric == "verdict" else "median_us", what=look.said,
        since=bad.tag, since_key=bad.key, before=good.tag, last_seen="", evidence=("asked by hand",), said=look.headline,
        between=(), upstream=look.upstream or "", cause=("by hand", look.id), size=look.time.value if look.time else 0.0,
    )


# ---- which series have a page ----------------------------------------------------------------------------------------

def with_pages(panel: Panel, lines: Sequence[Line]) -> tuple[list[Line], dict[str, str]]:
    """The lines of one panel with the pages of their series, and these pages by case, as paths below the site's root.

    Told of are regressions that stand or were looked at again, and everything that the newest builds brought.
    """
    recent = {build.key for build in panel.builds[-RECENT_BUILDS:]}
    told = [line for line in lines if line.since_key in recent or line.said or line.stands and line.direction is Direction.WORSE]
    told.sort(key=lambda line: (line.direction is not Direction.WORSE, line.rank))
    cases = list(dict.fromkeys(line.case for line in told))[:MOST_SERIES]
    pages = {case: f"machines/{panel.machine}/history/{_page_name(panel, case)}" for case in cases}
    return [replace(line, page=quote(pages.get(line.case, ""))) for line in lines], pages


def _page_name(panel: Panel, case: str) -> str:
    """A file's name that is the same every night, and another one for each device, channel and variant."""
    digest = hashlib.sha256("\n".join((panel.device, panel.channel, panel.variant, case)).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', case.replace('/', '__'))[:150]}-{digest}.html"


def drawn(panel: Panel, groups: Sequence[Group]) -> list[Group]:
    """With the first series of each group drawn small."""
    steps = defaultdict(list)
    for group in groups:
        for line in group.lines:
            if line.metric == "median_us" and line.state is not State.REFUTED:
                steps[line.case].append(panel.column[line.since_key])

    def spark(line: Line) -> Spark:
        change = panel.column[line.since_key]
        return spark_of(panel, panel.row[line.case], line.metric, change, max((step for step in steps[line.case] if step < change), default=0))

    return [Group((replace(group.first, spark=spark(group.first)), *group.lines[1:])) if group.first.page else group for group in groups]


# ---- the first page --------------------------------------------------------------------------------------------------

def findings_on(groups: Sequence[Group], broken: Container[tuple[str, str]]) -> list[Finding]:
    """Sentences for the overview: each confirmed regression that stands, and how many wait for a second look.

    Verdicts of `broken` cases, by machine and id, have their sentences there already, with the build since which they are broken.
    """
    worse = [group for group in groups if group.first.direction is Direction.WORSE]
    found = [Finding(REGRESSED, _sentence(group), group.first.page or "regressions.html#confirmed", (), more="Its series, and what was run again")
             for group in worse if group.first.state is State.CONFIRMED
             and (group.first.metric != "verdict" or (group.first.machine, group.first.case) not in broken)]
    waiting = [line for group in worse for line in group.lines if group.first.state is State.OPEN and line.metric == "median_us"]
    if waiting:
        most = max(waiting, key=lambda line: line.size)
        number = "One case looks" if len(waiting) == 1 else f"{len(waiting)} cases look"
        found.append(Finding(
            SUSPECTED, f"{number} slower than on earlier builds, and nobody has run both builds again"
            f"{':' if len(waiting) == 1 else '; the worst:'} {most.case}, {most.what}, since {most.since} on {most.device}.",
            "regressions.html#open", (), more="What is suspected, each with its series"))
    return found


def _sentence(group: Group) -> str:
    line = group.first
    parts = split_id(line.case)
    layer = f"{parts['workload']}/m{parts['m']}/{parts['activation']}"
    more = f", and {len(group.lines) - 1} more {'case' if len(group.lines) == 2 else 'cases'}" if len(group.lines) > 1 else ""
    said = line.said.partition(" ")[2]
    verb = f"is slower, {said}," if line.metric == "median_us" else f"changed, {said},"
    return f"{line.implementation} on {parts['scheme']}, {layer}{more}: {verb} since {line.since} on {line.device}; confirmed by running both again."


@dataclass(frozen=True)
class Summary:
    """What the page of regressions shows."""

    sections: dict[State, list[Group]]
    """For the worse, by state, in the order of `STATES`; a group of nothing is left out."""
    better: list[Group]
    other: list[Group]
    moves: list[MachineMove]
    builds: int
    compared: int
    """How many of them were measured where an earlier one was, of the same channel and variant: only these can have changed anything."""

    @property
    def count(self) -> dict[State, int]:
        """Findings for the worse, by state."""
        return {state: sum(len(group.lines) for group in groups) for state, groups in self.sections.items()}


def summary_of(groups: Sequence[Group], moves: Sequence[MachineMove], builds: int, compared: int) -> Summary:
    worse = [group for group in groups if group.first.direction is Direction.WORSE]
    by_state = {state: [group for group in worse if group.first.state is state] for state in STATES}
    rest = {direction: [group for group in groups if group.first.direction is direction and group.first.page]
            for direction in (Direction.BETTER, Direction.OTHER)}
    return Summary({state: found for state, found in by_state.items() if found}, rest[Direction.BETTER], rest[Direction.OTHER],
                   sorted(moves, key=lambda move: -abs(move.change)), builds, compared)

"""Changes from build to build as the pages list them, grouped by cause, worst first.

docs/decision-rule.md defines the rule that finds them; § refers to its sections here and on the pages.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from urllib.parse import quote

from fpxbench.builds.timeline import Entry
from fpxbench.counted import counted
from fpxbench.records.case import split_id
from fpxbench.regressions.change_report import Direction, Event, MachineMove, State, Suspect
from fpxbench.regressions.confirmation import Confirmation, upstream_range
from fpxbench.regressions.events import METRIC_RULES, RECENT
from fpxbench.regressions.result_changes import PanelChanges
from fpxbench.regressions.series import UNKNOWN_DAY, Panel
from fpxbench.reports.history.sparkline import Sparkline, sparkline_of
from fpxbench.reports.sweep.problems import REGRESSED, SUSPECTED, ReportProblem, Section

RECENT_BUILDS = 30
"""For how many builds a change that has ended, or is not a regression, keeps the page of its series."""
MOST_SERIES = 200
"""Largest number of pages of series for each machine, channel and variant, so that regressions left unexamined for
years do not fill a disk."""

STATES: dict[State, str] = {
    State.CONFIRMED: "Both builds were run again, interleaved, and differ (Confirmation). The newest build still "
                     "shows it.",
    State.OPEN: "Seen in the records, not yet confirmed. A verdict or an exact metric is as recorded (§8); a time is "
                "only suspected, and about one a year in each case is noise (§3).",
    State.UNDECIDED: "Both builds were run again, with no clear result within the time allowed (Confirmation).",
    State.FIXED: "A later build changed back: the time stepped the other way (§6), the verdict is no worse than "
                 "before, or the metric is nearer to its earlier value (§8).",
    State.REFUTED: "Both builds were run again, and do not differ (Confirmation). The series continues without a step "
                   "(§6).",
}
"""The meaning of each state, in the order of the page."""


@dataclass(frozen=True)
class RegressionLine:
    """One change, as pages list it."""

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
    """The tag of the build on which it had ended; empty while it lasts."""
    evidence: tuple[str, ...]
    confirmation: str
    """The result of its confirmation; empty before there is one."""
    between: tuple[str, ...]
    """Tags of the two builds to bisect between; empty if the change surely lies between neighbours."""
    upstream: str
    """URL of the commits between the two builds, if both commits are known."""
    cause: tuple[str, ...]
    """Key by which changes are grouped."""
    size: float
    """Larger is worse, within one metric."""
    page: str = ""
    """URL of its series' page, relative to the site's root, if it has one."""
    spark: Sparkline | None = None

    @property
    def implementation(self) -> str:
        return self.case.partition("/")[0]

    @property
    def stands(self) -> bool:
        return self.state not in (State.REFUTED, State.FIXED)

    @property
    def rank(self) -> tuple:
        """Sort key: by state, then verdicts before times before other metrics, then the worse first."""
        metrics = ["verdict", "median_us", *METRIC_RULES]
        return list(STATES).index(self.state), metrics.index(self.metric), -self.size, self.case


@dataclass(frozen=True)
class RegressionGroup:
    """Changes with one cause (implementation, machine, first build and kind of change), worst first."""

    lines: tuple[RegressionLine, ...]

    @property
    def first(self) -> RegressionLine:
        return self.lines[0]

    @property
    def rank(self) -> tuple:
        """Sort key: by the worst line, then by the number of cases."""
        return *self.first.rank[:3], -len(self.lines), self.first.case


def regression_lines(one: PanelChanges) -> list[RegressionLine]:
    """Return a line for every change of a panel, in the order of the builds."""
    findings: list[Suspect | Event] = [*one.suspects, *one.events]
    return [_line(one.panel, finding) for finding in findings]


def _line(panel: Panel, finding: Suspect | Event) -> RegressionLine:
    series = finding.series
    what, evidence, cause, size = _of_suspect(finding) if isinstance(finding, Suspect) else _of_event(finding)
    if finding.implementation_changed:
        evidence.append("the implementation's own source changed too, and may be the cause (§7)")
    implementation = series.case.partition("/")[0]
    machine = panel.machine
    between = (panel.tag_of(finding.surely_good),
               panel.tag_of(finding.raised_at)) if isinstance(finding, Suspect) else ()
    return RegressionLine(
        id=finding.id, state=finding.state, direction=finding.direction, machine=machine, device=series.device,
        channel=series.channel, variant=series.variant, case=series.case, metric=series.metric, what=what,
        since=finding.first_bad_tag, since_key=finding.first_bad.key, before=finding.last_good_tag,
        last_seen=panel.tag_of(finding.ended_at) if finding.ended_at else "",
        evidence=tuple(evidence), confirmation=finding.message, between=between,
        upstream=upstream_range(finding.last_good, finding.first_bad) or "",
        cause=(implementation, machine, series.device, series.channel, series.variant, finding.first_bad.key,
               series.metric, str(finding.state), str(finding.direction), *cause),
        size=size,
    )


def _of_suspect(suspect: Suspect) -> tuple[str, list[str], tuple[str, ...], float]:
    low, high = (f"{100 * end:+z.1f}" for end in suspect.interval)
    evidence = [f"seen in {counted(suspect.builds_after, 'build')} after {suspect.builds_before} (§3)",
                f"{abs(suspect.z):.1f} standard errors at a noise of {suspect.noise:.1%} a build"]
    if suspect.control is not None:
        evidence.append(f"the dense product of the same runs: {suspect.control:+z.1%} (§5)")
    return f"{suspect.change:+z.1%} [{low}, {high}] time", evidence, (), abs(suspect.change)


def _of_event(event: Event) -> tuple[str, list[str], tuple[str, ...], float]:
    words = "" if event.series.metric == "verdict" else f"{METRIC_RULES[event.series.metric].label} "
    times = "once" if event.changes_before == 1 else f"{event.changes_before} times"
    evidence = [f"it changed {times} in the {RECENT} builds before (§8)"] if event.changes_before else []
    cause = tuple(re.sub(r"\d+", "#", text.partition(":")[0])
                  for text in (event.before, event.after)) if not words else ()
    return f"{words}{event.before} → {event.after}", evidence, cause, -float(event.severity)


def group_lines(lines: Iterable[RegressionLine]) -> list[RegressionGroup]:
    """Group lines of one cause, worst first."""
    groups: dict[tuple[str, ...], list[RegressionLine]] = defaultdict(list)
    for line in lines:
        groups[line.cause].append(line)
    found = [RegressionGroup(tuple(sorted(group, key=lambda line: (not line.page, line.rank))))
             for group in groups.values()]
    return sorted(found, key=lambda group: group.rank)


def requested_line(confirmation: Confirmation) -> RegressionLine:
    """Return the line of a confirmation that was requested by hand, without a finding. Raise ValueError if a build
    cannot be on the timeline."""
    good, bad = (Entry.of(build, UNKNOWN_DAY) for build in (confirmation.good, confirmation.build))
    return RegressionLine(
        id=hashlib.sha256(confirmation.id.encode()).hexdigest()[:10], state=State(confirmation.outcome),
        direction=Direction(confirmation.direction), machine=confirmation.machine.name,
        device=f"{confirmation.machine.device} ({confirmation.machine.arch})",
        channel=confirmation.build.channel, variant=confirmation.build.variant, case=confirmation.case.id,
        metric="verdict" if confirmation.metric == "verdict" else "median_us", what=confirmation.message,
        since=bad.tag, since_key=bad.key, before=good.tag, last_seen="", evidence=("requested by hand",),
        confirmation=confirmation.headline, between=(), upstream=confirmation.upstream or "",
        cause=("by hand", confirmation.id),
        size=confirmation.time.value if confirmation.time else 0.0,
    )


# ---- which series have a page ----------------------------------------------------------------------------------------

def with_pages(panel: Panel, lines: Sequence[RegressionLine]) -> tuple[list[RegressionLine], dict[str, str]]:
    """Return the lines with the pages of their series, and these pages by case, as paths relative to the site's root.

    Pages exist for standing regressions, changes that were run again, and all changes of the newest builds.
    """
    recent = {build.key for build in panel.builds[-RECENT_BUILDS:]}
    listed = [line for line in lines if line.since_key in recent or line.confirmation or line.stands
              and line.direction is Direction.WORSE]
    listed.sort(key=lambda line: (line.direction is not Direction.WORSE, line.rank))
    cases = list(dict.fromkeys(line.case for line in listed))[:MOST_SERIES]
    pages = {case: f"machines/{panel.machine}/history/{_page_name(panel, case)}" for case in cases}
    return [replace(line, page=quote(pages.get(line.case, ""))) for line in lines], pages


def _page_name(panel: Panel, case: str) -> str:
    """Return a stable file name that is unique to the device, channel, variant and case."""
    digest = hashlib.sha256("\n".join((panel.device, panel.channel, panel.variant, case)).encode()).hexdigest()[:10]
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', case.replace('/', '__'))[:150]}-{digest}.html"


def with_sparklines(panel: Panel, groups: Sequence[RegressionGroup]) -> list[RegressionGroup]:
    """Return the groups, each with a sparkline of its first series."""
    steps = defaultdict(list)
    for group in groups:
        for line in group.lines:
            if line.metric == "median_us" and line.state is not State.REFUTED:
                steps[line.case].append(panel.column[line.since_key])

    def spark(line: RegressionLine) -> Sparkline:
        change = panel.column[line.since_key]
        return sparkline_of(panel, panel.row[line.case], line.metric, change,
                            max((step for step in steps[line.case] if step < change), default=0))

    return [RegressionGroup((replace(group.first, spark=spark(group.first)), *group.lines[1:])) if group.first.page
            else group for group in groups]


# ---- the first page --------------------------------------------------------------------------------------------------

def regression_problems(groups: Sequence[RegressionGroup], broken: Container[tuple[str, str]]) -> list[ReportProblem]:
    """Return a problem for each standing confirmed regression, and one for those that wait for confirmation.

    Verdicts of `broken` cases (machine, id) are left out: they are already problems of the sweep."""
    worse = [group for group in groups if group.first.direction is Direction.WORSE]
    found = [ReportProblem(Section.REGRESSED, REGRESSED, _message(group),
                           group.first.page or "regressions.html#confirmed", (),
                           more="Its series and its confirmation")
             for group in worse if group.first.state is State.CONFIRMED
             and (group.first.metric != "verdict" or (group.first.machine, group.first.case) not in broken)]
    waiting = [line for group in worse for line in group.lines if group.first.state is State.OPEN
               and line.metric == "median_us"]
    if waiting:
        most = max(waiting, key=lambda line: line.size)
        number = "One case looks" if len(waiting) == 1 else f"{len(waiting)} cases look"
        found.append(ReportProblem(
            Section.SLOW, SUSPECTED, f"{number} slower than on earlier builds, not yet confirmed"
            f"{':' if len(waiting) == 1 else '; the worst:'} {most.case}, {most.what}, since {most.since} on "
            f"{most.device}.",
            "regressions.html#open", (), more="Every suspected change, with its series"))
    return found


def _message(group: RegressionGroup) -> str:
    line = group.first
    parts = split_id(line.case)
    layer = f"{parts['workload']}/m{parts['m']}/{parts['activation']}"
    others = len(group.lines) - 1
    more = f", and {counted(others, 'more case')}" if others else ""
    result = line.confirmation.partition(" ")[2]
    verb = f"is slower, {result}," if line.metric == "median_us" else f"changed, {result},"
    return (f"{line.implementation} on {parts['scheme']}, {layer}{more}: {verb} since {line.since} on {line.device}; "
            "confirmed by running both builds again.")


@dataclass(frozen=True)
class RegressionSummary:
    """The contents of the page of regressions."""

    sections: dict[State, list[RegressionGroup]]
    """Changes for the worse by state, in the order of `STATES`, without empty states."""
    better: list[RegressionGroup]
    other: list[RegressionGroup]
    moves: list[MachineMove]
    builds: int
    compared: int
    """Number of builds with an earlier one of the same channel and variant on the same machine, which can show changes.
    """

    @property
    def count(self) -> dict[State, int]:
        """Number of changes for the worse by state."""
        return {state: sum(len(group.lines) for group in groups) for state, groups in self.sections.items()}


def summarize(groups: Sequence[RegressionGroup], moves: Sequence[MachineMove], builds: int,
              compared: int) -> RegressionSummary:
    """Return the contents of the page of regressions."""
    worse = [group for group in groups if group.first.direction is Direction.WORSE]
    by_state = {state: [group for group in worse if group.first.state is state] for state in STATES}
    rest = {direction: [group for group in groups if group.first.direction is direction and group.first.page]
            for direction in (Direction.BETTER, Direction.OTHER)}
    return RegressionSummary({state: found for state, found in by_state.items() if found}, rest[Direction.BETTER],
                             rest[Direction.OTHER], sorted(moves, key=lambda move: -abs(move.change)), builds, compared)

"""Notices: what a channel sends, made from confirmed regressions and, if asked for, from changed verdicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fpxbench.regressions.change_report import ChangeReport, Event, State
from fpxbench.regressions.confirmation import upstream_range
from fpxbench.regressions.movements import Cause, Movement
from fpxbench.reports.history.issue_texts import Issue, as_code, confirmed, identity_of, issues


class Notice(BaseModel):
    """One regression of a build, whatever the cases and machines."""

    model_config = ConfigDict(frozen=True)

    id: str
    """Ten hex digits that stay the same while cases and machines come in."""
    title: str
    body: str
    """Markdown."""
    what: str
    """``slower``, ``crash (compiler_abort)``."""
    cause: Cause = Cause.BUILD
    confirmed: bool
    build: str
    """The first bad one."""
    good: str
    variant: str
    implementation: str
    cases: list[str]
    machines: list[str]
    upstream: str | None = None
    """The page of the commits between the two builds."""

    @property
    def digest(self) -> str:
        """Of what it holds: another one where cases or machines came in."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True, default=str).encode()).hexdigest()[:16]

    @property
    def summary(self) -> str:
        """One line."""
        sure = "confirmed" if self.confirmed else "not run again"
        return f"{self.title}; {sure}; {self.good} is good; on {', '.join(self.machines)}"


def notices(results: Path, moved: Sequence[Movement], unconfirmed_events: bool = False) -> list[Notice]:
    """Return the notices of what the build made worse and what still stands: confirmed regressions, worst first, then,
    if `unconfirmed_events`, verdicts and exact metrics that changed and were not run again."""
    over = {one.change.id for one in moved
            if isinstance(one.change, ChangeReport) and one.change.state is State.FIXED}
    found = [_of_issue(issue) for issue in issues(each for each in confirmed(results) if each.suspect not in over)]
    if unconfirmed_events:
        known = {notice.id for notice in found}
        found += [notice for notice in _of_events(moved) if notice.id not in known]
    return found


def _of_issue(issue: Issue) -> Notice:
    worst = issue.confirmations[0]
    return Notice(
        id=issue.id, title=issue.title, body=issue.body, what=issue.what, confirmed=True, build=worst.build.torch,
        good=worst.good.torch, variant=worst.build.variant, implementation=worst.case.implementation,
        cases=sorted({each.case.id for each in issue.confirmations}),
        machines=sorted({each.machine.name for each in issue.confirmations}), upstream=worst.upstream,
    )


def _of_events(moved: Iterable[Movement]) -> list[Notice]:
    groups: dict[str, list[Event]] = {}
    for movement in moved:
        event = movement.change
        if movement.calls and not movement.confirmed and isinstance(event, Event):
            groups.setdefault(_identity(event), []).append(event)
    return [_of_group(identity, group) for identity, group in groups.items()]


def _what(event: Event) -> str:
    if event.series.metric == "verdict":
        return event.after.split(": ")[0]
    return f"{event.series.metric.replace('_', ' ')} {event.before} -> {event.after}"


def _identity(event: Event) -> str:
    implementation = event.series.case.partition("/")[0]
    return identity_of(event.last_good.key, event.first_bad.key, implementation, _what(event))


def _of_group(identity: str, group: list[Event]) -> Notice:
    first = group[0]
    what, more = _what(first), f" and {len(group) - 1} more" if len(group) > 1 else ""
    rows = "\n".join(
        f"| {as_code(one.series.case)} | {as_code(one.series.device)} | {as_code(one.before)} | {as_code(one.after)} |"
        for one in group)
    body = (
        f"<!-- fpxbench {identity}: found by this line when it is updated -->\n"
        f"{as_code(what)} since PyTorch {as_code(first.first_bad.torch)}; {as_code(first.last_good.torch)} is still"
        f" good. **Not run again yet.**\n\n| case | machine | before | after |\n|---|---|---|---|\n{rows}\n\n"
        f"Confirm with: `fpxbench confirm {first.id}`\n"
    )
    return Notice(
        id=identity, title=f"{first.series.case}{more}: {what} since {first.first_bad.label} [fpx-{identity}]",
        body=body, what=what, confirmed=False, build=first.first_bad.torch, good=first.last_good.torch,
        variant=first.series.variant, implementation=first.series.case.partition("/")[0],
        cases=sorted({one.series.case for one in group}), machines=sorted({one.series.machine for one in group}),
        upstream=upstream_range(first.last_good, first.first_bad),
    )

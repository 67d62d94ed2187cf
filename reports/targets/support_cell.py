"""A cell of the support table: what an operation with a format does on an architecture now, since when, and how far that was looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpxbench.records.verdict import BROKEN, Status
from fpxbench.reports.words import FLAG_SIGN
from fpxbench.targets.matrix import CellOutcome, Matrix, Probe
from fpxbench.targets.version_spans import SOME, UNCHECKED, GroupState, Span, history_text, spans, states

MOST_EARLIER = 2
"""Lines of a cell about earlier builds. Wrong ones are never left out."""


@dataclass(frozen=True)
class Moment:
    """What a group of probes does on one build."""

    state: GroupState
    checked: int
    """Of those that are ok: of how many more is known than that they compile."""
    flags: tuple[str, ...]
    """Of those that are ok, all of them."""
    wrong: int = 0

    @property
    def some(self) -> bool:
        """Whether some are ok and others are not, none of them wrong."""
        return self.state.sign == SOME

    @property
    def partly_wrong(self) -> bool:
        """Whether some are wrong and others are not."""
        return 0 < self.wrong < self.state.asked

    @property
    def unchecked(self) -> bool:
        return self.state.status is Status.OK and self.checked < self.state.ok

    @property
    def marks(self) -> str:
        """What stands beside the sign."""
        return UNCHECKED * self.unchecked + FLAG_SIGN * bool(self.flags and self.state.status is Status.OK)

    @property
    def notes(self) -> list[str]:
        """The marks in words."""
        only = f"{self.state.ok - self.checked} of {self.state.ok} ok only compiled, not checked"
        flagged = [f"{self.flags.count(flag)} of {self.state.ok} ok {flag}" for flag in dict.fromkeys(self.flags)]
        wrong = f"{self.wrong} of {self.state.asked} wrong"
        return [wrong] * self.partly_wrong + [only] * self.unchecked + flagged


@dataclass(frozen=True)
class Cell:
    """An operation with a format on an architecture."""

    history: tuple[Span, ...]
    """Not empty."""
    changed: tuple[str, ...]
    """Builds on which the status of any of its probes, or a flag, became another. That a build knows the architecture at last is no change."""
    wrong: bool
    """On any build: compiles, and computes something else."""
    newest: Moment
    """On the newest build that was asked."""
    asked_to: str
    """Which that was, if newer ones were not asked; else empty."""

    @property
    def now(self) -> Span:
        return self.history[-1]

    @property
    def word(self) -> str:
        """What the newest build's sign needs beside it: ``wrong``, ``1 of 3 wrong``, ``3 of 10``, ``never``; nothing where the sign says it all."""
        state = self.now.state
        if self.newest.some:
            return f"{state.ok} of {state.asked}"
        if self.newest.partly_wrong:
            return f"{self.newest.wrong} of {state.asked} wrong"
        if state.status in (Status.OK, Status.WRONG):
            return "" if state.status is Status.OK else "wrong"
        return "" if self._worked else "never"

    @property
    def since(self) -> str:
        """``since 3.3.1`` of what is ok or wrong, ``until 3.4`` of what was ok; nothing if it was always as it is."""
        *before, now = self.history
        if now.state.status in (Status.OK, Status.WRONG):
            return f"since {_short(now.first)}" if before else ""
        return f"until {_short(self._worked[-1].last)}" if self._worked else ""

    @property
    def _worked(self) -> list[Span]:
        return [span for span in self.history if span.state.status is Status.OK]

    @property
    def earlier(self) -> list[str]:
        """What was broken on earlier builds, newest first: ``3.0–3.1 wrong``."""
        broken = [span for span in reversed(self.history[:-1]) if span.state.status in BROKEN]
        kept = [span for at, span in enumerate(broken) if span.state.status is Status.WRONG or at < MOST_EARLIER]
        return [f"{_range(span)} {span.state.status}" for span in kept] + ["…"] * (len(kept) < len(broken))

    @property
    def title(self) -> str:
        until = [f"not asked of what came after {self.asked_to}"] if self.asked_to else []
        return "; ".join([history_text(self.history), *self.newest.notes, *until])


def _short(version: str) -> str:
    return version.removesuffix(".0")


def _range(span: Span) -> str:
    return _short(span.first) if span.first == span.last else f"{_short(span.first)}–{_short(span.last)}"


def moments(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> list[Moment | None]:
    """Build by build; None for one that was not asked."""
    return [
        state and _moment(state, [outcome for probe in probes if (outcome := matrix.outcome_of(probe, architecture, at))])
        for at, state in enumerate(states(matrix, probes, architecture))
    ]


def _moment(state: GroupState, outcomes: Sequence[CellOutcome]) -> Moment:
    fine = [outcome for outcome in outcomes if outcome.status is Status.OK]
    return Moment(state, sum(outcome.check != "none" for outcome in fine), tuple(flag for outcome in fine for flag in outcome.flags),
                  sum(outcome.status is Status.WRONG for outcome in outcomes))


def cell_of(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> Cell | None:
    """None where nothing was asked."""
    asked = {at: moment for at, moment in enumerate(moments(matrix, probes, architecture)) if moment}
    if not asked:
        return None
    newest = max(asked)
    later = any(not build.unusable for build in matrix.builds[newest + 1:])
    runs = [matrix.outcomes[run.outcome] for probe in probes for run in probe.cells.get(architecture, ())]
    return Cell(tuple(spans(matrix, probes, architecture)), _changed(matrix, probes, architecture),
                any(outcome.status is Status.WRONG for outcome in runs), asked[newest], matrix.builds[newest].triton if later else "")


def _changed(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> tuple[str, ...]:
    positions = set()
    for probe in probes:
        before = None
        for run in probe.cells.get(architecture, ()):
            outcome = matrix.outcomes[run.outcome]
            if before and before.status is not Status.MISSING and (before.status, before.flags) != (outcome.status, outcome.flags):
                positions.add(run.builds[0])
            before = outcome
    return tuple(matrix.builds[at].triton for at in sorted(positions))

"""A cell of the support matrix: the state of an operation with a format on an architecture over builds, and how it was
checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpxbench.records.verdict import BROKEN, Status
from fpxbench.reports.words import FLAG_SIGN
from fpxbench.targets.matrix import CellOutcome, Matrix, Probe
from fpxbench.targets.version_spans import SOME, UNCHECKED, GroupState, Span, history_text, spans, states

MOST_EARLIER = 2
"""Largest number of earlier failures that a cell lists; wrong results are always listed."""


@dataclass(frozen=True)
class BuildState:
    """The state of a group of probes on one build."""

    state: GroupState
    checked: int
    """Number of ok probes that were checked beyond compiling."""
    flags: tuple[str, ...]
    """All flags of ok probes."""
    wrong: int = 0

    @property
    def some(self) -> bool:
        """Whether only some are ok, and none is wrong."""
        return self.state.sign == SOME

    @property
    def partly_wrong(self) -> bool:
        """Whether only some are wrong."""
        return 0 < self.wrong < self.state.asked

    @property
    def unchecked(self) -> bool:
        return self.state.status is Status.OK and self.checked < self.state.ok

    @property
    def marks(self) -> str:
        """Marks beside the sign."""
        return UNCHECKED * self.unchecked + FLAG_SIGN * bool(self.flags and self.state.status is Status.OK)

    @property
    def notes(self) -> list[str]:
        """The marks, spelled out."""
        only = f"{self.state.ok - self.checked} of {self.state.ok} ok only compiled, not checked"
        flagged = [f"{self.flags.count(flag)} of {self.state.ok} ok {flag}" for flag in dict.fromkeys(self.flags)]
        wrong = f"{self.wrong} of {self.state.asked} wrong"
        return [wrong] * self.partly_wrong + [only] * self.unchecked + flagged


@dataclass(frozen=True)
class SupportCell:
    """An operation with a format on an architecture."""

    history: tuple[Span, ...]
    """Not empty."""
    changed: tuple[str, ...]
    """Builds on which the status or flags of any probe changed, without the first that supports the architecture."""
    wrong: bool
    """Whether any build miscompiles it."""
    newest: BuildState
    """The state on the newest build that was tested."""
    tested_to: str
    """That build's version if newer ones were not tested, else empty."""

    @property
    def now(self) -> Span:
        return self.history[-1]

    @property
    def word(self) -> str:
        """Text beside the newest build's sign: ``wrong``, ``1 of 3 wrong``, ``3 of 10``, ``never``, or nothing."""
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
        """``since 3.3.1`` if it is ok or wrong, ``until 3.4`` if it was ok; empty if it never changed."""
        *before, now = self.history
        if now.state.status in (Status.OK, Status.WRONG):
            return f"since {_short(now.first)}" if before else ""
        return f"until {_short(self._worked[-1].last)}" if self._worked else ""

    @property
    def _worked(self) -> list[Span]:
        return [span for span in self.history if span.state.status is Status.OK]

    @property
    def earlier(self) -> list[str]:
        """Failures of earlier builds, newest first: ``3.0–3.1 wrong``."""
        broken = [span for span in reversed(self.history[:-1]) if span.state.status in BROKEN]
        kept = [span for at, span in enumerate(broken) if span.state.status is Status.WRONG or at < MOST_EARLIER]
        return [f"{_range(span)} {span.state.status}" for span in kept] + ["…"] * (len(kept) < len(broken))

    @property
    def title(self) -> str:
        until = [f"builds after {self.tested_to} were not tested"] if self.tested_to else []
        return "; ".join([history_text(self.history), *self.newest.notes, *until])


def _short(version: str) -> str:
    return version.removesuffix(".0")


def _range(span: Span) -> str:
    return _short(span.first) if span.first == span.last else f"{_short(span.first)}–{_short(span.last)}"


def build_states(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> list[BuildState | None]:
    """Return the state on each build; None for builds that were not tested."""
    return [
        _build_state(state, [outcome for probe in probes if (outcome := matrix.outcome_of(probe, architecture, at))])
        if state else None for at, state in enumerate(states(matrix, probes, architecture))
    ]


def _build_state(state: GroupState, outcomes: Sequence[CellOutcome]) -> BuildState:
    fine = [outcome for outcome in outcomes if outcome.status is Status.OK]
    return BuildState(state, sum(outcome.check != "none" for outcome in fine),
                      tuple(flag for outcome in fine for flag in outcome.flags),
                      sum(outcome.status is Status.WRONG for outcome in outcomes))


def cell_of(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> SupportCell | None:
    """Return the cell; None if nothing was tested."""
    tested = {at: state for at, state in enumerate(build_states(matrix, probes, architecture)) if state}
    if not tested:
        return None
    newest = max(tested)
    later = any(not build.unusable for build in matrix.builds[newest + 1:])
    runs = [matrix.outcomes[run.outcome] for probe in probes for run in probe.cells.get(architecture, ())]
    return SupportCell(tuple(spans(matrix, probes, architecture)), _changed(matrix, probes, architecture),
                       any(outcome.status is Status.WRONG for outcome in runs), tested[newest],
                       matrix.builds[newest].triton if later else "")


def _changed(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> tuple[str, ...]:
    positions = set()
    for probe in probes:
        before = None
        for run in probe.cells.get(architecture, ()):
            outcome = matrix.outcomes[run.outcome]
            if (before is not None and before.status is not Status.MISSING
                    and (before.status, before.flags) != (outcome.status, outcome.flags)):
                positions.add(run.builds[0])
            before = outcome
    return tuple(matrix.builds[at].triton for at in sorted(positions))

"""Summarise a matrix for reading: the state of each row on each architecture, build by build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fpxbench.records.verdict import SEVERITY, SIGNS, Status
from fpxbench.targets.matrix import CellOutcome, Matrix, Probe

SOME = "◐"
UNCHECKED = "°"
"""Beside a sign: some of what is ok was only compiled."""


@dataclass(frozen=True)
class GroupState:
    """The state of a group of probes on one build."""

    status: Status
    """``ok`` if any is ok and none is wrong; else the worst."""
    ok: int
    asked: int
    checked: int = 0
    """Of those that are ok, how many were executed or compared, not only compiled."""

    @property
    def sign(self) -> str:
        return SOME if self.status is Status.OK and self.ok < self.asked else SIGNS[self.status]

    @property
    def unchecked(self) -> bool:
        """Whether some of what is ok was only compiled."""
        return self.status is Status.OK and self.checked < self.ok

    @property
    def label(self) -> str:
        """``ok``, ``3 of 16 ok``, ``crash``."""
        some = self.status is Status.OK and self.ok < self.asked
        return f"{self.ok} of {self.asked} ok" if some else str(self.status)


@dataclass(frozen=True)
class Span:
    """Consecutive builds on which a group has the same sign."""

    state: GroupState
    """On the last of them."""
    first: str
    last: str
    """Versions of Triton."""
    steady: bool = True
    """Whether as much was ok on each of them."""

    @property
    def label(self) -> str:
        return self.state.label if self.steady else "some ok"


def state_of(outcomes: Sequence[CellOutcome]) -> GroupState | None:
    """Return the state of a group from its outcomes on one build; None if there are none."""
    if not outcomes:
        return None
    statuses = Counter(outcome.status for outcome in outcomes)
    if statuses[Status.OK] and not statuses[Status.WRONG]:
        status = Status.OK
    else:
        status = Status.WRONG if statuses[Status.WRONG] else min(statuses, key=SEVERITY.__getitem__)
    checked = sum(outcome.status is Status.OK and outcome.check != "none" for outcome in outcomes)
    return GroupState(status, statuses[Status.OK], len(outcomes), checked)


def rows(matrix: Matrix) -> Iterator[tuple[str, str, list[Probe]]]:
    """Yield operation, format and their probes, in the matrix's order."""
    groups: dict[tuple[str, str], list[Probe]] = {}
    for probe in matrix.probes:
        groups.setdefault((probe.operation, probe.format), []).append(probe)
    return ((operation, fmt, probes) for (operation, fmt), probes in groups.items())


def states(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> list[GroupState | None]:
    """Return the state of a group on an architecture for each build; None for one that was not tried."""
    every = range(len(matrix.builds))
    return [state_of([found for probe in probes if (found := matrix.outcome_of(probe, architecture, at)) is not None])
            for at in every]


def spans(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> list[Span]:
    """Return the history of a group on an architecture, oldest first, without builds that were not tried."""
    found: list[Span] = []
    for build, state in zip(matrix.builds, states(matrix, probes, architecture), strict=True):
        if state is None:
            continue
        span = Span(state, build.triton, build.triton)
        if found and found[-1].state.sign == state.sign:
            before = found.pop()
            span = Span(state, before.first, build.triton, before.steady and before.state.label == state.label)
        found.append(span)
    return found


def history_signs(history: Sequence[Span]) -> str:
    """Return the history as signs, each with its first version: ``✗3.0 –3.2 ✓3.5.1``; just ``✓`` if it never changed.

    ``°`` after the last sign: something that is ok on the newest build was only compiled.
    """
    first_versions = [span.first.removesuffix(".0") if len(history) > 1 else "" for span in history]
    signs = [span.state.sign for span in history]
    signs[-1] += UNCHECKED * history[-1].state.unchecked
    return " ".join(map("".join, zip(signs, first_versions, strict=True)))


def history_text(history: Sequence[Span]) -> str:
    """Return ``ok since 3.3.1``, ``never ok``, ``wrong 3.0.0–3.1.0, unsupported since 3.2.0``."""
    if not history:
        return "not tried"
    *before, last = history
    now = "" if last.steady else f" ({last.state.label} on {last.last})"
    if not before:
        return f"{last.label} on every build{now}"
    parts = [f"{span.label} {span.first if span.first == span.last else f'{span.first}–{span.last}'}"
             for span in before]
    return ", ".join([*parts, f"{last.label} since {last.first}{now}"])


def checked_cells(matrix: Matrix, position: int) -> tuple[int, int]:
    """Return, for the build at that position, how many cells were checked beyond compiling, and how many compile."""
    outcomes = [matrix.outcome_of(probe, architecture, position) for probe in matrix.probes
                for architecture in probe.cells]
    compiled = [outcome for outcome in outcomes if outcome and outcome.status in (Status.OK, Status.WRONG)]
    return sum(outcome.check != "none" for outcome in compiled), len(compiled)


def causes(matrix: Matrix, position: int) -> list[tuple[CellOutcome, int, Counter[str]]]:
    """Return the causes of cells that are not ok, or ok with a flag, on the build at that position.

    Each is an outcome with its number of cells, and their number by row (by probe for a wrong one, as the other probes
    of its row may be right); the most severe first, then the most frequent.
    """
    found: dict[tuple, tuple[CellOutcome, Counter[str]]] = {}
    for probe in matrix.probes:
        for architecture in probe.cells:
            outcome = matrix.outcome_of(probe, architecture, position)
            if outcome is not None and (outcome.status is not Status.OK or outcome.flags):
                cause = (outcome.status, outcome.kind, outcome.cause, outcome.signal)
                found.setdefault(cause, (outcome, Counter()))[1][
                    probe.id if outcome.status is Status.WRONG else f"{probe.operation}/{probe.format}"] += 1
    ordered = sorted(found.values(), key=lambda pair: (SEVERITY[pair[0].status], -pair[1].total()))
    return [(outcome, where.total(), where) for outcome, where in ordered]

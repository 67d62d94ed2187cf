"""A matrix as people read it: what a row of it can do on an architecture, build by build, and how that changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fpxbench.records.verdict import SEVERITY, SIGNS, Status
from fpxbench.targets.matrix import CellOutcome, Matrix, Probe

SOME = "◐"


@dataclass(frozen=True)
class GroupState:
    """What a group of probes does on one build."""

    status: Status
    """``ok`` if any of them is and none is wrong; else the worst of them."""
    ok: int
    asked: int

    @property
    def sign(self) -> str:
        return SOME if self.status is Status.OK and self.ok < self.asked else SIGNS[self.status]

    @property
    def label(self) -> str:
        """``ok``, ``3 of 16 ok``, ``crash``."""
        return f"{self.ok} of {self.asked} ok" if self.status is Status.OK and self.ok < self.asked else str(self.status)


@dataclass(frozen=True)
class Span:
    """Consecutive builds on which a group's state has the same sign."""

    state: GroupState
    """On the last of them."""
    first: str
    last: str
    """Versions of Triton."""


def state_of(outcomes: Sequence[CellOutcome]) -> GroupState | None:
    """What the outcomes of a group on one build come to; None for none."""
    if not outcomes:
        return None
    statuses = Counter(outcome.status for outcome in outcomes)
    if statuses[Status.OK] and not statuses[Status.WRONG]:
        status = Status.OK
    else:
        status = Status.WRONG if statuses[Status.WRONG] else min(statuses, key=SEVERITY.__getitem__)
    return GroupState(status, statuses[Status.OK], len(outcomes))


def rows(matrix: Matrix) -> Iterator[tuple[str, str, list[Probe]]]:
    """Operation, format, and the probes of both, in the matrix's order."""
    groups: dict[tuple[str, str], list[Probe]] = {}
    for probe in matrix.probes:
        groups.setdefault((probe.operation, probe.format), []).append(probe)
    return ((operation, fmt, probes) for (operation, fmt), probes in groups.items())


def states(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> list[GroupState | None]:
    """What a group does on an architecture, for each of the builds; None for one that was not asked."""
    every = range(len(matrix.builds))
    return [state_of([found for probe in probes if (found := matrix.outcome_of(probe, architecture, at)) is not None]) for at in every]


def spans(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> list[Span]:
    """The history of a group on an architecture, oldest first; builds that were not asked are left out."""
    found: list[Span] = []
    for build, state in zip(matrix.builds, states(matrix, probes, architecture), strict=True):
        if state is None:
            continue
        first = build.triton
        if found and found[-1].state.sign == state.sign:
            first = found.pop().first
        found.append(Span(state, first, build.triton))
    return found


def history_signs(history: Sequence[Span]) -> str:
    """``✓`` where nothing ever changed; else each sign with the version that it begins with: ``✗3.0 –3.2 ✓3.5.1``."""
    if len(history) == 1:
        return history[0].state.sign
    return " ".join(span.state.sign + span.first.removesuffix(".0") for span in history)


def history_text(history: Sequence[Span]) -> str:
    """``ok since 3.3.1``, ``never ok``, ``wrong 3.0.0–3.1.0, unsupported since 3.2.0``."""
    if not history:
        return "not asked"
    if len(history) == 1:
        state = history[0].state
        return "ok on every build" if state.status is Status.OK and state.ok == state.asked else f"{state.label} on every build"
    *before, last = history
    parts = [f"{span.state.label} {span.first if span.first == span.last else f'{span.first}–{span.last}'}" for span in before]
    return ", ".join([*parts, f"{last.state.label} since {last.first}"])


def causes(matrix: Matrix, position: int) -> list[tuple[CellOutcome, int, Counter[str]]]:
    """Why cells are not ok, or ok with a flag, on the build at that position: each outcome with how many cells, and how many of each row
    (of each probe, where what compiles is wrong: the others of its row need not be); most first."""
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

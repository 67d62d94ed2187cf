"""Attribute each change to a cause: the build, the machine, the suite itself, or noise. docs/notify.md has the rule.

A confirmed change is caused by the build: both builds were run on one machine, interleaved, with the same source of the
implementation. For any other change, the records of the two builds may show another cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fpxbench.counted import counted
from fpxbench.records.record import Build, Flag, Record
from fpxbench.records.store import Store
from fpxbench.regressions.change_report import ChangeReport, Direction, Event, MachineMove, State
from fpxbench.regressions.confirmation import ConfirmationOutcome
from fpxbench.regressions.result_changes import ResultChanges

COMES_AND_GOES = 3
"""An event is noise if its series changed at least this often within the 30 builds before."""
MACHINE_FACTS = {
    "driver": "driver", "power_limit_w": "power limit (W)", "memory_clock_mhz": "memory clock (MHz)",
    "cores": "cores", "threads": "threads",
}
"""Facts of a machine that change times and results on the same build."""
DISTURBED = {Flag.THROTTLED: "throttled", Flag.SHARED_DEVICE: "shared with another process"}


class Cause(StrEnum):
    """The cause of a change."""

    BUILD = "build"
    MACHINE = "machine"
    """A clock, throttling, a driver; or PyTorch's dense product, which cannot be told apart from them."""
    SUITE = "suite"
    """The implementation's source, or how fpxbench times it, was edited between the two builds."""
    NOISE = "noise"
    UNCONFIRMED = "unconfirmed"
    """A changed time that was not rerun, or rerun without a clear result."""


@dataclass(frozen=True)
class Movement:
    """A change with its cause."""

    cause: Cause
    reason: str
    """The reason for the cause, in one sentence."""
    change: ChangeReport | MachineMove

    @property
    def confirmed(self) -> bool:
        """Whether both builds were rerun and differ."""
        return isinstance(self.change, ChangeReport) and self.change.outcome is ConfirmationOutcome.CONFIRMED

    @property
    def calls(self) -> bool:
        """Whether to notify: the build caused it, it is for the worse, and it stands."""
        return (self.cause is Cause.BUILD and isinstance(self.change, ChangeReport) and self.change.stands
                and self.change.direction is Direction.WORSE)


def movements(results: Path, changes: ResultChanges) -> list[Movement]:
    """Return every change with its cause, in the order of `changes`. Reads the records of both builds of each
    unconfirmed change."""
    surroundings = _Surroundings(Store(results))
    return [
        *(Movement(*_cause(change, surroundings), change) for change in (*changes.suspects, *changes.events)),
        *(Movement(Cause.MACHINE, f"the dense product of the same runs moved too, {move.control:+z.1%}", move)
          for move in changes.machine),
    ]


def _cause(change: ChangeReport, surroundings: _Surroundings) -> tuple[Cause, str]:
    if change.outcome is ConfirmationOutcome.CONFIRMED:
        return Cause.BUILD, f"both builds were run again, interleaved: {change.message}"
    if change.implementation_changed:
        return Cause.SUITE, "the implementation's source was edited between the two builds"
    if surroundings.timed_differently(change):
        return Cause.SUITE, "fpxbench timed the two builds by different methods"
    if other := surroundings.difference(change):
        return Cause.MACHINE, other
    if change.state is State.REFUTED:
        return Cause.NOISE, f"both builds were run again, interleaved: {change.message}"
    if not isinstance(change, Event):
        return Cause.UNCONFIRMED, (
            f"not clear when run again: {change.message}" if change.message
            else f"not run again: fpxbench confirm {change.id}")
    if change.changes_before >= COMES_AND_GOES:
        return Cause.NOISE, f"the series changed {counted(change.changes_before, 'time')} in the builds before"
    return Cause.BUILD, f"differs from the build before; not run again: fpxbench confirm {change.id}"


@dataclass(frozen=True)
class _Point:
    """The conditions under which a record was measured."""

    facts: dict[str, object]
    disturbed: frozenset[Flag]
    """The record's flags that are in `DISTURBED`."""
    method: int | None
    """`Timing.method`; None if it was not timed."""


class _Surroundings:
    """The conditions of all cases, read from the records and cached by machine and build."""

    def __init__(self, store: Store[Record]) -> None:
        self._store = store
        self._files: dict[tuple[str, str], dict[tuple[str, str], _Point]] = {}

    def timed_differently(self, change: ChangeReport) -> bool:
        """Return whether a changed time was measured by another method before."""
        before, after = self._points(change)
        return (change.series.metric == "median_us" and before is not None and after is not None
                and before.method != after.method)

    def difference(self, change: ChangeReport) -> str:
        """Return how the conditions of the two builds' runs differ, in one sentence; "" if no difference is known."""
        before, after = self._points(change)
        if before is None or after is None:
            return ""
        changed = [f"{words} {before.facts[name]} -> {after.facts[name]}" for name, words in MACHINE_FACTS.items()
                   if name in before.facts and name in after.facts and before.facts[name] != after.facts[name]]
        if changed:
            return f"the machine differs between the two runs: {', '.join(changed)}"
        if change.series.metric == "median_us" and (differ := before.disturbed ^ after.disturbed):
            flag = min(differ)
            which = "later" if flag in after.disturbed else "earlier"
            return f"the device was {DISTURBED[flag]} in the run on the {which} build only"
        return ""

    def _points(self, change: ChangeReport) -> tuple[_Point | None, _Point | None]:
        return self._point(change, change.last_good), self._point(change, change.first_bad)

    def _point(self, change: ChangeReport, build: Build) -> _Point | None:
        name = change.series.machine, build.stem
        if name not in self._files:
            self._files[name] = dict(self._read(change.series.machine, build))
        return self._files[name].get((change.series.device, change.series.case))

    def _read(self, machine: str, build: Build) -> Iterator[tuple[tuple[str, str], _Point]]:
        path = self._store.file(machine, build)
        if path.is_file():
            for record in self._store.read(path)[0]:
                yield ((f"{record.machine.device} ({record.machine.arch})", record.case.id),
                       _Point({name: record.machine.facts[name] for name in MACHINE_FACTS
                               if name in record.machine.facts}, frozenset(record.flags) & DISTURBED.keys(),
                              record.timing.method if record.timing else None))


"""Schedule the cases of builds on kinds of machines, in batches for devices. Knows neither Ray nor files.

A *cell* is one build on one kind. Each of its cases is in exactly one state: `todo`, in a running `Batch`, in a batch
whose worker ended and whose spool was not delivered yet (`lost`), done, or given up.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from fpxbench.builds.environments.specification import EnvironmentSpec
from fpxbench.builds.timeline import Entry
from fpxbench.fleet.fleet_messages import DeviceType, TaskEnd
from fpxbench.records.case import Case
from fpxbench.records.record import Build

LARGEST_BATCH = 64
"""A larger batch loses more with a device; a smaller one spends its time starting sweeps (PyTorch, the bandwidth)."""
SMALLEST_BATCH = 8
"""At the end of a cell, batches shrink to this size, so that the devices finish together."""
MOST_ENDS = 3
"""A case during which this many tasks ended early is given up: it crashes its process or its node."""


@dataclass
class Batch:
    """A task's cases that have no record yet, in the order in which they run."""

    task: str
    cell: Cell
    seat: str
    remaining: dict[str, Case]


@dataclass
class Cell:
    """One build on one kind of machine."""

    spec: EnvironmentSpec
    kind: str
    device: DeviceType
    planned: bool = False
    planning_by: str = ""
    """The seat that is listing the cases."""
    total: int = 0
    done: set[str] = field(default_factory=set)
    todo: dict[str, Case] = field(default_factory=dict)
    running: dict[str, Batch] = field(default_factory=dict)
    lost: dict[str, Batch] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    """By case, the reason."""
    ends: Counter[str] = field(default_factory=Counter)
    """By case, the number of tasks that ended during it."""
    refused_by: dict[str, str] = field(default_factory=dict)
    """By seat, why it cannot measure this build."""
    failure: str = ""
    """Why the build cannot be measured on this kind at all."""
    build: Build | None = None
    """The build that its environment reports; None until the cases are listed."""

    @classmethod
    def without_environment(cls, entry: Entry, kind: str, device: DeviceType, reason: str) -> Cell:
        """Return the cell of a build that no index offers for `device`."""
        spec = EnvironmentSpec(key=entry.key, tag=entry.tag, variant=device, requirements=(), build=Build(
            torch=entry.torch, channel=entry.channel, variant=device, date=entry.date, key=entry.key))
        return cls(spec, kind, device, failure=reason)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: all cases are measured, given up, or impossible."""
        return bool(self.failure) or self.planned and not (self.todo or self.running or self.lost)

    @property
    def complete(self) -> bool:
        """Whether every case was measured."""
        return self.planned and self.finished and not self.given_up and not self.failure

    def plan(self, cases: list[Case], done: set[str]) -> None:
        """Take the list of cases, of which `done` have records."""
        self.planned, self.planning_by = True, ""
        self.total = len(cases)
        self.done = {case.id for case in cases if case.id in done}
        self.todo = {case.id: case for case in cases if case.id not in done}

    def take(self, task: str, seat: str, seats: int) -> Batch:
        """Move the next cases to a batch for `seat`, one of `seats` that share this cell."""
        size = max(SMALLEST_BATCH, min(LARGEST_BATCH, len(self.todo) // (2 * max(seats, 1))))
        ids = list(self.todo)
        # A case that ended a task runs alone, so that it affects no other.
        chosen = ids[:1] if self.ends[ids[0]] else [case_id for case_id in ids[:size] if not self.ends[case_id]]
        batch = Batch(task, self, seat, {case_id: self.todo.pop(case_id) for case_id in chosen})
        self.running[task] = batch
        return batch

    def measured(self, case_id: str) -> None:
        """Note that a case has a record, whichever batch it came from."""
        self.done.add(case_id)
        self.todo.pop(case_id, None)
        for batch in (*self.running.values(), *self.lost.values()):
            batch.remaining.pop(case_id, None)

    def ended(self, task: str, end: TaskEnd) -> None:
        """Note how a task ended, after its last record. Cases without a record go back to `todo`, or are given up."""
        batch = self.running.pop(task, None) or self.lost.pop(task, None)
        if batch is None:
            return
        if end.status == "done":
            self.given_up |= dict.fromkeys(batch.remaining, "its sweep ended without a record of it")
            return
        if end.status == "ended" and batch.remaining:
            suspect = next(iter(batch.remaining))
            self.ends[suspect] += 1
            if self.ends[suspect] >= MOST_ENDS:
                self.given_up[suspect] = f"{self.ends[suspect]} tasks ended during it, the last one: {end.message}"
                del batch.remaining[suspect]
        # Suspects last, so that the others are measured first.
        self.todo = dict(sorted((self.todo | batch.remaining).items(), key=lambda item: self.ends[item[0]] > 0))

    def lose(self, task: str, spool_may_return: bool) -> None:
        """Note that a task's worker ended. Its cases wait for its spool if the node is alive, else go back to `todo`.
        """
        batch = self.running.pop(task, None)
        if batch is not None:
            self.lost[task] = batch
            if not spool_may_return:
                self.ended(task, TaskEnd(status="ended", message="its node ended"))


class Schedule:
    """All cells, in order of priority; devices of a kind share a build before they begin the next."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], Cell] = {}

    def add(self, cell: Cell) -> None:
        self.cells.setdefault((cell.spec.key, cell.kind), cell)

    def of_kind(self, kind: str) -> list[Cell]:
        return [cell for cell in self.cells.values() if cell.kind == kind]

    def next_for(self, seat: str, kind: str) -> Cell | None:
        """Return the next cell for `seat`: to list its cases if it is not planned, else to measure some."""
        for cell in self.of_kind(kind):
            if cell.failure or seat in cell.refused_by:
                continue
            if not cell.planned and not cell.planning_by or cell.todo:
                return cell
        return None

    def refuse(self, cell: Cell, seat: str, reason: str, seats: set[str]) -> None:
        """Note that `seat` cannot measure a cell. If none of the kind's `seats` can, the cell fails."""
        cell.refused_by[seat] = reason
        if seats <= set(cell.refused_by):
            cell.failure = reason

    @property
    def finished(self) -> bool:
        return all(cell.finished for cell in self.cells.values())

"""The driver of a fleet: assigns tasks to devices, stores their records, and continues when a device fails.

It is one thread with one loop. All durable state is in the store and the nodes' spools: the driver can end at any
time, and the next one continues.
"""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fpxbench.builds.environments import Installation, NotOffered
from fpxbench.builds.environments.specification import EnvironmentState
from fpxbench.builds.installer import LOG_TAIL_BYTES
from fpxbench.builds.timeline import Entry, Timeline, TimelineError
from fpxbench.counted import counted
from fpxbench.fleet import cluster
from fpxbench.fleet.builds import spec_for
from fpxbench.fleet.device_comparison import DeviceComparison
from fpxbench.fleet.fleet_messages import (
    MOST_CASES,
    Delivery,
    Device,
    DeviceType,
    SweepOptions,
    Task,
    TaskEnd,
)
from fpxbench.fleet.inbox import Arrival, Inbox
from fpxbench.fleet.rates import Rates
from fpxbench.fleet.roster import COLLECT_WITHIN_S, NODES_EVERY_S, WAIT_S, Roster
from fpxbench.fleet.schedule import Cell
from fpxbench.fleet.seats import Running, SeatRun
from fpxbench.fleet.spread import DeviceSpread
from fpxbench.fleet.state import CellState, FleetFolder, FleetState
from fpxbench.records.record import Machine, Record, now
from fpxbench.records.store import Store
from fpxbench.user_error import UserError

STATE_EVERY_S = 1.0
POLL_S = 1.0
"""How long a node waits for a record before it replies without one."""
MOST_FRUITLESS = 3
STOP_WITHIN_S = 15.0


@dataclass(frozen=True)
class Request:
    """The options of ``fpxbench fleet run``."""

    entries: list[Entry]
    """In the order of the timeline."""
    results: Path
    options: SweepOptions = field(default_factory=SweepOptions)
    device: DeviceType | None = None
    """None: the GPUs of the cluster, or its CPUs if it has none."""
    machines: tuple[str, ...] = ()
    """Globs over kinds; empty: all."""
    variants: tuple[str, ...] = ()
    retry: bool = False
    patience_s: float = 600.0
    """How long to wait for a device that can measure the remaining cases."""


class NoMatchingDevice(UserError):
    """The cluster has none of the requested devices."""


class Driver(Roster):
    """One run of a fleet.

    Parameters
    ----------
    say : called with each message for the user
    show : called with the state, about twice a second
    """

    def __init__(self, request: Request, timeline: Timeline, say: Callable[[str], None],
                 show: Callable[[FleetState], None]) -> None:
        super().__init__(request.device, request.machines, self._told)
        self._request, self._timeline, self._say_aloud, self._show = request, timeline, say, show
        self._folder = FleetFolder(request.results)
        self._store: Store[Record] = Store(request.results)
        self._inbox = Inbox(self._store, timing=request.options.timing)
        self._state = FleetState(host=platform.node(), pid=os.getpid(), builds=[each.tag for each in request.entries])
        self._statuses: dict[tuple[str, str], Counter] = {}
        self._stopping = False
        self._next_nodes = self._next_state = 0.0
        self._stuck_since: float | None = None
        self._comparison = DeviceComparison(request.results)
        self._rates = Rates()

    def run(self) -> FleetState:
        """Measure until nothing is left to do, and return the final state. The cluster must be connected.

        Ctrl-C ends the run and keeps all records (`ended` is ``interrupted``). Raise NoMatchingDevice, AnotherRun, and
        NoCluster.
        """
        self._store.make_folder()
        with self._folder.locked() as self._fleet:
            before = self._folder.read()
            if before is not None and before.ended in ("", "interrupted"):
                self._collect_until = time.monotonic() + COLLECT_WITHIN_S
            try:
                while not self._over():
                    self._step()
                complete = bool(self._schedule.cells) and all(c.complete for c in self._schedule.cells.values())
                self._state.ended = "complete" if complete else "incomplete"
            except KeyboardInterrupt:
                self._state.ended = "interrupted"
                self._drain()
            finally:
                for seat in self._seats.values():
                    self._release(seat)
                self._publish(force=True)
        return self._state

    # The loop.

    def _step(self) -> None:
        if time.monotonic() >= self._next_nodes:
            self._look_at_nodes()
            self._next_nodes = time.monotonic() + NODES_EVERY_S
        returned = cluster.ready([*self._calls, *self._versions], WAIT_S)
        if not returned and not (self._calls or self._versions):
            time.sleep(WAIT_S)
        for call in returned:
            if call in self._versions:
                self._version(self._versions.pop(call), call)
            elif call in self._calls:       # its node may have gone in the meantime
                self._returned(call)
        self._give_tasks()
        self._publish()

    # Cells and tasks.

    def _add_cells(self, seat: SeatRun, device: Device) -> None:
        """Add every build on the kind of a new device, the newest first."""
        for entry in reversed(self._request.entries):
            if (entry.key, seat.kind) in self._schedule.cells:
                continue
            try:
                spec = spec_for(entry, device, self._request.variants)
                cell = Cell(spec, seat.kind, seat.type)
            except NotOffered as refusal:
                cell = Cell.without_environment(entry, seat.kind, seat.type, str(refusal))
                self._say(f"{seat.kind}: {refusal}")
            self._schedule.add(cell)

    def _give_tasks(self) -> None:
        for seat in self._seats.values():
            if not seat.idle:
                continue
            cell = self._schedule.next_for(seat.id, seat.kind)
            if cell is None:
                continue
            task_id = self._new_id()
            if not cell.planned:
                cell.planning_by = seat.id
                self._start(seat, cell, Task(id=task_id, purpose="plan", **self._common(cell)))
            elif not self._collecting(seat.kind):
                batch = cell.take(task_id, seat.id, len(self._usable(seat.kind)))
                self._start(seat, cell, Task(id=task_id, purpose="measure", cases=list(batch.remaining.values()),
                                             **self._common(cell)))
        for seat, cell, cases in self._comparison.next_tasks(self._schedule, self._seats.values()):
            self._start(seat, cell, Task(id=self._new_id(), purpose="spread", cases=cases, **self._common(cell)))
        for found in self._comparison.results():
            Store(self._request.results, DeviceSpread).append(found)
            self._state.spreads.append(found.message())
            self._say(found.message())

    def _common(self, cell: Cell) -> dict:
        return {"spec": cell.spec, "kind": cell.kind, "device": cell.device, "options": self._request.options,
                "retry": self._request.retry}

    def _start(self, seat: SeatRun, cell: Cell, task: Task) -> None:
        seat.running, seat.doing = Running.of(task, cell), "starting"
        self._call(seat, self._started, "start", task.model_dump_json(by_alias=True))

    def _started(self, seat: SeatRun, reply: object) -> None:
        if seat.running is not None:
            self._poll(seat, seat.running)

    def _poll(self, seat: SeatRun, running: Running) -> None:
        self._call(seat, self._delivered, "poll", running.task.id, running.offset, POLL_S)

    def _delivered(self, seat: SeatRun, reply: str) -> None:
        delivery = Delivery.model_validate_json(reply)
        running = seat.running
        if running is None:
            raise ValueError("a delivery without a task")
        running.offset = delivery.offset
        for line in delivery.lines:
            self._take(seat, running, line)
        if delivery.state:
            seat.doing = delivery.state
        if delivery.end is None:
            self._poll(seat, running)
            return
        self._task_ended(seat, running, delivery.end)
        if running.cell is not None and running.cell.build is not None:
            self._inbox.flush(running.task.kind, running.cell.build)
        if seat.worker is not None:
            self._call(seat, self._finished, "finish", running.task.id)

    def _finished(self, seat: SeatRun, reply: object) -> None:
        seat.running, seat.doing = None, "idle"
        self._next_leftover(seat)

    def _take(self, seat: SeatRun, running: Running, line: str) -> None:
        """Store one line of a delivery, and note its case as measured."""
        if running.task.purpose == "spread":
            if not running.left_behind:     # of an ended worker: its devices did not run at the same time as these
                with suppress(ValueError):
                    self._comparison.add(seat, running.asked.read(line))
            return
        arrival, record, reason = self._inbox.take(line, running.asked, seat.metadata())
        if record is None:
            self._state.refused += 1
            if self._state.refused <= 10:
                self._say(f"{seat.label} sent a line that is refused: {reason}")
            return
        if arrival is Arrival.STORED:
            running.stored += 1
            self._state.stored += 1
            kind = running.task.kind
            self._rates.stored(kind)
            self._statuses.setdefault((running.task.spec.key, kind), Counter())[record.verdict.status] += 1
        elif arrival is Arrival.REPEATED:
            self._state.repeated += 1
        else:
            self._state.superseded += 1
        if running.cell is not None:
            running.cell.measured(record.case.id)

    def _task_ended(self, seat: SeatRun, running: Running, end: TaskEnd) -> None:
        cell, task = running.cell, running.task
        if not running.left_behind:
            seat.fruitless = 0 if running.stored or end.status == "done" else seat.fruitless + 1
        seat.owed = [pair for pair in seat.owed if pair[1] != task.id]
        if running.left_behind and running.stored:
            self._say(f"{seat.label}: fetched {counted(running.stored, 'record')} of {task.spec.tag} that an ended "
                      "worker left there")
        if task.purpose == "spread" or cell is None:
            if not running.left_behind:
                self._comparison.ended(seat)
            return
        if task.purpose == "plan":
            if not running.left_behind:     # a plan whose worker ended is made again: the build may be fine
                self._plan_ended(seat, cell, end)
        else:
            cell.ended(task.id, end)
        if end.status == "not_installed":
            cell.failure = end.message
            self._say(f"{cell.kind}: {end.message}")
            if end.installation is not None and seat.device is not None:
                self._record_failure(seat.device, end.installation)
        elif end.status == "cannot_start":
            self._say(f"{seat.label}: {cell.spec.tag} cannot be measured there: {end.message}")
            self._schedule.refuse(cell, seat.id, end.message, self._usable(cell.kind))
        elif end.status in ("disk_full", "unavailable"):
            for other in list(self._seats.values()):
                if other.node.id == seat.node.id:
                    self._set_out(other, end.message)
        elif end.status == "ended" and not running.left_behind and not self._stopping:
            self._say(f"{seat.label}: a task of {cell.spec.tag} ended early, after "
                      f"{counted(running.stored, 'record')}: {end.message}")
            if seat.fruitless >= MOST_FRUITLESS:
                self._set_out(seat, f"{counted(seat.fruitless, 'task')} in a row ended without a record: {end.message}")

    def _comparison_ended(self, seat: SeatRun) -> None:
        self._comparison.ended(seat)

    def _plan_ended(self, seat: SeatRun, cell: Cell, end: TaskEnd) -> None:
        cell.planning_by = ""
        if end.plan is None or end.build is None:
            if end.status == "ended":
                self._schedule.refuse(cell, seat.id, end.message, self._usable(cell.kind))
            return
        cases = [planned.case for planned in end.plan.cases[:MOST_CASES]]
        cell.build = end.build
        for line in end.plan.not_loaded[:10]:
            self._say(f"{cell.kind}: not loaded: {line[:400]}")
        cell.plan(cases, self._inbox.measured(cell.kind, end.build, end.plan.sources, [case.id for case in cases]))

    def _record_failure(self, device: Device, state: EnvironmentState) -> None:
        """Record that a build does not install on a kind: with the results, and on the timeline."""
        machine = Machine(name=device.kind, device=device.name, arch="", host=device.node, kind=device.type)
        spec, store = state.spec, Store(self._request.results, Installation)
        path = store.file(machine.name, spec.build)
        if path.exists() and any(each.at == state.made_at for each in store.read(path)[0]):
            return
        store.append(Installation(
            at=state.made_at, machine=machine, build=spec.build, parts=spec.parts, python=spec.python,
            installer=state.installer, status="failed", why=state.why, log_tail=state.log_tail))
        try:
            self._timeline.failed_to_install(spec.key, spec.variant, state.log_tail[-LOG_TAIL_BYTES:])
        except TimelineError as error:
            self._say(str(error))

    # The end of a run, and its progress.

    def _over(self) -> bool:
        """Return whether all cases are done, or no device has been able to continue for `patience_s`."""
        if not self._next_nodes:        # the nodes are not known yet
            return False
        working = any(seat.running is not None or seat.owed or seat.awaited for seat in self._seats.values())
        if self._schedule.cells and self._schedule.finished and not working \
                and all(self._comparison.is_over(seat.kind) for seat in self._seats.values() if seat.idle) \
                and not self._versions and not any(seat.device is None and not seat.out
                                                   for seat in self._seats.values()):
            return True
        able = working or any(
            seat.idle and self._schedule.next_for(seat.id, seat.kind) is not None for seat in self._seats.values())
        if able:
            self._stuck_since = None
            return False
        pending = self._versions or any(not seat.out for seat in self._seats.values())
        if not self._schedule.cells and not pending:
            raise NoMatchingDevice(self._why_no_device())
        self._stuck_since = self._stuck_since or time.monotonic()
        if time.monotonic() - self._stuck_since < self._request.patience_s:
            return False
        self._say(f"nothing could be done for {self._request.patience_s:.0f} s: {self._what_is_missing()}")
        return True

    def _why_no_device(self) -> str:
        if self._others:
            return (f"--machines {' '.join(self._request.machines)} matches no device of the cluster, which has "
                    f"{', '.join(sorted(self._others))}")
        reasons = [*self._state.messages, *(f"{seat.label}: {seat.out}" for seat in self._seats.values())]
        what = "GPU" if self._device == "cuda" else "CPU"
        return f"the cluster has no {what} to measure on" + (f": {'; '.join(reasons[:5])}" if reasons else "")

    def _what_is_missing(self) -> str:
        kinds = sorted({cell.kind for cell in self._schedule.cells.values() if not cell.finished})
        waiting = [seat.label for seat in self._seats.values() if seat.device is None and not seat.out]
        parts = [f"no device is left that can measure the rest on {', '.join(kinds)}"] if kinds else []
        parts += [f"Ray did not have {', '.join(waiting)} free"] if waiting else []
        return "; ".join(parts)

    def _drain(self) -> None:
        """Stop every task and fetch its records. Records that do not arrive in time stay in the spools."""
        self._stopping = True
        self._say("interrupted; fetching the records")
        until = time.monotonic() + STOP_WITHIN_S
        with suppress(KeyboardInterrupt):
            for seat in self._seats.values():
                if seat.running is not None and seat.worker is not None:
                    if not seat.calls:
                        self._poll(seat, seat.running)
                    self._call(seat, lambda seat, reply: None, "stop")
            while time.monotonic() < until and any(seat.running for seat in self._seats.values()):
                for call in cluster.ready(list(self._calls), WAIT_S):
                    if call in self._calls:
                        self._returned(call)

    def _told(self, sentence: str) -> None:
        self._state.messages = [*self._state.messages, sentence][-200:]
        self._say_aloud(sentence)

    def _publish(self, force: bool = False) -> None:
        if not force and time.monotonic() < self._next_state:
            return
        self._next_state = time.monotonic() + STATE_EVERY_S
        state = self._state
        state.at = now()
        state.cells = [self._cell_state(cell) for cell in self._schedule.cells.values()]
        state.seats = [seat.state() for seat in self._seats.values()]
        state.seconds_left = self._rates.seconds_left(self._schedule)
        self._folder.write(state)
        self._show(state)

    def _cell_state(self, cell: Cell) -> CellState:
        return CellState(
            build=cell.spec.tag, machine=cell.kind, total=cell.total if cell.planned else None, done=len(cell.done),
            given_up=cell.given_up, failure=cell.failure, file=self._file(cell),
            statuses=dict(self._statuses.get((cell.spec.key, cell.kind), {})))

    def _file(self, cell: Cell) -> str:
        path = self._store.file(cell.kind, cell.build) if cell.build is not None else None
        return str(path.relative_to(self._request.results)) if path is not None else ""

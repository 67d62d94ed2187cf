"""The driver of a fleet: gives devices their tasks, stores what comes home, and goes on when a device does not.

One thread, one loop. A worker has at most one call in flight. What is durable is the store and the nodes' spools: the
driver can end at any time, and the next one continues.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import fpxbench
from fpxbench.builds.environments import Installation, NotOffered
from fpxbench.builds.environments.specification import EnvironmentState
from fpxbench.builds.timeline import Entry, Timeline, TimelineError
from fpxbench.fleet import cluster
from fpxbench.fleet.builds import spec_for
from fpxbench.fleet.inbox import Arrival, Inbox
from fpxbench.fleet.messages import (
    MOST_CASES,
    Delivery,
    DeviceType,
    Hello,
    Seat,
    SweepOptions,
    Task,
    TaskEnd,
    source_digest,
)
from fpxbench.fleet.schedule import Cell, Schedule
from fpxbench.fleet.seats import Running, SeatRun, clock_difference
from fpxbench.fleet.spread import DeviceSpread, cases_to_compare, spreads
from fpxbench.fleet.state import CellState, FleetFolder, FleetState
from fpxbench.records.record import Machine, Record, now
from fpxbench.records.store import Store

NODES_EVERY_S = 2.0
STATE_EVERY_S = 1.0
WAIT_S = 0.5
POLL_S = 1.0
"""How long a node waits for a record before it answers that there is none."""
MOST_DEATHS = 5
"""A device whose worker ended so often gets no more tasks."""
MOST_FRUITLESS = 3
MOST_HELLOS = 10
"""How often a new worker is asked for the spool of the one before it, once a second."""
CLOCK_NOTICE_S = 2.0
STOP_WITHIN_S = 15.0
LARGEST_REPLY = 64 << 20


@dataclass(frozen=True)
class Request:
    """What ``fpxbench fleet run`` was asked for."""

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
    """How long to wait for a device that can do what is left."""


class NoDevice(RuntimeError):
    """The cluster has no device of those that were asked for."""


class Driver:
    """One run of a fleet.

    Parameters
    ----------
    say : called with each sentence that a user should read
    show : called with the state, about twice a second
    """

    def __init__(self, request: Request, timeline: Timeline, say: Callable[[str], None],
                 show: Callable[[FleetState], None]) -> None:
        self._request, self._timeline, self._say_aloud, self._show = request, timeline, say, show
        self._folder = FleetFolder(request.results)
        self._store: Store[Record] = Store(request.results)
        self._inbox = Inbox(self._store)
        self._schedule = Schedule()
        self._seats: dict[str, SeatRun] = {}
        self._nodes: dict[str, cluster.Node] = {}
        self._versions: dict[cluster.Call, cluster.Node] = {}
        self._calls: dict[cluster.Call, tuple[SeatRun, Callable[[SeatRun, str], None]]] = {}
        self._state = FleetState(host=platform.node(), pid=os.getpid(), builds=[each.tag for each in request.entries])
        self._statuses: dict[tuple[str, str], Counter] = {}
        self._fleet = ""
        self._stopping = False
        self._device = request.device
        self._others: set[str] = set()
        """Kinds that --machines leaves out."""
        self._next_nodes = self._next_state = 0.0
        self._stuck_since: float | None = None
        self._spread: dict[str, dict[str, Running]] = {}
        """By kind, the tasks of its spread by device; a kind that was compared, or need not be, has none."""
        self._stored_at: dict[str, list[float]] = {}
        """By kind: the first and the latest time at which a record of it was stored."""
        self._stored_of: Counter[str] = Counter()

    def run(self) -> FleetState:
        """Measure until nothing is left to do, and return how it ended. The cluster is joined already.

        Ctrl-C ends it with what is measured (`ended` is ``interrupted``). Raise NoDevice, AnotherRun, NoCluster.
        """
        self._store.make_folder()
        with self._folder.locked() as self._fleet:
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
            elif call in self._calls:       # not of a node that went meanwhile
                self._returned(call)
        self._give_tasks()
        self._publish()

    def _returned(self, call: cluster.Call, timeout_s: float | None = None) -> None:
        seat, then = self._calls.pop(call)
        seat.calls -= 1
        try:
            value = cluster.result(call, timeout_s)
            if isinstance(value, str) and len(value) > LARGEST_REPLY:
                raise ValueError(f"an answer of {len(value) >> 20} MB")
            then(seat, value)
        except (cluster.WorkerEnded, ValueError) as error:   # ValueError: pydantic's, for an answer that is none
            self._worker_ended(seat, str(error))

    def _call(self, seat: SeatRun, then: Callable, method: str, *arguments: object) -> None:
        seat.calls += 1
        self._calls[seat.worker.call(method, *arguments)] = (seat, then)

    # Nodes and workers.

    def _look_at_nodes(self) -> None:
        alive = {node.id: node for node in cluster.nodes()}
        for node_id in self._nodes.keys() - alive.keys():
            self._node_ended(self._nodes.pop(node_id))
        if self._device is None and alive:
            self._device = "cuda" if any(node.gpus for node in alive.values()) else "cpu"
        for node in alive.values():
            if node.id not in self._nodes:
                self._nodes[node.id] = node
                self._versions[cluster.ask_version(node)] = node
        for seat in self._seats.values():
            if seat.out or time.monotonic() < seat.next_at:
                continue
            if seat.worker is None:
                self._begin(seat)
            elif seat.owed and not seat.calls and not seat.leftovers and seat.running is None:
                self._call(seat, self._said_hello, "hello")

    def _version(self, node: cluster.Node, call: cluster.Call) -> None:
        """Open the seats of a node whose fpxbench is this one."""
        try:
            found = cluster.read_version(cluster.result(call))
        except cluster.WorkerEnded as error:
            self._say(f"node {node.label} does not answer, and is left out: {error}")
            return
        here, theirs = (fpxbench.__version__, source_digest()), (found.get("version", ""), found.get("source", ""))
        if theirs != here:
            what = f"fpxbench {theirs[0]} (source {theirs[1] or 'unknown'})" if theirs[0] else "no fpxbench"
            self._say(f"node {node.label} is left out: it has {what} in {found.get('python')}, and the driver has "
                      f"{here[0]} (source {here[1]}). Install the same on every node: pip install "
                      f"'fpxbench[fleet]=={here[0]}', or the same checkout")
            return
        count = node.gpus if self._device == "cuda" else min(node.cpus, 1)
        offers = node.gpus or node.cpus     # a head node may be told to offer nothing
        if not count and offers and self._request.device is not None:
            self._say(f"node {node.label} is left out: it has no {'GPU' if self._device == 'cuda' else 'CPU'} that Ray "
                      f"may use, and --device {self._device} asks for one")
        for number in range(count):
            seat = Seat(fleet=self._fleet, device=self._device, machine=node.machine,
                        accelerator_type=node.accelerator_type, share=number, shares=count)
            seat_id = f"{node.id[:16]}-{self._device}{number}"
            self._seats[seat_id] = SeatRun(seat_id, node, self._device, seat)
            self._begin(self._seats[seat_id])

    def _begin(self, seat: SeatRun) -> None:
        seat.worker = cluster.start_worker(seat.node, seat.type, seat.seat)
        seat.doing, seat.hellos = "waiting for the device", 0
        self._call(seat, self._said_hello, "hello")

    def _said_hello(self, seat: SeatRun, reply: str) -> None:
        hello = Hello.model_validate_json(reply)
        globs = self._request.machines
        if globs and not any(fnmatchcase(hello.device.kind, glob) for glob in globs):
            seat.out = "not asked for"
            self._others.add(hello.device.kind)
            self._release(seat)
            return
        if seat.device is None or seat.clock is None:
            seat.device = hello.device
            self._compare_clocks(seat)
            self._add_cells(seat)
        seat.leftovers = [Running.of(task, self._schedule.cells.get((task.spec.key, task.kind)))
                          for task in hello.leftovers]
        seat.hellos += 1
        self._next_leftover(seat)

    def _compare_clocks(self, seat: SeatRun) -> None:
        seat.clock = clock_difference(lambda: float(cluster.result(seat.worker.call("clock"), WAIT_S * 20)), time.time)
        offset, uncertainty = seat.clock
        if abs(offset) > CLOCK_NOTICE_S + uncertainty:
            self._say(f"the clock of {seat.label} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the "
                      "driver's: started_at in its records is the node's time, and the offset is recorded with it")

    def _next_leftover(self, seat: SeatRun) -> None:
        """Fetch the next spool that an ended worker left, or decide that no other is to be expected."""
        if seat.leftovers:
            seat.doing = "delivering what an ended worker left"
            seat.running = seat.leftovers.pop(0)
            self._poll(seat)
            return
        seat.running = None
        if seat.owed and seat.hellos < MOST_HELLOS:     # the ended worker's process may still hold its spool
            seat.next_at = time.monotonic() + 1.0
            return
        for cell, task in seat.owed:
            cell.ended(task, TaskEnd(status="ended", message="its worker ended"))
        seat.owed, seat.doing = [], "idle"

    def _worker_ended(self, seat: SeatRun, reason: str) -> None:
        """Keep the cases of a worker's task apart until its spool is delivered, and start the next worker."""
        if seat.running is not None and seat.running.cell is not None:
            self._task_lost(seat, seat.running, spool_may_return=True)
        self._release(seat)
        seat.running, seat.leftovers, seat.doing = None, [], "restarting"
        seat.deaths += 1
        seat.next_at = time.monotonic() + 1.0
        if seat.deaths >= MOST_DEATHS:
            self._set_out(seat, f"its worker ended {seat.deaths} times, the last time: {reason}")

    def _node_ended(self, node: cluster.Node) -> None:
        gone = [seat for seat in self._seats.values() if seat.node.id == node.id]
        if gone:
            self._say(f"node {node.label} is gone; what its {len(gone)} devices had not finished goes to others of "
                      "their kind")
        for seat in gone:
            if seat.running is not None and seat.running.cell is not None:
                self._task_lost(seat, seat.running, spool_may_return=False)
            for cell, task in seat.owed:
                cell.ended(task, TaskEnd(status="ended", message="its node ended"))
            del self._seats[seat.id]
        self._calls = {call: pair for call, pair in self._calls.items() if pair[0].node.id != node.id}

    def _task_lost(self, seat: SeatRun, running: Running, spool_may_return: bool) -> None:
        cell, task = running.cell, running.task
        if task.purpose == "plan":
            cell.planning_by = ""
        elif task.purpose == "measure" and task.id in cell.running:
            cell.lose(task.id, spool_may_return)
            if spool_may_return:
                seat.owed.append((cell, task.id))
        self._spread.get(seat.kind, {}).pop(seat.id, None)

    def _release(self, seat: SeatRun) -> None:
        """End a seat's worker, and forget its calls."""
        if seat.worker is not None:
            seat.worker.end()
        seat.worker, seat.calls = None, 0
        self._calls = {call: pair for call, pair in self._calls.items() if pair[0] is not seat}

    def _set_out(self, seat: SeatRun, reason: str) -> None:
        """Give a device no more tasks in this run."""
        if not seat.out:
            self._say(f"{seat.label} gets no more tasks: {reason}")
        seat.out = reason
        for cell, task in seat.owed:
            cell.ended(task, TaskEnd(status="ended", message=reason))
        seat.owed = []
        for cell in self._schedule.of_kind(seat.kind):
            if cell.refused_by:
                self._schedule.refuse(cell, seat.id, reason, self._usable(seat.kind) | {seat.id})

    def _usable(self, kind: str) -> set[str]:
        return {seat.id for seat in self._seats.values() if seat.kind == kind and not seat.out}

    # Cells and tasks.

    def _add_cells(self, seat: SeatRun) -> None:
        """Add every build on the kind of a new device, the newest first."""
        for entry in reversed(self._request.entries):
            if (entry.key, seat.kind) in self._schedule.cells:
                continue
            try:
                spec = spec_for(entry, seat.device, self._request.variants)
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
            task_id = secrets.token_hex(8)
            if not cell.planned:
                cell.planning_by = seat.id
                self._start(seat, cell, Task(id=task_id, purpose="plan", **self._common(cell)))
            else:
                batch = cell.take(task_id, seat.id, len(self._usable(seat.kind)))
                self._start(seat, cell, Task(id=task_id, purpose="measure", cases=list(batch.remaining.values()),
                                             **self._common(cell)))
        self._compare_devices()

    def _common(self, cell: Cell) -> dict:
        return {"spec": cell.spec, "kind": cell.kind, "device": cell.device, "options": self._request.options,
                "retry": self._request.retry}

    def _start(self, seat: SeatRun, cell: Cell, task: Task) -> None:
        seat.running, seat.doing = Running.of(task, cell), "starting"
        self._call(seat, self._started, "start", task.model_dump_json(by_alias=True))

    def _started(self, seat: SeatRun, reply: object) -> None:
        self._poll(seat)

    def _poll(self, seat: SeatRun) -> None:
        self._call(seat, self._delivered, "poll", seat.running.task.id, seat.running.offset, POLL_S)

    def _delivered(self, seat: SeatRun, reply: str) -> None:
        delivery = Delivery.model_validate_json(reply)
        running = seat.running
        running.offset = delivery.offset
        for line in delivery.lines:
            self._take(seat, running, line)
        if delivery.state:
            seat.doing = delivery.state
        if delivery.end is None:
            self._poll(seat)
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
            with suppress(ValueError):
                running.records.append(running.asked.read(line))
            return
        arrival, record, reason = self._inbox.take(line, running.asked, seat.metadata())
        if arrival is Arrival.REFUSED:
            self._state.refused += 1
            if self._state.refused <= 10:
                self._say(f"{seat.label} sent a line that is refused: {reason}")
            return
        if arrival is Arrival.STORED:
            running.stored += 1
            self._state.stored += 1
            kind = running.task.kind
            self._stored_of[kind] += 1
            self._stored_at.setdefault(kind, [time.monotonic()] * 2)[1] = time.monotonic()
            self._statuses.setdefault((running.task.spec.key, kind), Counter())[record.verdict.status] += 1
        elif arrival is Arrival.REPEATED:
            self._state.repeated += 1
        else:
            self._state.superseded += 1
        if running.cell is not None:
            running.cell.measured(record.case.id)

    def _task_ended(self, seat: SeatRun, running: Running, end: TaskEnd) -> None:
        cell, task = running.cell, running.task
        seat.fruitless = 0 if running.stored or end.status == "done" else seat.fruitless + 1
        owed = next((pair for pair in seat.owed if pair[1] == task.id), None)
        if owed is not None:
            seat.owed.remove(owed)
        if task.purpose == "spread" or cell is None:
            return
        if task.purpose == "plan":
            self._plan_ended(seat, cell, end)
        else:
            cell.ended(task.id, end)
        if end.status == "not_installed":
            cell.failure = end.message
            self._say(f"{cell.kind}: {end.message}")
            if end.installation is not None:
                self._record_failure(seat, end.installation)
        elif end.status == "cannot_start":
            self._say(f"{seat.label}: {cell.spec.tag} cannot be measured there: {end.message}")
            self._schedule.refuse(cell, seat.id, end.message, self._usable(cell.kind))
        elif end.status in ("disk_full", "unavailable"):
            for other in list(self._seats.values()):
                if other.node.id == seat.node.id:
                    self._set_out(other, end.message)
        elif end.status == "ended" and owed is None and not self._stopping:
            self._say(f"{seat.label}: a task of {cell.spec.tag} ended early, after {running.stored} records: "
                      f"{end.message}")
            if seat.fruitless >= MOST_FRUITLESS:
                self._set_out(seat, f"{seat.fruitless} tasks in a row ended without a record: {end.message}")

    def _plan_ended(self, seat: SeatRun, cell: Cell, end: TaskEnd) -> None:
        cell.planning_by = ""
        if end.plan is None or end.build is None:
            if end.status == "ended":
                self._schedule.refuse(cell, seat.id, end.message, self._usable(cell.kind))
            return
        cases = [planned.case for planned in end.plan.cases[:MOST_CASES]]
        cell.build = end.build
        for line in end.plan.not_loaded:
            self._say(f"{cell.kind}: not loaded: {line}")
        cell.plan(cases, self._inbox.measured(cell.kind, end.build, end.plan.sources, [case.id for case in cases]))

    def _record_failure(self, seat: SeatRun, state: EnvironmentState) -> None:
        """Record that a build does not install on a kind: with the results, and on the timeline."""
        machine = Machine(name=seat.kind, device=seat.device.name, arch="", host=seat.device.node, kind=seat.type)
        spec, store = state.spec, Store(self._request.results, Installation)
        path = store.file(machine.name, spec.build)
        if path.exists() and any(each.at == state.made_at for each in store.read(path)[0]):
            return
        store.append(Installation(
            at=state.made_at, machine=machine, build=spec.build, parts=spec.parts, python=spec.python,
            installer=state.installer, status="failed", why=state.why, log_tail=state.log_tail))
        try:
            self._timeline.failed_to_install(spec.key, spec.variant, state.log_tail)
        except TimelineError as error:
            self._say(str(error))

    # Devices of one kind, compared.

    def _compare_devices(self) -> None:
        """Once a kind has nothing left to measure, have all its devices run the same cases at once, and compare."""
        for kind in {seat.kind for seat in self._seats.values() if seat.kind}:
            running = self._spread.get(kind)
            seats = [self._seats[seat_id] for seat_id in sorted(self._usable(kind))]
            if running is None:
                cells = self._schedule.of_kind(kind)
                if not all(cell.finished for cell in cells) or not all(seat.idle for seat in seats):
                    continue
                self._spread[kind] = {}
                cell = next((cell for cell in cells if cell.build is not None and cell.done), None)
                cases = self._cases_to_compare(cell, seats) if cell is not None and len(seats) > 1 else []
                for seat in seats if cases else []:
                    self._start(seat, cell, Task(id=secrets.token_hex(8), purpose="spread", cases=cases,
                                                 **self._common(cell)))
                    self._spread[kind][seat.id] = seat.running
            elif running and not any(self._seats[seat_id].running is each for seat_id, each in running.items()
                                     if seat_id in self._seats):
                by_device = {seat_id: (self._seats[seat_id].device, each.records) for seat_id, each in running.items()
                             if seat_id in self._seats}
                for found in spreads(by_device):
                    Store(self._request.results, DeviceSpread).append(found)
                    self._state.spreads.append(found.message())
                    self._say(found.message())
                self._spread[kind] = {}

    def _cases_to_compare(self, cell: Cell, seats: list[SeatRun]) -> list:
        """Return the cases on which to compare devices; none if the very devices were compared on this build."""
        known = Store(self._request.results, DeviceSpread)
        path = known.file(cell.kind, cell.build)
        devices = {seat.device.model_dump_json() for seat in seats}
        if path.exists() and any({each.device.model_dump_json() for each in spread.devices} == devices
                                 for spread in known.read(path)[0]):
            return []
        path = self._store.file(cell.kind, cell.build)
        return cases_to_compare(self._store.read(path)[0]) if path.exists() else []

    # The end, and what is shown.

    def _over(self) -> bool:
        """Whether nothing is left to do, or nothing can be done and patience is over."""
        if not self._next_nodes:        # nobody has looked yet
            return False
        working = any(seat.running is not None or seat.owed for seat in self._seats.values())
        if self._schedule.cells and self._schedule.finished and not working \
                and not any(self._spread.get(seat.kind) is None for seat in self._seats.values() if seat.idle) \
                and not self._versions and not any(seat.device is None and not seat.out
                                                   for seat in self._seats.values()):
            return True
        able = working or bool(self._versions) or any(
            seat.idle and self._schedule.next_for(seat.id, seat.kind) is not None for seat in self._seats.values())
        if able:
            self._stuck_since = None
            return False
        if not self._schedule.cells and not any(not seat.out for seat in self._seats.values()):
            raise NoDevice(self._why_no_device())
        self._stuck_since = self._stuck_since or time.monotonic()
        if time.monotonic() - self._stuck_since < self._request.patience_s:
            return False
        self._say(f"nothing could be done for {self._request.patience_s:.0f} s: {self._what_is_missing()}")
        return True

    def _why_no_device(self) -> str:
        if self._others:
            return (f"--machines {' '.join(self._request.machines)}: no device is called that; there are "
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
        """Stop every task, and fetch what it measured. What does not come in time stays in the spools."""
        self._stopping = True
        self._say("interrupted; fetching what was measured")
        until = time.monotonic() + STOP_WITHIN_S
        with suppress(KeyboardInterrupt):
            for seat in self._seats.values():
                if seat.running is not None and seat.worker is not None:
                    self._call(seat, lambda seat, reply: None, "stop")
            while time.monotonic() < until and any(seat.running for seat in self._seats.values()):
                for call in cluster.ready(list(self._calls), WAIT_S):
                    if call in self._calls:
                        self._returned(call)

    def _say(self, sentence: str) -> None:
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
        state.seconds_left = self._seconds_left()
        self._folder.write(state)
        self._show(state)

    def _cell_state(self, cell: Cell) -> CellState:
        return CellState(
            build=cell.spec.tag, machine=cell.kind, total=cell.total if cell.planned else None, done=len(cell.done),
            unrecorded=cell.unrecorded, given_up=cell.given_up, failure=cell.failure, file=self._file(cell),
            statuses=dict(self._statuses.get((cell.spec.key, cell.kind), {})))

    def _file(self, cell: Cell) -> str:
        path = self._store.file(cell.kind, cell.build) if cell.build is not None else None
        return str(path.relative_to(self._request.results)) if path is not None else ""

    def _seconds_left(self) -> float | None:
        """Return the seconds until the slowest kind is done, at its rate so far; None while one has no rate."""
        if not self._schedule.cells:
            return None
        longest = 0.0
        for kind in {cell.kind for cell in self._schedule.cells.values() if not cell.finished}:
            cells = [cell for cell in self._schedule.of_kind(kind) if not cell.failure]
            planned = [cell for cell in cells if cell.planned]
            first, latest = self._stored_at.get(kind, (0.0, 0.0))
            if not planned or self._stored_of[kind] < 2 or latest <= first:
                return None
            left = sum(cell.total - len(cell.done) for cell in planned)
            left += (len(cells) - len(planned)) * max(cell.total for cell in planned)
            longest = max(longest, left * (latest - first) / (self._stored_of[kind] - 1))
        return longest

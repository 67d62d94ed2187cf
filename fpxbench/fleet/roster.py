"""The nodes of a cluster, the workers on their devices, and the records that ended workers left behind.

A worker has at most one call in flight. When a worker ends, its task's records may be in a spool on the node: the next
worker there delivers them before the cases without a record are assigned again. The same holds for tasks of an earlier
run whose driver ended; Ray ends that run's workers a while later.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from fnmatch import fnmatchcase

import fpxbench
from fpxbench.counted import counted
from fpxbench.fleet import cluster
from fpxbench.fleet.fleet_messages import Device, DeviceType, Hello, Seat, TaskEnd, source_digest
from fpxbench.fleet.schedule import Schedule
from fpxbench.fleet.seats import Running, SeatRun, clock_difference

WAIT_S = 0.5
MOST_DEATHS = 5
"""A device whose worker has ended this often gets no more tasks."""
MOST_HELLOS = 10
"""How many times, `NODES_EVERY_S` apart, a new worker is asked for spools that ended workers still hold."""
NODES_EVERY_S = 2.0
COLLECT_WITHIN_S = 60.0
"""How long to wait for an earlier run's records before measuring cases that may be among them."""
CLOCK_NOTICE_S = 2.0
CLOCK_WITHIN_S = 10.0
LARGEST_REPLY = 64 << 20


driver_clock = time.time


class Roster:
    """Base of the driver: nodes, seats and calls. A subclass defines what a seat does (`_add_cells`, `_poll`).

    device : None: the GPUs of the cluster, or its CPUs if it has none
    machines : globs over kinds; empty: all
    """

    def __init__(self, device: DeviceType | None, machines: tuple[str, ...], say: Callable[[str], None]) -> None:
        self._asked_device, self._machines, self._say = device, machines, say
        self._device: DeviceType = device or "cpu"
        self._fleet = ""
        self._run_id = secrets.token_hex(4)
        self._collect_until = 0.0
        self._schedule = Schedule()
        self._seats: dict[str, SeatRun] = {}
        self._nodes: dict[str, cluster.Node] = {}
        self._versions: dict[cluster.Call, cluster.Node] = {}
        self._calls: dict[cluster.Call, tuple[SeatRun, Callable[[SeatRun, str], None]]] = {}
        self._others: set[str] = set()
        """Kinds that `machines` leaves out."""

    def _add_cells(self, seat: SeatRun, device: Device) -> None:
        """Add the builds that a new device can measure."""
        raise NotImplementedError

    def _poll(self, seat: SeatRun, running: Running) -> None:
        """Ask a seat for records of a task."""
        raise NotImplementedError

    def _comparison_ended(self, seat: SeatRun) -> None:
        """Note that a seat no longer compares its device with others."""
        raise NotImplementedError

    def _new_id(self) -> str:
        """Return a task's id. It begins with the run's, which identifies an earlier run's tasks."""
        return f"{self._run_id}-{secrets.token_hex(8)}"

    # Calls.

    def _returned(self, call: cluster.Call, timeout_s: float | None = None) -> None:
        seat, then = self._calls.pop(call)
        seat.calls -= 1
        try:
            value = cluster.result(call, timeout_s)
            if isinstance(value, str) and len(value) > LARGEST_REPLY:
                raise ValueError(f"a reply of {len(value) >> 20} MB")
            then(seat, value)
        except (cluster.WorkerEnded, ValueError) as error:   # ValueError: pydantic's, for a malformed reply
            self._worker_ended(seat, str(error))

    def _call(self, seat: SeatRun, then: Callable, method: str, *arguments: object) -> None:
        seat.calls += 1
        self._calls[seat.call(method, *arguments)] = (seat, then)

    # Nodes and workers.

    def _look_at_nodes(self) -> None:
        alive = {node.id: node for node in cluster.nodes()}
        for node_id in self._nodes.keys() - alive.keys():
            self._node_ended(self._nodes.pop(node_id))
        if self._asked_device is None and not self._nodes and any(node.gpus for node in alive.values()):
            self._device = "cuda"
        for node in alive.values():
            if node.id not in self._nodes:
                self._nodes[node.id] = node
                if node.gpus or node.cpus:      # a head node may be configured with none
                    self._versions[cluster.ask_version(node)] = node
        for seat in self._seats.values():
            if seat.out or time.monotonic() < seat.next_at:
                continue
            if seat.worker is None:
                self._begin(seat)
            elif (seat.owed or seat.awaited) and not seat.calls and not seat.leftovers and seat.running is None:
                self._call(seat, self._said_hello, "hello")

    def _version(self, node: cluster.Node, call: cluster.Call) -> None:
        """Open the seats of a node whose fpxbench is the driver's."""
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
        if not count and self._asked_device is not None:
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
        seat.doing = "waiting for the device"
        self._call(seat, self._said_hello, "hello")

    def _said_hello(self, seat: SeatRun, reply: str) -> None:
        hello = Hello.model_validate_json(reply)
        globs = self._machines
        if globs and not any(fnmatchcase(hello.device.kind, glob) for glob in globs):
            seat.out = "not asked for"
            self._others.add(hello.device.kind)
            self._release(seat)
            return
        if seat.device is None or seat.clock is None:
            seat.device = hello.device
            self._compare_clocks(seat)
            self._add_cells(seat, hello.device)
        seat.leftovers = [Running.of(task, self._schedule.cells.get((task.spec.key, task.kind)), left_behind=True)
                          for task in hello.leftovers]
        fetched = {each.task.id for other in self._seats.values() for each in (other.running, *other.leftovers) if each}
        seat.awaited = [task for task in hello.in_use if not task.startswith(self._run_id) and task not in fetched]
        seat.hellos += 1
        if seat.awaited and seat.hellos == 2:   # at the first, another device of the node may be about to fetch them
            self._say(f"{seat.label}: waiting for the worker of an earlier run to end, which still holds the records "
                      f"of {len(seat.awaited)} tasks")
        self._next_leftover(seat)

    def _compare_clocks(self, seat: SeatRun) -> None:
        def remote() -> float:
            return float(cluster.result(seat.call("clock"), CLOCK_WITHIN_S))

        seat.clock = clock_difference(remote, driver_clock)
        offset, uncertainty = seat.clock
        if abs(offset) > CLOCK_NOTICE_S + uncertainty:
            self._say(f"the clock of {seat.label} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} the "
                      "driver's: started_at in its records is the node's time, and the offset is recorded with it")

    def _next_leftover(self, seat: SeatRun) -> None:
        """Fetch the next spool that an ended worker left, or conclude that there are no more."""
        if seat.leftovers:
            seat.doing = "delivering an ended worker's records"
            seat.running = seat.leftovers.pop(0)
            self._poll(seat, seat.running)
            return
        seat.running = None
        if (seat.owed or seat.awaited) and seat.hellos < MOST_HELLOS:   # an ended worker's process may still hold them
            seat.doing = "waiting for an ended worker's records"
            seat.next_at = time.monotonic() + 1.0
            return
        if seat.awaited:
            self._say(f"{seat.label}: the worker of an earlier run does not end; the rest goes on without the records "
                      f"of its tasks {', '.join(seat.awaited[:5])}, and may measure their cases again")
        for cell, task in seat.owed:
            cell.ended(task, TaskEnd(status="ended", message="its worker ended"))
        seat.owed, seat.awaited, seat.doing = [], [], "idle"

    def _collecting(self, kind: str) -> bool:
        """Return whether an earlier run's records may still come from devices of `kind`, within `COLLECT_WITHIN_S`."""
        awaited = [seat.label for seat in self._seats.values() if seat.collecting and seat.kind in ("", kind)]
        awaited += [f"node {node.label}" for node in self._versions.values()]
        if not awaited or not self._collect_until:
            return False
        if time.monotonic() < self._collect_until:
            return True
        self._collect_until = 0.0
        self._say(f"{', '.join(awaited)}: no records of the earlier run arrived within {COLLECT_WITHIN_S:.0f} s; the "
                  "rest goes on without them, and may measure their cases again")
        return False

    def _worker_ended(self, seat: SeatRun, reason: str) -> None:
        """Hold back the cases of a worker's task until its spool is delivered, and start the next worker."""
        if seat.running is not None:
            self._task_lost(seat, seat.running, spool_may_return=True)
        self._release(seat)
        seat.running, seat.leftovers, seat.awaited, seat.doing = None, [], [], "restarting"
        seat.deaths += 1
        seat.next_at = time.monotonic() + 1.0
        if seat.deaths >= MOST_DEATHS:
            self._set_out(seat, f"its worker ended {counted(seat.deaths, 'time')}, the last time: {reason}")

    def _node_ended(self, node: cluster.Node) -> None:
        gone = [seat for seat in self._seats.values() if seat.node.id == node.id]
        if gone:
            self._say(f"node {node.label} is gone; the unfinished cases of its {counted(len(gone), 'device')} go to "
                      "others of their kind")
        for seat in gone:
            if seat.running is not None:
                self._task_lost(seat, seat.running, spool_may_return=False)
            for cell, task in seat.owed:
                cell.ended(task, TaskEnd(status="ended", message="its node ended"))
            del self._seats[seat.id]
        self._calls = {call: pair for call, pair in self._calls.items() if pair[0].node.id != node.id}

    def _task_lost(self, seat: SeatRun, running: Running, spool_may_return: bool) -> None:
        cell, task = running.cell, running.task
        if cell is None:
            return
        if task.purpose == "plan":
            cell.planning_by = ""
        elif task.purpose == "spread":
            self._comparison_ended(seat)
        elif task.id in cell.running:
            cell.lose(task.id, spool_may_return)
            if spool_may_return:
                seat.owed.append((cell, task.id))

    def _release(self, seat: SeatRun) -> None:
        """End a seat's worker, and forget its calls."""
        if seat.worker is not None:
            seat.worker.end()
        seat.worker, seat.calls, seat.hellos = None, 0, 0
        self._calls = {call: pair for call, pair in self._calls.items() if pair[0] is not seat}

    def _set_out(self, seat: SeatRun, reason: str) -> None:
        """Give a device no more tasks in this run."""
        if not seat.out:
            self._say(f"{seat.label} gets no more tasks: {reason}")
        seat.out = reason
        for cell, task in seat.owed:
            cell.ended(task, TaskEnd(status="ended", message=reason))
        seat.owed, seat.awaited = [], []
        for cell in self._schedule.of_kind(seat.kind):
            if cell.refused_by:
                self._schedule.refuse(cell, seat.id, reason, self._usable(seat.kind) | {seat.id})

    def _usable(self, kind: str) -> set[str]:
        return {seat.id for seat in self._seats.values() if seat.kind == kind and not seat.out}

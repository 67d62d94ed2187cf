"""The driver's view of one device: its worker, its task, and the records that an ended worker left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fpxbench.fleet import cluster
from fpxbench.fleet.fleet_messages import Device, DeviceType, Seat, Task
from fpxbench.fleet.inbox import Asked
from fpxbench.fleet.schedule import Cell
from fpxbench.fleet.state import SeatState

CLOCK_ROUNDS = 3


@dataclass
class Running:
    """A task that a device runs, or that an ended worker left behind there."""

    task: Task
    asked: Asked
    cell: Cell | None
    offset: int = 0
    stored: int = 0
    """Number of its records that were new."""

    left_behind: bool = False
    """Whether its worker ended: its records are fetched, and nothing runs."""

    @classmethod
    def of(cls, task: Task, cell: Cell | None, left_behind: bool = False) -> Running:
        return cls(task, Asked.by(task), cell, left_behind=left_behind)


@dataclass
class SeatRun:
    """One device of one node."""

    id: str
    node: cluster.Node
    type: DeviceType
    seat: Seat
    worker: cluster.Worker | None = None
    device: Device | None = None
    """None until the worker has reported it."""
    doing: str = "starting"
    running: Running | None = None
    leftovers: list[Running] = field(default_factory=list)
    owed: list[tuple[Cell, str]] = field(default_factory=list)
    """Tasks of an ended worker whose spools may be on the node."""
    awaited: list[str] = field(default_factory=list)
    """Tasks of an earlier run whose spools are still locked on the node: their workers have not ended yet."""
    hellos: int = 0
    """How often the current worker was asked for its `hello`."""
    deaths: int = 0
    fruitless: int = 0
    """Number of tasks in a row that ended early without a record."""
    next_at: float = 0.0
    """The worker is not called before this time."""
    out: str = ""
    """Why the device gets no more tasks; empty while it does."""
    clock: tuple[float, float] | None = None
    """The node's clock minus this one, and the uncertainty, in seconds."""
    calls: int = 0
    """Number of calls that have not returned."""

    @property
    def label(self) -> str:
        return self.device.label if self.device else f"{self.node.label} {self.type}"

    @property
    def kind(self) -> str:
        return self.device.kind if self.device else ""

    @property
    def idle(self) -> bool:
        """Whether the device can take a task now."""
        return (self.device is not None and self.worker is not None and not self.out and not self.calls
                and self.running is None and not self.leftovers and not self.owed and not self.awaited)

    @property
    def collecting(self) -> bool:
        """Whether its node may have records of an earlier run that were not fetched yet."""
        return not self.out and (not self.hellos or bool(self.leftovers or self.awaited)
                                 or self.running is not None and self.running.left_behind)

    def call(self, method: str, *arguments: object) -> cluster.Call:
        """Begin a call of the worker. Raise WorkerEnded if the seat has none."""
        if self.worker is None:
            raise cluster.WorkerEnded("it has no worker")
        return self.worker.call(method, *arguments)

    def metadata(self) -> dict[str, object]:
        """Return the facts that are added to the machine of each of its records."""
        added: dict[str, object] = {}
        if self.device is not None:
            added["device"] = {"node": self.device.node, "index": self.device.index, "uuid": self.device.uuid}
        if self.clock is not None:
            added["fleet"] = {"clock_offset_s": round(self.clock[0], 3), "clock_uncertainty_s": round(self.clock[1], 3)}
        return added

    def state(self) -> SeatState:
        build = self.running.task.spec.tag if self.running else ""
        activity = "not used" if self.out else "working" if self.running else "idle" if self.idle else "starting"
        return SeatState(device=self.label, machine=self.kind, activity=activity, doing=self.out or self.doing,
                         build=build, clock_offset_s=round(self.clock[0], 3) if self.clock else None)


def clock_difference(remote: Callable[[], float], local: Callable[[], float]) -> tuple[float, float]:
    """Return the `remote` clock minus the `local` one, and the uncertainty (half of the shortest round trip)."""
    best = (0.0, float("inf"))
    for _ in range(CLOCK_ROUNDS):
        sent = local()
        theirs = remote()
        received = local()
        if (half := (received - sent) / 2) < best[1]:
            best = (theirs - (sent + received) / 2, half)
    return best

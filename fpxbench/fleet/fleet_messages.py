"""The messages between a fleet's driver and workers: JSON of bounded size. Imports neither torch nor Ray."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

import fpxbench
from fpxbench.builds.environments.specification import EnvironmentSpec, EnvironmentState
from fpxbench.records.case import Case
from fpxbench.records.fields import Count, Integer, Label, Name, Text
from fpxbench.records.record import Build
from fpxbench.sweep.plan import Plan
from fpxbench.sweep.settings import Profile

MOST_CASES = 100_000
"""Largest number of cases of one plan or task."""
DELIVERY_BYTES = 1 << 20
"""A delivery ends with the record that reaches this size."""

DeviceType = Literal["cpu", "cuda"]
Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{1,200}$")]
"""An id, which is also a folder's name."""


class Message(BaseModel):
    """A message. Unknown fields are ignored, since another version may send them."""

    model_config = ConfigDict(extra="ignore")


class SweepOptions(Message):
    """The options of ``fpxbench run`` that all tasks of a fleet's run share."""

    profile: Profile = "quick"
    implementation: Annotated[tuple[Label, ...], Field(max_length=1000)] = ()
    scheme: Annotated[tuple[Label, ...], Field(max_length=1000)] = ()
    workload: Annotated[tuple[Label, ...], Field(max_length=1000)] = ()
    impls: Annotated[tuple[Text, ...], Field(max_length=100)] = ()
    """Paths on the nodes."""
    timeout_s: float = Field(default=180.0, gt=0)
    timing: bool = True


class Seat(Message):
    """One device of one node, as the driver hands it to a worker."""

    fleet: Id
    """Id of the results folder: leftover spools are delivered only to the fleet that they were measured for."""
    device: DeviceType
    machine: Name | None = None
    """From the node's label ``fpxbench-machine``; None: the device's own name."""
    accelerator_type: Label = ""
    """Ray's name for it, used if nvidia-smi does not name the device."""
    share: Annotated[int, Field(ge=0)] = 0
    shares: Annotated[int, Field(ge=1, le=1024)] = 1
    """The worker may use the `share`-th of `shares` equal parts of the node's cores and memory."""


class Device(Message):
    """A device, with what distinguishes it from others of its kind."""

    kind: Name
    """Name that records are filed under. Devices of one kind share their work."""
    type: DeviceType
    name: Label
    """The vendor's name for it."""
    node: Label
    index: Integer = 0
    uuid: Label = ""
    """Empty for a CPU, and where no tool reports it."""

    @property
    def label(self) -> str:
        """A name for people: ``gpu-7 GPU 1``."""
        return f"{self.node} GPU {self.index}" if self.type == "cuda" else self.node


class Hello(Message):
    """A worker's device, and the tasks that ended workers left behind on this node."""

    device: Device
    leftovers: Annotated[list[Task], Field(max_length=10_000)] = []
    in_use: Annotated[list[Id], Field(max_length=10_000)] = []
    """Tasks whose spools are locked by another process of this node: another device's worker, or one that is ending."""


class Task(Message):
    """Cases of one build on one kind of machine, or a request for the plan (`cases` is empty)."""

    id: Id
    purpose: Literal["plan", "measure", "spread"]
    spec: EnvironmentSpec
    kind: Name
    device: DeviceType
    options: SweepOptions = SweepOptions()
    cases: Annotated[list[Case], Field(max_length=MOST_CASES)] = []
    retry: bool = False
    """Whether to retry an installation that failed less than a day ago."""


TaskStatus = Literal["done", "not_installed", "cannot_start", "disk_full", "unavailable", "ended"]
"""How a task ended. `not_installed`: the build was refused. `cannot_start`: the sweep could not begin on this device.
`disk_full` and `unavailable`: the node cannot take tasks (no disk space; no index or installer). `ended`: the process
ended early."""


class TaskEnd(Message):
    """How a task ended, with a one-sentence message unless it is done."""

    status: TaskStatus
    message: Text = ""
    installation: EnvironmentState | None = None
    """State of the environment of a build that was refused."""
    plan: Plan | None = None
    build: Build | None = None
    """The build that its environment reports; sent with the plan."""


class Delivery(Message):
    """Records of a task since an offset of its spool."""

    lines: Annotated[list[str], Field(max_length=1_000_000)] = []
    offset: Count = 0
    """Offset of the first byte that is not delivered. Polling from it acknowledges everything before."""
    state: Label = ""
    """The task's activity, for display: ``installing torch==2.13.0+cu130``."""
    end: TaskEnd | None = None
    """None while it runs, or while there is more to deliver."""


Hello.model_rebuild()


@functools.cache
def source_digest() -> str:
    """Return a digest of fpxbench's source: nodes with checkouts may differ though their version is the same."""
    package = Path(fpxbench.__file__).parent
    # In a checkout these three are symbolic links, which rglob does not follow.
    folders = (package, *(package / name for name in ("impls", "reports", "benchmarks")))
    files = {str(path.relative_to(package)): path for folder in folders for path in folder.rglob("*.py")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]

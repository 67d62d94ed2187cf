"""Record that a build does not install: on this machine's timeline, and with the results for everyone."""

from __future__ import annotations

import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fpxbench.builds.environments.specification import EnvironmentState
from fpxbench.builds.installer import isolated_environment
from fpxbench.builds.timeline import Timeline
from fpxbench.records.fields import Label, Log, Moment, Text
from fpxbench.records.record import Build, Machine, StoredRecord
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict

_DESCRIBE = """
import sys
from fpxbench.checking import machine
device, name = sys.argv[1:]
print(machine.describe(device or machine.default_device(), name or None).model_dump_json())
"""


class Installation(StoredRecord):
    """One line of ``RESULTS/<machine>/builds/<build>-<variant>.jsonl``: a build failed to install, or installs again.
    """

    FOLDER: ClassVar[str] = "builds"

    at: Moment
    machine: Machine
    build: Build
    """The timeline's description."""
    parts: Annotated[tuple[Label, ...], Field(max_length=10)]
    python: Label
    installer: Label
    status: Literal["ready", "failed"]
    why: Text = ""
    log_tail: Log = ""

    @property
    def id(self) -> str:
        return f"{'+'.join(self.parts)} for Python {self.python}"

    @property
    def verdict(self) -> Verdict:
        return Verdict(status=Status.OK if self.status == "ready" else Status.ERROR, summary=self.why,
                       log_tail=self.log_tail)


def record_installation(state: EnvironmentState, results: Path, timeline: Timeline, machine: str | None = None,
                        device: str | None = None) -> None:
    """Record the outcome of an installation, under `machine` or the device's own name."""
    spec = state.spec
    if state.status == "failed":
        timeline.failed_to_install(spec.key, spec.variant, state.log_tail)
    else:
        timeline.installed(spec.key, spec.variant)
    Store(results, Installation).append(Installation(
        at=state.made_at, machine=_machine(machine, device), build=spec.build, parts=spec.parts, python=spec.python,
        installer=state.installer, status=state.status, why=state.why, log_tail=state.log_tail,
    ))


@cache
def _machine(name: str | None, device: str | None) -> Machine:
    """Return this machine as the current PyTorch describes it, in a child process: the parent never imports torch."""
    done = subprocess.run([sys.executable, "-c", _DESCRIBE, device or "", name or ""], capture_output=True, text=True,
                          env=isolated_environment())
    if done.returncode == 0:
        return Machine.model_validate_json(done.stdout.splitlines()[-1])
    # This Python has no PyTorch, or a broken one: use the host's name.
    host = platform.node()
    return Machine(name=name or f"host-{host.split('.')[0]}", device="unknown", arch=platform.machine(), host=host)

"""A build that does not install is a finding about it, as a crash is about a case: on the timeline here, and with the results for everyone."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from fpxbench.builds.environments.installer import bare_environment
from fpxbench.builds.environments.specification import EnvironmentState
from fpxbench.builds.timeline import Timeline
from fpxbench.records.record import Build, Machine
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict

SCHEMA = 1


class Installation(BaseModel):
    """One line of ``RESULTS/<machine>/builds/<build>-<variant>.jsonl``: that a build did not install, or that it does again."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    FOLDER: ClassVar[str] = "builds"
    SCHEMA: ClassVar[int] = SCHEMA

    schema_version: int = Field(default=SCHEMA, alias="schema", ge=1, le=SCHEMA)
    at: str
    machine: Machine
    build: Build
    """As the timeline knows it: what does not install cannot be asked."""
    parts: tuple[str, ...]
    python: str
    installer: str
    status: Literal["ready", "failed"]
    why: str = ""
    log_tail: str = ""

    @property
    def id(self) -> str:
        return f"{'+'.join(self.parts)} for Python {self.python}"

    @property
    def verdict(self) -> Verdict:
        return Verdict(status=Status.OK if self.status == "ready" else Status.ERROR, summary=self.why, log_tail=self.log_tail)

    def to_json(self) -> str:
        """One line."""
        return self.model_dump_json(by_alias=True)


def record_installation(state: EnvironmentState, results: Path, timeline: Timeline, machine: str | None = None, device: str | None = None) -> None:
    """Write down what came of an installation, under `machine` or the device's own name."""
    spec = state.spec
    if state.status == "failed":
        timeline.failed_to_install(spec.key, spec.variant, state.log_tail)
    else:
        timeline.installed(spec.key, spec.variant)
    Store(results, Installation).append(Installation(
        at=state.made_at, machine=_machine(machine, device), build=spec.build, parts=spec.parts, python=spec.python,
        installer=state.installer, status=state.status, why=state.why, log_tail=state.log_tail,
    ))


def _machine(name: str | None, device: str | None) -> Machine:
    """This machine, as the PyTorch at hand sees it; in a process of its own, since its import belongs in no parent."""
    code = "import sys; from fpxbench import machine; d, n = sys.argv[1:]; print(machine.describe(d or machine.default_device(), n or None).model_dump_json())"
    done = subprocess.run([sys.executable, "-c", code, device or "", name or ""], capture_output=True, text=True, env=bare_environment())
    if done.returncode == 0:
        return Machine.model_validate_json(done.stdout.splitlines()[-1])
    # No PyTorch at hand, or none that works: the host's name will do.
    host = platform.node()
    return Machine(name=name or f"host-{host.split('.')[0]}", device="unknown", arch=platform.machine(), host=host)

"""Run one case on a build of the timeline, in a separate process."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from fpxbench.builds.environments.interpreters import Builds, Interpreter
from fpxbench.builds.installer import isolated_environment, without_settings
from fpxbench.builds.timeline import Entry
from fpxbench.records.case import Case
from fpxbench.records.record import Record
from fpxbench.records.store import Store
from fpxbench.workloads import is_from_file

STARTING_S = 600.0
"""Time beyond the case's own limit: importing PyTorch, discovering implementations, measuring memory bandwidth."""


class CannotRun(RuntimeError):
    """The process left no record; the message gives the reason."""


@dataclass(frozen=True)
class Conditions:
    """Settings that all runs share."""

    device: str | None = None
    machine: str | None = None
    """The machine name of the records; None: the device's own name."""
    impls: tuple[Path, ...] = ()
    timeout_s: float = 180.0


class CaseRunner(AbstractContextManager):
    """A runner of cases on several builds. Each environment is created on first use and kept until exit."""

    def __init__(self, builds: Builds, conditions: Conditions) -> None:
        self._builds, self._conditions = builds, conditions
        self._open: dict[str, Interpreter] = {}
        self._stack = ExitStack()

    def run(self, entry: Entry, case: Case, seed: int) -> Record:
        """Run `case` once on `entry`. Raise CannotRun, and what `Builds.interpreter` raises."""
        if entry.key not in self._open:
            self._open[entry.key] = self._stack.enter_context(self._builds.interpreter(entry))
        return rerun(self._open[entry.key], case, seed, self._conditions)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def rerun(interpreter: Interpreter, case: Case, seed: int, conditions: Conditions) -> Record:
    """Return the record of one run, made in a temporary results folder.

    Raise CannotRun, with the last output, if the process left no record, and for a weight from a file. Ctrl-C kills its
    process group.
    """
    if is_from_file(case.workload):
        raise CannotRun(f"the weight of {case.workload} comes from a file, which no record holds: run both builds with"
                        " --checkpoint or --weights and compare them with `fpxbench compare`")
    with tempfile.TemporaryDirectory(prefix="fpxbench-rerun-") as name:
        folder = Path(name)
        (folder / "cases").write_text(case.model_dump_json())
        command = [str(interpreter.python), "-m", "fpxbench", "run", "--cases", str(folder / "cases"),
                   "--results", str(folder / "results"), "--fresh", "--seed", str(seed),
                   "--timeout", str(conditions.timeout_s)]
        command += ["--device", conditions.device] if conditions.device else []
        command += ["--machine", conditions.machine] if conditions.machine else []
        for path in conditions.impls:
            command += ["--impls", str(path.resolve())]
        last_lines = _run(command, conditions.timeout_s + STARTING_S)
        records, _ = Store(folder / "results").read_all()
    if not records:
        raise CannotRun(f"{case.id} could not be run on PyTorch {interpreter.build.torch} ({interpreter.python}): "
                        f"{last_lines}")
    return records[-1]


def _run(command: list[str], timeout_s: float) -> str:
    """Return the last lines of the command's output."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", env=without_settings(isolated_environment()),
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"still running after {timeout_s:.0f} s: killed"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return "\n".join(output.strip().splitlines()[-3:]) or f"exited with {process.returncode} without output"

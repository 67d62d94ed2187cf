"""Run tasks on one device of a node, one at a time, and deliver their records.

A Ray actor on a cluster; nothing here imports Ray or PyTorch. Arguments and results are JSON (`fleet_messages`).
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from pydantic import ValidationError

from fpxbench.builds import installer
from fpxbench.builds.environments import (
    PARTS,
    REFUSED,
    UNAVAILABLE,
    CannotInstall,
    DiskFull,
    Environments,
    EnvironmentSpec,
    current_build,
)
from fpxbench.builds.environments.folder import ROOT_VARIABLE
from fpxbench.builds.environments.interpreters import current_variant
from fpxbench.builds.timeline.entry import DEFAULT_VARIANT
from fpxbench.fleet.devices import device_of
from fpxbench.fleet.fleet_messages import Delivery, DeviceType, Hello, Seat, Task, TaskEnd, TaskStatus
from fpxbench.fleet.spool import Spool, left_behind, node_folder
from fpxbench.records.record import Build
from fpxbench.sweep.plan import Plan
from fpxbench.sweep.settings import Settings

POLL_S = 0.05
PLAN_TIMEOUT_S = 900.0
"""Allows for importing PyTorch and every implementation on a busy node."""
ROOM_BYTES = 200 << 20
"""Free disk space below which no task starts: a batch's records take a few MB, compilers' files far more."""
STOP_GRACE_S = 5.0
LAUNCHER = Path(__file__).with_name("_launch.py")
_CANNOT_START = 2
"""Exit status of ``fpxbench run`` for a user's mistake, or a device that cannot be measured."""
_LOG_TAIL_BYTES = 4096
_LEFT_BEHIND = TaskEnd(status="ended", message="its worker ended")


class DeviceWorker:
    """Runs the tasks of one device. Methods are called one at a time."""

    def __init__(self, seat: str, accelerator_id: str = "") -> None:
        self._seat = Seat.model_validate_json(seat)
        self._device = device_of(self._seat, accelerator_id)
        self._spools: dict[str, Spool] = {}
        self._run: _Run | None = None
        self._not_begun: dict[str, TaskEnd] = {}
        """Tasks for which no spool could be made, with the reason."""

    def hello(self) -> str:
        """Return a `Hello`, and take over the spools that ended workers left on this host."""
        found, in_use = left_behind(self._seat.fleet)
        self._spools |= {spool.task.id: spool for spool in found}
        return Hello(
            device=self._device, leftovers=[spool.task for spool in self._spools.values()],
            in_use=[task for task in in_use if task not in self._spools],
        ).model_dump_json(by_alias=True)

    def clock(self) -> float:
        """Return this node's time, in seconds since 1970."""
        return time.time()

    def start(self, task: str) -> None:
        """Begin a `Task`; `poll` reports its progress."""
        asked = Task.model_validate_json(task)
        self._run = None
        try:
            self._spools[asked.id] = Spool.create(self._seat.fleet, asked)
        except OSError as error:
            self._not_begun[asked.id] = _end_of(error, node_folder())
        else:
            self._run = _Run(asked, self._seat, self._spools[asked.id])

    def poll(self, task_id: str, offset: int, wait_s: float) -> str:
        """Return a `Delivery`: the records of a task from `offset` on. Wait up to `wait_s` seconds for the first."""
        run = self._run if self._run is not None and self._run.task.id == task_id else None
        spool, give_up_at = self._spools.get(task_id), time.monotonic() + wait_s
        while True:
            end = run.end if run is not None else self._not_begun.get(task_id) or _LEFT_BEHIND
            # Read after `end`, so that no record is missed.
            lines, offset = spool.read(offset) if spool is not None else ([], offset)
            if lines or end is not None or time.monotonic() >= give_up_at:
                break
            time.sleep(POLL_S)
        return Delivery(lines=lines, offset=offset, end=None if lines else end,
                        state=run.state if run is not None else "").model_dump_json(by_alias=True)

    def finish(self, task_id: str) -> None:
        """Remove the records of a task, which the driver has stored."""
        if self._run is not None and self._run.task.id == task_id:
            self._run.join()
            self._run = None
        self._not_begun.pop(task_id, None)
        spool = self._spools.pop(task_id, None)
        if spool is not None:
            spool.remove()

    def stop(self) -> None:
        """End the running task, if any."""
        if self._run is not None:
            self._run.stop()


class _Run:
    """One task, on its own thread."""

    def __init__(self, task: Task, seat: Seat, spool: Spool) -> None:
        self.task, self._seat, self.spool = task, seat, spool
        self.state = "starting"
        self.end: TaskEnd | None = None
        self._process: subprocess.Popen | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name=task.id, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_GRACE_S)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _work(self) -> None:
        try:
            free = shutil.disk_usage(self.spool.folder).free
            if free < ROOM_BYTES:
                raise DiskFull(f"the disk of {node_folder()} has {free >> 20} MB left, and a task needs "
                               f"{ROOM_BYTES >> 20}")
            with self._interpreter() as (python, build):
                self.end = self._plan(python, build) if self.task.purpose == "plan" else self._measure(python)
        except Exception as error:      # reported to the driver, which handles it
            self.end = _end_of(error, node_folder())

    @contextmanager
    def _interpreter(self) -> Iterator[tuple[Path, Build]]:
        """Yield the Python that has the task's build (this one or an environment's), and the build that it reports."""
        spec, here = self.task.spec, current_build()
        if here is not None and _is_asked_for(here, spec, self.task.device):
            yield Path(sys.executable), here
            return
        root = Path(os.environ.get(ROOT_VARIABLE) or node_folder() / "environments")
        with Environments(root, self._say).lease(spec, self.task.retry) as environment:
            yield environment.python, environment.build

    def _say(self, line: str) -> None:
        line = line.strip()[:200]
        self.state = line if line.startswith("installing") else f"installing: {line}"

    def _plan(self, python: Path, build: Build) -> TaskEnd:
        self.state = "listing the cases"
        options = self.task.options
        settings = Settings(profile=options.profile, device=self.task.device, implementation=options.implementation,
                            scheme=options.scheme, workload=options.workload, impls=tuple(map(Path, options.impls)))
        code = self._call([str(python), "-m", "fpxbench.sweep.selection", "--plan"], settings.model_dump_json())
        last = _tail(self.spool.log)
        if code:
            return TaskEnd(status="cannot_start", message=f"the cases cannot be listed: {_message(last, code)}")
        printed = self.spool.log.with_suffix(".out").read_text(encoding="utf-8").splitlines()
        try:
            plan = Plan.model_validate_json(printed[-1] if printed else "")
            return TaskEnd(status="done", plan=plan, build=build)
        except ValidationError:
            return TaskEnd(status="cannot_start", message=f"the cases cannot be listed: {_message(last, code)}")

    def _measure(self, python: Path) -> TaskEnd:
        self.state = "measuring"
        task, options = self.task, self.task.options
        cases = self.spool.folder / "cases"
        cases.write_text("".join(f"{case.model_dump_json()}\n" for case in task.cases), encoding="utf-8")
        memory = psutil.virtual_memory().total * 3 // 4 // self._seat.shares
        command = [str(python), "-m", "fpxbench", "run", "--cases", str(cases), "--results", str(self.spool.results),
                   "--machine", task.kind, "--device", task.device, "--profile", options.profile,
                   "--timeout", str(options.timeout_s), "--memory-limit", str(memory)]
        command += [] if options.timing else ["--no-timing"]
        for path in options.impls:
            command += ["--impls", path]
        code = self._call(command)
        if code == 0:
            return TaskEnd(status="done")
        return _end_of_process(_tail(self.spool.log), code)

    def _call(self, command: list[str], stdin: str = "") -> int:
        """Run a command, and return its exit status; stdout goes to ``log.out``, stderr to ``log``.

        The process ends with this one, and holds the spool's lock until then.
        """
        log, out = self.spool.log, self.spool.log.with_suffix(".out")
        own = command[0] == sys.executable      # needs this process's PYTHONPATH to find fpxbench
        with open(log, "ab") as errors, open(out, "ab") as output:
            self._process = subprocess.Popen(
                self._launched(command), stdin=subprocess.PIPE, stdout=output, stderr=errors, env=_environment(own),
                start_new_session=True, pass_fds=[self.spool.lock_fd])
            if self._stopped:
                self.stop()
            try:
                self._process.communicate(stdin.encode(), PLAN_TIMEOUT_S if stdin else None)
            except subprocess.TimeoutExpired:
                self.stop()
                raise
        return self._process.wait()

    def _launched(self, command: list[str]) -> list[str]:
        """Return the command line that runs `command` on the seat's cores, and ends it with this thread."""
        cores = share(sorted(os.sched_getaffinity(0)), self._seat.share, self._seat.shares)
        return [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), ",".join(map(str, cores)), *command]


def share(cores: list[int], number: int, of: int) -> list[int]:
    """Return the `number`-th of `of` equal parts of `cores`; all of them if there are fewer cores than parts."""
    size = len(cores) // of
    return cores[number * size:(number + 1) * size] if size else cores


def _is_asked_for(here: Build, spec: EnvironmentSpec, device: DeviceType) -> bool:
    """Return whether this Python has the build and variant of `spec`; ``default`` accepts any variant that can use the
    device."""
    if here.key != spec.key or spec.parts != PARTS:
        return False
    usable = spec.variant == DEFAULT_VARIANT and (device == "cpu" or here.variant != "cpu")
    return usable or spec.variant in (here.variant, current_variant(here))


def _environment(own: bool) -> dict[str, str]:
    """Return the environment of a measuring process."""
    kept = installer.without_settings(os.environ if own else installer.isolated_environment())
    # Ray sets it to the number of CPUs that a worker reserved; a sweep uses the value that the node was started with.
    kept.pop("OMP_NUM_THREADS", None)
    with suppress(psutil.Error, OSError):
        threads = psutil.Process(os.getppid()).environ().get("OMP_NUM_THREADS")
        kept |= {"OMP_NUM_THREADS": threads} if threads else {}
    return kept


def _end_of(error: Exception, folder: Path) -> TaskEnd:
    """Return how a task ended that raised `error` outside its process."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return TaskEnd(status="disk_full", message=f"the disk of {folder} is full")
    status: TaskStatus = "ended"
    if isinstance(error, REFUSED):
        status = "not_installed"
    elif isinstance(error, DiskFull):
        status = "disk_full"
    elif isinstance(error, (OSError, *UNAVAILABLE)):
        status = "unavailable"
    elif isinstance(error, subprocess.TimeoutExpired):
        status = "cannot_start"
    return TaskEnd(status=status, message=str(error) or type(error).__name__,
                   installation=error.state if isinstance(error, CannotInstall) else None)


def _end_of_process(log: str, code: int) -> TaskEnd:
    message = _message(log, code)
    if "No space left on device" in log or "Disk quota exceeded" in log:
        return TaskEnd(status="disk_full", message=f"the disk of {node_folder()} is full: {message}")
    return TaskEnd(status="cannot_start" if code == _CANNOT_START else "ended", message=message)


def _tail(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _message(log: str, code: int) -> str:
    """Return fpxbench's own last message in `log`, else its last line, and how the process ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    own = [line.removeprefix("fpxbench: ") for line in lines if line.startswith("fpxbench: ")]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    return f"{(own or lines)[-1][:500]} ({how})" if lines else how

"""Run a function in a warm child process, under a watcher that survives its failures.

::

    with Isolation(memory_limit) as isolation:
        outcome = isolation.call("fpxbench.sweep.trial:run_trial", request, timeout_s=180)

The child is forked from a server that has PyTorch loaded, so that a new one after a crash costs milliseconds. It serves
calls one by one. The watcher limits a call's duration and memory; if the child dies, the verdict has the signal, the
exit code, and the end of its output. This process never imports PyTorch.

Other modules start their own processes, for purposes that this one does not serve:

- `fpxbench.targets.child` runs inside *another* Triton, without fpxbench, PyTorch or pydantic, and forks a child for
  each of thousands of compilations, several at a time;
- `fpxbench.regressions.rerun` runs a whole ``fpxbench run`` with another build's interpreter;
- `fpxbench.sweep.plan` runs a plain subprocess: it is called where asv imports its benchmarks, in a server that asv
  forks, which must not own a fork server;
- `fpxbench.builds` runs other interpreters to read what is installed in them.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import connection as connections
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self, TypeVar

import psutil
from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from fpxbench.records.verdict import Status, Verdict, classify_death, classify_exception
from fpxbench.sweep import worker
from fpxbench.sweep.gate import Gate, Member, Stopwatch
from fpxbench.user_error import UserError

LOG_TAIL_BYTES = 4096
CLOSE_GRACE_S = 1.0
"""How long a child may take to exit after its last call."""
TERM_GRACE_S = 0.3
"""Time between SIGTERM and SIGKILL for a child past its time limit: hanging native code ignores the first."""
POLL_S = 0.05
_MOST_MODULES_BYTES = 1 << 16
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one call."""

    value: str | None
    """The function's return value as JSON; None if it failed, for the reason in `verdict`."""
    verdict: Verdict | None
    log_tail: str
    mistake: str = ""
    """The message of an error that the user has to correct (`worker.MISTAKES`)."""
    missing_module: str = ""
    """The top-level module whose import failed, if that ended the call."""
    elapsed_s: float = 0.0
    """Total duration of the call."""
    waited_s: float = 0.0
    """The part of `elapsed_s` spent waiting for a device lock, which time limits do not count."""

    @property
    def failure(self) -> Verdict:
        """The verdict of a failed call. Raise RuntimeError for a call that returned a value."""
        if self.verdict is None:
            raise RuntimeError("the call returned a value")
        return self.verdict

    def read(self, kind: type[T]) -> T:
        """Return the value as a `kind`."""
        return TypeAdapter(kind).validate_json(self.value or "")

    def required(self, kind: type[T], failed: str) -> T:
        """Return the value as a `kind`. Without a value, raise ValueError for a user's mistake, else CannotStart."""
        if self.mistake:
            raise ValueError(self.mistake)
        if self.value is None:
            raise CannotStart(failed, self)
        return self.read(kind)


class CannotStart(UserError):
    """A run could not begin; the message gives the reason and the child's last output."""

    def __init__(self, failed: str, outcome: Outcome) -> None:
        super().__init__(
            f"{failed}: {outcome.failure.summary.removeprefix('raised ')}\n{outcome.log_tail.rstrip()}".rstrip()
        )


class Cancelled(Exception):
    """A call was ended by `Isolation.cancel`."""


class Isolation:
    """A context in which functions are called in a watched child, one at a time.

    Several may be used at once, each in its own thread, as by `fpxbench.sweep.pool`.

    Parameters
    ----------
    memory_limit : bytes that the child and its descendants may hold
    announce : called with a message when a call has waited for a device lock for a second
    gate : stops other children while a call of this one holds the device lock
    """

    def __init__(self, memory_limit: int, announce: Callable[[str], None] | None = None,
                 gate: Gate | None = None) -> None:
        self.memory_limit = memory_limit
        self.announce = announce or _print_message
        self.gate = gate or Gate(groups=False)
        self._cancelled = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="fpxbench-")
        self._child: _Child | None = None
        self._calls = 0
        self._context = _Context()
        self._context.set_forkserver_preload(["fpxbench.sweep._fork_server"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one, and delete its files."""
        if self._child is not None:
            # A regular exit lets libraries release what they own (Inductor's compile workers).
            self._child.connection.close()
            self._child.process.join(CLOSE_GRACE_S)
        self.recycle()
        self._folder.cleanup()

    def recycle(self) -> None:
        """Kill the child, which may be damaged (a GPU context after a fault); the next call gets a new one."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def cancel(self) -> None:
        """Kill the child, from another thread. The running call, and any later one, raises `Cancelled`."""
        self._cancelled.set()

    def call(self, target: str, *arguments: Any, timeout_s: float, purpose: str = "") -> Outcome:
        """Call ``module:function`` with `arguments` in the child, and return the outcome.

        Arguments and value are passed as JSON and validated by the function's type hints. `timeout_s` limits the call,
        excluding time spent waiting for a device lock or stopped by the gate, which shows it as `purpose`.
        KeyboardInterrupt kills the child and is re-raised.
        """
        self._calls += 1
        base = Path(self._folder.name) / str(self._calls)
        request = worker.CallRequest(target=target, arguments=to_jsonable_python(list(arguments)))
        base.with_suffix(".request").write_text(request.model_dump_json(), encoding="utf-8")
        log = base.with_suffix(".log")
        log.touch(mode=0o600)
        oom_kills = _kernel_oom_kills()
        try:
            child = self._ready_child()
            watch = _Watch(timeout_s, self.memory_limit, self.announce, self._cancelled)
            assert child.process.pid is not None
            with self.gate.member(child.process.pid, purpose or target, watch.stopwatch) as member:
                child.connection.send_bytes(base.name.encode())
                ended = watch.until_end(child, self.gate, member)
        except BaseException:       # KeyboardInterrupt above all
            self.recycle()
            raise
        tail = _tail(log)
        reply, verdict = None, None
        if ended == "reply":
            reply = worker.Reply.model_validate_json(base.with_suffix(".reply").read_bytes())
            if reply.value is None:
                verdict = classify_exception(reply.raised, reply.message, tail)
        else:
            verdict = self._ended(ended, child, watch, oom_kills, tail)
            self.recycle()          # kills its descendants too
        if verdict is not None:
            verdict.log_tail = tail
        for suffix in (".request", ".reply", ".log"):
            base.with_suffix(suffix).unlink(missing_ok=True)
        return Outcome(
            reply.value if reply else None, verdict, tail, mistake=reply.message if reply and reply.mistake else "",
            missing_module=reply.missing_module if reply else "",
            elapsed_s=watch.stopwatch.elapsed_s, waited_s=watch.stopwatch.waited_s,
        )

    def _ended(self, how: str, child: _Child, watch: _Watch, oom_kills: int, tail: str) -> Verdict:
        if how == "timeout":
            child.terminate()
            how_long = watch.hung or f"was still running after {watch.stopwatch.counted_s:.0f} s"
            return Verdict(status=Status.TIMEOUT, summary=f"{how_long} and was ended")
        if how == "memory":
            return Verdict(
                status=Status.OOM, exit_code=-signal.SIGKILL, signal="SIGKILL",
                summary=f"held {watch.memory / 2**30:.2f} GiB, more than the limit of {self.memory_limit / 2**30:.2f} "
                        f"GiB, and was ended")
        child.kill()                # if it exited, kills the rest of its group
        code = child.process.exitcode or 0
        if code == -signal.SIGKILL and _kernel_oom_kills() > oom_kills:
            return Verdict(status=Status.OOM, exit_code=code, signal="SIGKILL",
                           summary="the kernel ran out of memory and ended it")
        return classify_death(code, tail)

    def _ready_child(self) -> _Child:
        if self._child is not None and not self._child.process.is_alive():
            self.recycle()
        if self._child is None:
            self._child = _Child(self._context, self._folder.name)
        return self._child


class _Child:
    """The child process and this end of the pipe to it."""

    def __init__(self, context: _Context, folder: str) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=worker.serve, args=(theirs, folder))
        self.process.start()
        theirs.close()
        atexit.register(self.kill)      # at exit, multiprocessing would wait for its children for ever

    def terminate(self) -> None:
        """Send SIGTERM to the process group."""
        _signal_group(self.process.pid, signal.SIGTERM)
        self.process.join(TERM_GRACE_S)

    def kill(self) -> None:
        """Kill the process group, which includes what the child started (compilers)."""
        _signal_group(self.process.pid, signal.SIGKILL)
        self.process.kill()         # if it died before it made the group
        self.process.join()
        self.connection.close()
        atexit.unregister(self.kill)


class _Watch:
    """The watcher of one call: its duration, its memory, its waiting for a device lock."""

    def __init__(self, timeout_s: float, memory_limit: int, announce: Callable[[str], None],
                 cancelled: threading.Event) -> None:
        self.memory = 0
        self.hung = ""
        """The child's message about a hanging kernel."""
        self.stopwatch = Stopwatch()
        self._timeout_s, self._memory_limit, self._announce = timeout_s, memory_limit, announce
        self._cancelled = cancelled

    def until_end(self, child: _Child, gate: Gate, member: Member) -> str:
        """Wait for the end of the call, and return the reason: ``reply``, ``exit``, ``timeout`` or ``memory``. Raise
        Cancelled."""
        while True:
            ready = connections.wait([child.connection, child.process.sentinel], POLL_S)
            if self._cancelled.is_set():
                raise Cancelled
            if child.connection in ready:
                try:
                    event, message = json.loads(child.connection.recv_bytes())
                    if event == "done":
                        return "reply"
                    if event == "hung":
                        self.hung = message
                        gate.note_hang()
                        return "timeout"
                    self._note(event, message, child, gate, member)
                except (EOFError, ConnectionError):     # the child closed its end and is about to exit
                    child.process.join(CLOSE_GRACE_S)
                    return "exit"
            elif child.process.sentinel in ready:       # without waiting for descendants that hold the pipe open
                return "exit"
            self.memory = _memory_of_tree(child.process.pid)
            if self.memory > self._memory_limit:
                return "memory"
            if self.stopwatch.counted_s >= self._timeout_s:
                return "timeout"

    def _note(self, event: str, message: str, child: _Child, gate: Gate, member: Member) -> None:
        if event == "begin":
            self.stopwatch.hold()
        elif event == "announce":
            self._announce(message)
        elif event == "end":
            self.stopwatch.release()
        elif event == "timing":
            gate.begin_timing(member, self._cancelled.is_set)
            child.connection.send_bytes(b"alone")
        elif event == "busy":
            gate.let_others_end(member, self._cancelled.is_set)
            child.connection.send_bytes(b"alone")
        elif event == "timed":
            gate.end_timing(member)


def _print_message(message: str) -> None:
    print(f"fpxbench: {message}", file=sys.stderr, flush=True)


_one_start_at_a_time = threading.Lock()


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        # multiprocessing runs the caller's main module again in each child. These children do not need it, and a script
        # without a ``__main__`` guard would start a sweep within the sweep.
        with _one_start_at_a_time:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                return ForkServerProcess._Popen(process)
            finally:
                sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


def _memory_of_tree(pid: int | None) -> int:
    """Return the bytes of private memory that a process and its descendants hold."""
    total, pids = 0, [pid] if pid is not None else []
    for one in pids:        # the list grows during iteration
        with contextlib.suppress(OSError, psutil.Error):    # it may have ended meanwhile
            resident, shared = _read(f"/proc/{one}/statm").split()[1:3]
            total += (int(resident) - int(shared)) * _PAGE_BYTES
            pids += _children(one)
    return total


def _children(pid: int) -> list[int]:
    if not _kernel_lists_children():
        return [child.pid for child in psutil.Process(pid).children()]
    return [int(child) for thread in os.listdir(f"/proc/{pid}/task")
            for child in _read(f"/proc/{pid}/task/{thread}/children").split()]


@cache
def _kernel_lists_children() -> bool:
    """Return whether the kernel lists a thread's children; otherwise psutil searches all processes."""
    return Path("/proc/thread-self/children").exists()


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:     # called up to 20 times a second for each thread of each case
        return file.readall()


def _signal_group(pid: int | None, number: signal.Signals) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, number)


def _kernel_oom_kills() -> int:
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _tail(log: Path) -> str:
    """Return the last 4 kB of a log, without the list of extension modules that Python prints on a crash: it is as long
    itself, and would displace the compiler's last messages."""
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_TAIL_BYTES - _MOST_MODULES_BYTES))
        text = re.sub(rb"\n+Extension modules: [^\n]*\(total: \d+\)", b"", file.read())
    return text[-LOG_TAIL_BYTES:].decode(errors="replace")

"""Run a case where it can do no harm: in a warm child that is watched from outside.

A pebble pool of one process, forked from a server that has torch loaded, so that a new child after a crash costs
milliseconds and not torch's import. The watcher bounds duration and memory; whatever ends the child becomes a verdict
with its signal, exit code, and the last 4 kB it wrote.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Self

import pebble
import psutil

from fpxbench.records.verdict import Status, Verdict, classify_death, classify_exception
from fpxbench.sweep import worker

LOG_TAIL_BYTES = 4096
_FAREWELL_S = 1.0
_MOST_MODULES_BYTES = 1 << 16
POLL_S = 0.03
_TERM_GRACE_S = 0.3
"""A child past its time gets SIGTERM, and after this SIGKILL: what hangs in native code does not listen."""


@dataclass(frozen=True)
class Outcome:
    """What came of one call in the child: its JSON, or the verdict on its end."""

    value: str | None
    verdict: Verdict | None
    log_tail: str


class Isolation:
    """A context that runs functions of `fpxbench.sweep.worker` in a watched child, one at a time."""

    def __init__(self, memory_limit: int) -> None:
        self.memory_limit = memory_limit
        self._folder = tempfile.TemporaryDirectory(prefix="fpxbench-")
        self._pool: pebble.ProcessPool | None = None
        self._calls = 0
        pebble.CONSTS.term_timeout = _TERM_GRACE_S
        self._context = _Context()
        self._context.set_forkserver_preload(["fpxbench.sweep._preload"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one, and forget its logs."""
        if self._pool is not None:
            # Asked first: what the case's libraries hold (Inductor's compile workers) is then given back in order.
            self._pool.close()
            with contextlib.suppress(TimeoutError):
                self._pool.join(timeout=_FAREWELL_S)
        self.recycle()
        self._folder.cleanup()

    def recycle(self) -> None:
        """End the child; the next call gets a new one. For when it may be damaged (a GPU context after a fault)."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def call(self, function: Callable[..., str], *arguments: object, timeout_s: float) -> Outcome:
        """``function(*arguments, log)`` in the child. KeyboardInterrupt ends the child and goes on to the caller."""
        self._calls += 1
        log = Path(self._folder.name) / f"{self._calls}.log"
        log.touch(mode=0o600)
        kills_before = _kernel_oom_kills()
        pool = self._ready_pool()
        future = pool.schedule(function, args=[*arguments, str(log)], timeout=timeout_s)
        watch = _MemoryWatch(Path(f"{log}.pid"), self.memory_limit)
        started = time.monotonic()
        try:
            # Asked for, not raised: a KeyboardInterrupt or SystemExit of the child's is its own, not this process's.
            error = future.exception()
        except KeyboardInterrupt:
            _end_group(watch.pid)
            self.recycle()
            raise
        finally:
            watch.stop()
            tail = _tail(log)
        value = verdict = None
        if error is None:
            value = future.result()
        elif isinstance(error, pebble.ProcessExpired):
            verdict = self._death(error, watch, kills_before, tail)
            _end_group(watch.pid)   # what it had started
        elif isinstance(error, TimeoutError) and (elapsed := time.monotonic() - started) >= timeout_s:
            verdict = Verdict(status=Status.TIMEOUT, summary=f"was still running after {elapsed:.0f} s and was ended")
            _end_group(watch.pid)
        else:   # it asked to exit, or the child's own machinery failed: an unpicklable result, an import error
            verdict = classify_exception(type(error).__name__, str(error), tail)
        if verdict is not None:
            verdict.log_tail = tail
        for file in (log, Path(f"{log}.pid")):
            file.unlink(missing_ok=True)
        return Outcome(value, verdict, tail)

    def _death(self, death: pebble.ProcessExpired, watch: _MemoryWatch, kills_before: int, tail: str) -> Verdict:
        code = death.exitcode if death.exitcode is not None else 0
        if watch.exceeded_by:
            return Verdict(
                status=Status.OOM, exit_code=code, signal="SIGKILL",
                summary=f"held {watch.exceeded_by / 2**30:.2f} GiB, more than the limit of {self.memory_limit / 2**30:.2f} GiB, and was ended",
            )
        if code == -signal.SIGKILL and _kernel_oom_kills() > kills_before:
            return Verdict(status=Status.OOM, exit_code=code, signal="SIGKILL", summary="the kernel ran out of memory and ended it")
        return classify_death(code, tail)

    def _ready_pool(self) -> pebble.ProcessPool:
        if self._pool is None or not self._pool.active:
            self._pool = pebble.ProcessPool(max_workers=1, context=self._context, initializer=worker.start_worker)
        return self._pool


@contextlib.contextmanager
def device_turn(kind: str) -> Iterator[None]:
    """Whoever measures on one device of this machine takes turns, case by case: nobody is timed beside another."""
    path = Path(tempfile.gettempdir()) / f"fpxbench-{kind}-{os.getuid()}.lock"
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process: BaseProcess) -> object:
        # multiprocessing runs the caller's main module again in each child. Ours needs nothing of it, and a script
        # without a ``__main__`` guard would start a sweep within the sweep.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            return ForkServerProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class _Context(ForkServerContext):
    Process = _Process


class _MemoryWatch:
    """A thread that adds up the child's memory, its own children included, and ends it beyond the limit."""

    def __init__(self, pid_file: Path, limit: int) -> None:
        self.exceeded_by = 0
        self._pid_file, self._limit = pid_file, limit
        self._pid: int | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fpxbench-memory-watch", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The child, as soon as it has said which it is."""
        if self._pid is None:
            with contextlib.suppress(OSError, ValueError):  # not written yet, or only half
                self._pid = int(self._pid_file.read_text())
        return self._pid

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            pid = self.pid
            held = _memory_of_tree(pid) if pid is not None else 0
            if held > self._limit:
                self.exceeded_by = held
                _end_group(pid)
                return


def _memory_of_tree(pid: int) -> int:
    held = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):     # ended meanwhile
                info = member.memory_info()
                held += info.rss - getattr(info, "shared", 0)
    return held


def _end_group(pid: int | None) -> None:
    """Kill a child's whole process group: what it started (compilers) goes with it."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _kernel_oom_kills() -> int:
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def _tail(log: Path) -> str:
    """The last 4 kB that were said. Not counted: Python's list of loaded extension modules on a crash, which alone is as
    long and would leave none of the compiler's last words."""
    with open(log, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LOG_TAIL_BYTES - _MOST_MODULES_BYTES))
        said = re.sub(rb"\n+Extension modules: [^\n]*\(total: \d+\)", b"", file.read())
    return said[-LOG_TAIL_BYTES:].decode(errors="replace")

"""Lock a device, so that only one timing at a time runs on it.

The lock is a file in $FPXBENCH_LOCK_FOLDER, by default the folder for temporary files. Only code that measures time or
bandwidth takes it, not correctness checks, so that a hanging case does not delay others. The file names its holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import re
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal

ANNOUNCE_AFTER_S = 1.0
FOLDER_VARIABLE = "FPXBENCH_LOCK_FOLDER"
"""Belongs to the machine, so it lacks the prefix FPX_ of a sweep's settings, which reruns do not inherit."""

Event = Literal["begin", "announce", "end", "timing", "timed", "busy", "hung"]
"""begin, announce, end : waiting begins; has lasted `ANNOUNCE_AFTER_S` (the message names the lock's holder); ends
timing, timed : timing is about to begin (the message is its purpose); has ended
busy : the device is busy although the sweep's other children are stopped
hung : a kernel of this process hangs"""


def _print_message(event: Event, message: str) -> None:
    if event in ("announce", "hung"):
        print(f"fpxbench: {message}", file=sys.stderr, flush=True)


listener: Callable[[Event, str], None] = _print_message
"""Called on each event, in the process that waits or times. By default it prints announcements to stderr. In a sweep it
returns from ``timing`` and ``busy`` once the other children have stopped."""


_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Each lists the GPUs that a process may use, by index or UUID; the first is its ``cuda``."""


def lock_file(device: str) -> Path:
    """Return the path of the lock for `device` (``cpu``, ``cuda``). Each GPU of the machine has its own."""
    name = device + (_which_gpu() if device == "cuda" else "")
    return Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir()) / f"fpxbench-{name}-{os.getuid()}.lock"


def _which_gpu() -> str:
    """Return a suffix for the GPU that is this process's ``cuda``; "" for the machine's first GPU."""
    lists = [os.environ[name] for name in _VISIBLE if os.environ.get(name)]
    first = re.sub(r"[^A-Za-z0-9-]", "", lists[0].partition(",")[0]) if lists else "0"
    return "" if first in ("0", "") else f"-{first[:80]}"


_locked: set[str] = set()
"""Devices that this process has locked."""


@contextlib.contextmanager
def device_lock(device: str, purpose: str) -> Iterator[None]:
    """Hold the lock of `device` while `purpose` (such as a case id) is timed; wait for it without a limit.

    Locking the device again within the context does nothing.
    """
    if device in _locked:
        yield
        return
    with open(lock_file(device), "a+", encoding="utf-8") as file:
        if not _acquired(file):
            _wait(file, device)
        _write_holder(file, purpose)
        _locked.add(device)
        try:
            listener("timing", purpose)
            yield
        finally:
            _locked.discard(device)
            file.truncate(0)
            listener("timed", "")


def _acquired(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(file: IO[str], device: str) -> None:
    listener("begin", "")
    announcing = threading.Timer(ANNOUNCE_AFTER_S, _announce, (file, device))
    announcing.start()
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    finally:
        announcing.cancel()
        announcing.join()
        listener("end", "")


def _announce(file: IO[str], device: str) -> None:
    holder = _holder(file) or "a process that did not name itself"
    if holder.startswith(f"process {_watcher_pid()} ("):    # another case of the same sweep
        return
    listener("announce", f"waiting to time on {device}, which is in use by {holder}")


def _holder(file: IO[str]) -> str:
    """Return the holder's description of itself; "" if it has not been written yet."""
    for _ in range(3):
        file.seek(0)
        if holder := file.read().strip():
            return holder
        time.sleep(0.02)
    return ""


def _watcher_pid() -> int | None:
    """Return the id of this process, or of its sweep if it is a sweep's child."""
    watcher = multiprocessing.parent_process()
    return os.getpid() if watcher is None else watcher.pid


def _write_holder(file: IO[str], purpose: str) -> None:
    file.truncate(0)
    file.write(f"process {_watcher_pid()} ({shlex.join(sys.argv)[:200]}), timing {purpose}\n")
    file.flush()

"""What cases do to their process at their worst; run in isolation's child by test_isolation."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fpxbench.casts.codec_speed import SpeedRow
from fpxbench.checking.device_lock import device_lock
from fpxbench.checking.device_wait import HANG_S, HangWatch


def say(words: str) -> str:
    print(words)
    return words


def pid() -> int:
    return os.getpid()


def segfault() -> str:
    native = ctypes.CDLL(None)
    native.dprintf(2, b"native code says: reading address 0\n")
    native.strlen(None)
    return "survived"


def abort(words: str) -> str:
    os.write(2, words.encode())
    os.abort()


def exit_with(code: int) -> str:
    os._exit(code)


def system_exit() -> str:
    sys.exit(4)


def pretend_ctrl_c() -> str:
    raise KeyboardInterrupt


def raise_error() -> str:
    raise LookupError("no such kernel")


def hang_deaf(pid_file: str) -> str:
    """Ignore SIGTERM, and start a child of its own that would outlive it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pid_file).write_text(str(child.pid))
    print("hanging", flush=True)
    time.sleep(600)
    return "survived"


def allocate() -> str:
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20)) * 32)    # written to, so that it is really held
        time.sleep(0.005)


def allocate_in_a_child() -> str:
    code = "import time\nheld = []\nwhile True:\n    held.append(bytearray(b'x') * (32 << 20))\n    time.sleep(0.005)"
    return str(subprocess.run([sys.executable, "-c", code], check=False).returncode)


def flood() -> str:
    os.write(1, b"x" * 1_000_000)
    os.write(2, b"\xff the last words")
    os.kill(os.getpid(), signal.SIGBUS)


def read_stdin() -> str:
    return repr(sys.stdin.read())


def exit_with_a_child_that_lives_on() -> str:
    """End in order, while a process that it started holds every pipe of this one open."""
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)


def use_multiprocessing() -> int:
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(pow, (2, 2))


def use_the_device(device: str, seconds: float) -> str:
    """Hold the lock of `device` for so long."""
    with device_lock(device, "a case"):
        time.sleep(seconds)
    return "timed"


def reject(value: int) -> str:
    raise ValueError(f"{value} is not allowed")


def segfault_on_e5m2(row: str, elements: int, budget_s: float) -> SpeedRow:
    from fpxbench.casts.codec_timing import measure_row

    if "e5m2" in row:
        segfault()
    return measure_row(row, elements, budget_s)


def hanging_kernel() -> None:
    """Wait for a kernel that does not end, on a clock that runs fast."""
    watch = HangWatch()
    watch.waits, watch.waiting = 1, True
    for _ in range(HANG_S + 1):
        watch.tick()
    time.sleep(600)

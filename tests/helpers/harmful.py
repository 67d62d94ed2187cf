"""What cases do to their process at their worst; run in isolation's child by test_isolation."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fpxbench.sweep.worker import logged


def say(words: str, log: str) -> str:
    with logged(log):
        print(words)
        return words


def pid(log: str) -> str:
    with logged(log):
        return str(os.getpid())


def segfault(log: str) -> str:
    with logged(log):
        native = ctypes.CDLL(None)
        native.dprintf(2, b"native code says: reading address 0\n")
        native.strlen(None)
        return "survived"


def abort(words: str, log: str) -> str:
    with logged(log):
        os.write(2, words.encode())
        os.abort()


def exit_with(code: int, log: str) -> str:
    with logged(log):
        os._exit(code)


def system_exit(log: str) -> str:
    with logged(log):
        sys.exit(4)


def pretend_ctrl_c(log: str) -> str:
    with logged(log):
        raise KeyboardInterrupt


def raise_error(log: str) -> str:
    with logged(log):
        raise LookupError("no such kernel")


def hang_deaf(pid_file: str, log: str) -> str:
    """Does not listen to SIGTERM, and has a child of its own that would outlive it."""
    with logged(log):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(pid_file).write_text(str(child.pid))
        print("hanging", flush=True)
        time.sleep(600)
        return "survived"


def allocate(log: str) -> str:
    with logged(log):
        held = []
        while True:
            held.append(bytearray(os.urandom(1 << 20)) * 32)    # written to, so that it is really held
            time.sleep(0.005)


def allocate_in_a_child(log: str) -> str:
    with logged(log):
        code = "import time\nheld = []\nwhile True:\n    held.append(bytearray(b'x') * (32 << 20))\n    time.sleep(0.005)"
        return str(subprocess.run([sys.executable, "-c", code], check=False).returncode)


def flood(log: str) -> str:
    with logged(log):
        os.write(1, b"x" * 1_000_000)
        os.write(2, b"\xff the last words")
        os.kill(os.getpid(), signal.SIGBUS)


def read_stdin(log: str) -> str:
    with logged(log):
        return repr(sys.stdin.read())

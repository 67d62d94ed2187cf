"""Become the command of a task: ``python _launch.py PARENT CORES COMMAND…``.

The kernel ends the process with the thread that began it, and keeps it on these cores (``0,1,2``). This is done in a
process of its own: between fork and exec (`preexec_fn`) destructors of libraries that the worker had loaded have
deadlocked.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: str, cores: str, *command: str) -> None:
    """Settle in, and execute the command."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):     # it ended before
        os.kill(os.getpid(), signal.SIGKILL)
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Execute the command of a task: ``python _launch.py PARENT CORES COMMAND…``.

The kernel kills the process when the thread that started it ends, and keeps it on these cores (``0,1,2``). A separate
script sets this up: in `preexec_fn`, between fork and exec, destructors of libraries that the worker had loaded
deadlocked.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: str, cores: str, *command: str) -> None:
    """Bind the process to its parent and cores, and execute the command."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):     # the parent ended before prctl
        os.kill(os.getpid(), signal.SIGKILL)
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(*sys.argv[1:])

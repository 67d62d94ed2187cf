"""What runs inside the watched child: JSON in, JSON out, everything it prints kept in a file.

The module imports nothing heavy: the parent that watches never imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start_worker() -> None:
    """Once in each new child: a process group of its own, first in line for the kernel's out-of-memory killer, no core
    files, and no life after the process that watches it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # Ctrl-C is the parent's to handle
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # refused in some containers, where it is only a preference
        Path("/proc/self/oom_score_adj").write_text("1000")
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _die_with_watcher(multiprocessing.parent_process().sentinel)


def _die_with_watcher(sentinel: int) -> None:
    """Have the kernel kill this process group once the other end of the pipe `sentinel` is closed.

    A child's parent is the fork server, which lives as long as any child of its does, so the signal on the parent's death
    does not tell that the watcher is gone. A thread that waits for it would need the interpreter's lock, which native code
    that hangs may hold.
    """
    fcntl.fcntl(sentinel, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(sentinel, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(sentinel, fcntl.F_SETFL, fcntl.fcntl(sentinel, fcntl.F_GETFL) | os.O_ASYNC)


def preload() -> None:
    """Imported once by the fork server, so that a new child has torch from its first moment."""
    import torch._inductor.config
    from tqdm import tqdm

    import fpxbench.sweep.trial  # noqa: F401

    # torch.compile draws with tqdm, whose own lock is a semaphore that an ended child leaves behind.
    tqdm.set_lock(threading.RLock())
    # Inductor's fused CPU loops then show in the profiler, so that they can be counted.
    torch._inductor.config.cpp.enable_kernel_profile = True


def machine_json(device: str | None, name: str | None, log: str) -> str:
    """The machine with its measured read bandwidth."""
    with logged(log):
        from fpxbench.checking import machine

        device = device or machine.default_device()
        described = machine.describe(device, name)
        bandwidth = machine.measure_read_bandwidth(device, described.cache_bytes)
        return described.model_copy(update={"read_gb_per_s": round(bandwidth, 3)}).model_dump_json()


def device_json(device: str | None, name: str | None, log: str) -> str:
    """The machine, its bandwidth not measured."""
    with logged(log):
        from fpxbench.checking import machine

        return machine.describe(device or machine.default_device(), name).model_dump_json()


def plan_json(settings: str, log: str) -> str:
    """The plan, or ``{"mistake": …}`` where the settings select nothing."""
    with logged(log):
        from fpxbench.sweep.selection import make_plan
        from fpxbench.sweep.settings import Settings

        try:
            return make_plan(Settings.model_validate_json(settings)).model_dump_json()
        except (ValueError, FileNotFoundError) as mistake:
            return json.dumps({"mistake": str(mistake)})


def trial_json(request: str, log: str) -> str:
    with logged(log):
        from fpxbench.sweep.messages import TrialRequest
        from fpxbench.sweep.trial import run_trial

        return run_trial(TrialRequest.model_validate_json(request)).model_dump_json()


def conversions_json(request: str, log: str) -> str:
    with logged(log):
        from fpxbench.casts.cast_messages import RESULTS, NumericsRequest
        from fpxbench.casts.cast_trial import run_conversions

        return RESULTS.dump_json(run_conversions(NumericsRequest.model_validate_json(request))).decode()


def inspection_json(request: str, log: str) -> str:
    """The inspection, or ``{"mistake": …}`` where what was asked for is not there."""
    with logged(log):
        from fpxbench.diagnosis.blackbox.inspection import InspectRequest
        from fpxbench.diagnosis.blackbox.inspector import CannotInspect, inspect

        try:
            return inspect(InspectRequest.model_validate_json(request)).model_dump_json()
        except CannotInspect as mistake:
            return json.dumps({"mistake": str(mistake)})


def conversion_part_json(request: str, part: int, log: str) -> str:
    with logged(log):
        from fpxbench.casts.cast_messages import RESULTS, NumericsRequest
        from fpxbench.casts.exhaustive import run_part

        return RESULTS.dump_json(run_part(NumericsRequest.model_validate_json(request), part)).decode()


@contextlib.contextmanager
def logged(log: str) -> Iterator[None]:
    """stdout and stderr, native code's too, go to the file `log`; `log`.pid tells the watcher whom to watch."""
    Path(log + ".pid").write_text(str(os.getpid()))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    saved = [os.dup(1), os.dup(2)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    faulthandler.enable(file=2)     # a fatal signal leaves Python's stack in the log
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)

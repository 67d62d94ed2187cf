"""What the fork server imports once, so that each child starts with PyTorch loaded."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
from pathlib import Path

_GPU_DRIVERS = "/dev/nvidiactl", "/dev/kfd"


def preload() -> None:
    """Import PyTorch and the trial, without asking CUDA for anything: a process that did could not fork users of it.

    The compiler, whose import takes as long as that of the rest, is left to the cases that compile. Where there is a
    GPU it is imported too: each child there makes its autotuners time alone.
    """
    from tqdm import tqdm

    # Inductor's fused CPU loops then show in the profiler, so that they can be counted.
    os.environ["TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE"] = "1"
    import fpxbench.sweep.trial  # noqa: F401

    compiler_options = sys.modules.get("torch._inductor.config")
    if compiler_options is not None:        # in a user's own process; it read the environment when it was imported
        compiler_options.cpp.enable_kernel_profile = True
    if any(Path(driver).exists() for driver in _GPU_DRIVERS):
        with contextlib.suppress(Exception):        # it fails again where it is used
            importlib.import_module("torch._inductor.select_algorithm")
    # torch.compile draws with tqdm, whose own lock is a semaphore that a killed child leaves behind.
    tqdm.set_lock(threading.RLock())

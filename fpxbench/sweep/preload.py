"""What the fork server imports once, so that each child starts with PyTorch loaded."""

from __future__ import annotations

import os
import sys
import threading


def preload() -> None:
    """Import PyTorch and the trial, without asking CUDA for anything: a process that did could not fork users of it.

    The compiler is left to the cases that compile: importing it takes as long as importing the rest, and that of some
    releases (2.11) asks CUDA for its devices.
    """
    from tqdm import tqdm

    # Inductor's fused CPU loops then show in the profiler, so that they can be counted.
    os.environ["TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE"] = "1"
    import fpxbench.sweep.trial  # noqa: F401

    compiler_options = sys.modules.get("torch._inductor.config")
    if compiler_options is not None:        # in a user's own process; it read the environment when it was imported
        compiler_options.cpp.enable_kernel_profile = True
    # torch.compile draws with tqdm, whose own lock is a semaphore that a killed child leaves behind.
    tqdm.set_lock(threading.RLock())

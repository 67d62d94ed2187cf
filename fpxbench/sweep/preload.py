"""Imports of the fork server, so that each child starts with PyTorch loaded."""

from __future__ import annotations

import os
import sys
import threading


def preload() -> None:
    """Import PyTorch and the trial without initializing CUDA, which forked children could not use afterwards.

    The compiler is imported by the cases that compile: that takes as long as importing the rest, and initializes CUDA
    in some releases (2.11).
    """
    from tqdm import tqdm

    # Makes Inductor's fused CPU loops visible to the profiler, which counts them.
    os.environ["TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE"] = "1"
    import fpxbench.sweep.trial  # noqa: F401

    compiler_options = sys.modules.get("torch._inductor.config")
    if compiler_options is not None:        # in a user's own process: it read the environment on import
        compiler_options.cpp.enable_kernel_profile = True
    # torch.compile uses tqdm, whose default lock is a semaphore that a killed child leaves behind.
    tqdm.set_lock(threading.RLock())

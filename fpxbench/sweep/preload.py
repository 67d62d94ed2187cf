"""What the fork server imports once, so that each child starts with PyTorch loaded."""

from __future__ import annotations

import threading


def preload() -> None:
    """Import PyTorch and the trial, without asking CUDA for anything: a process that did could not fork users of it."""
    import torch._inductor.config
    from tqdm import tqdm

    import fpxbench.sweep.trial  # noqa: F401

    # torch.compile draws with tqdm, whose own lock is a semaphore that a killed child leaves behind.
    tqdm.set_lock(threading.RLock())
    # Inductor's fused CPU loops then show in the profiler, so that they can be counted.
    torch._inductor.config.cpp.enable_kernel_profile = True

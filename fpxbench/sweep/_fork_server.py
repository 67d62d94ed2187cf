"""Preloaded by the fork server of `fpxbench.sweep.isolation` before it forks its first child."""

import contextlib
import gc

from fpxbench.sweep.preload import preload

# If PyTorch fails to import here, it fails again in the child, where the call reports it.
with contextlib.suppress(Exception):
    preload()
# A child collects garbage after each case; frozen objects, PyTorch's million among them, are not visited.
gc.freeze()

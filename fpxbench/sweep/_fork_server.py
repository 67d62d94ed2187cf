"""Imported by the fork server of `fpxbench.sweep.isolation` before it forks its first child."""

import contextlib
import gc

from fpxbench.sweep.preload import preload

# A PyTorch that fails to import fails again in the child, where the call reports it.
with contextlib.suppress(Exception):
    preload()
# A child collects garbage after each case. Without this it would visit the million objects of PyTorch each time.
gc.freeze()

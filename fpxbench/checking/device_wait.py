"""Wait for a GPU, and detect kernels that hang.

A hanging kernel (two launches that spin on each other's locks) keeps its time slices even while the process that
launched it is stopped, so that every timing beside it is of a shared device. `synchronize` reports a hang to the
process's watcher after `HANG_S`; `wait_until_idle` gives the watcher time to kill such a process, and returns whether
the device is idle.
"""

from __future__ import annotations

import threading
import time

import torch

from fpxbench.checking import device_lock

HANG_S = 20
"""Far longer than any call takes, even with many cases sharing the GPU: most take milliseconds."""
_IDLE_ANSWER_S, _IDLE_FOR_S, _IDLE_WITHIN_S = 5e-4, 1e-2, 5.0
"""A GPU is idle once it has answered launches within the first for the second; waiting for it ends after the third."""


class HangWatch(threading.Thread):
    """Reports a wait for the GPU that has lasted `HANG_S`, once, to this process's watcher.

    Counts its own one-second ticks and not the clock, so that time during which the process is stopped does not count.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="hang-watch")
        self.waits = 0
        """How many waits have begun."""
        self.waiting = False
        self._seen, self._ticks = 0, 0

    def run(self) -> None:
        while True:
            time.sleep(1.0)
            self.tick()

    def tick(self) -> None:
        """Note that a second has passed."""
        same = self.waiting and self.waits == self._seen
        self._seen, self._ticks = self.waits, self._ticks + 1 if same else 0
        if self._ticks == HANG_S:
            device_lock.listener("hung", f"a kernel was still running {HANG_S} s after its launch")


_watch: HangWatch | None = None


def synchronize() -> None:
    """Wait until the GPU has done all that this process launched."""
    global _watch
    if _watch is None:
        _watch = HangWatch()
        _watch.start()
    _watch.waits += 1
    _watch.waiting = True
    try:
        torch.cuda.synchronize()
    finally:
        _watch.waiting = False


def wait_until_idle(device: str) -> bool:
    """Wait until a GPU is idle, that is, until work launched by stopped processes is done. Return whether it is.

    If it stays busy for `_IDLE_WITHIN_S`, the sweep resumes its other cases to find the one that hangs, and the GPU is
    tried once more.
    """
    if device == "cpu" or _idle(device):
        return True
    device_lock.listener("busy", "")
    return _idle(device)


def _idle(device: str) -> bool:
    """Return whether the GPU answers at once for as long as several of its time slices, within `_IDLE_WITHIN_S`."""
    probe = torch.zeros(1, device=device)
    since = time.perf_counter()
    give_up = since + _IDLE_WITHIN_S
    while time.perf_counter() - since < _IDLE_FOR_S:
        started = time.perf_counter()
        if started >= give_up:
            return False
        probe.add_(1)
        torch.cuda.synchronize()
        if time.perf_counter() - started > _IDLE_ANSWER_S:
            since = time.perf_counter()
    return True

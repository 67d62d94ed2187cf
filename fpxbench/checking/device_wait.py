"""Wait for a GPU, and detect kernels that hang.

A hanging kernel (two launches that spin on each other's locks) keeps its time slices even while its process is stopped,
so that every other timing is on a shared device. `synchronize` reports a hang to the process's watcher after `HANG_S`;
`wait_until_idle` gives the watcher time to kill the process, and returns whether the device is idle.
"""

from __future__ import annotations

import threading
import time

import torch

from fpxbench.checking import device_lock

HANG_S = 20
"""Far longer than any call takes, even if many cases share the GPU: most take milliseconds."""
_IDLE_ANSWER_S, _IDLE_FOR_S, _IDLE_WITHIN_S = 5e-4, 1e-2, 5.0
"""A GPU is idle if it completes launches within the first for as long as the second; waiting ends after the third."""

_LEAST_HOLD_S, _LONGEST_HOLD_S, _CYCLES_PER_S = 2e-3, 0.2, 2e9


class HangWatch(threading.Thread):
    """A thread that reports to this process's watcher, once, a wait for the GPU that has lasted `HANG_S`.

    It counts its own one-second ticks, so that time during which the process is stopped does not count.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True, name="hang-watch")
        self.waits = 0
        """Number of waits that have begun."""
        self.waiting = False
        self._seen, self._ticks = 0, 0

    def run(self) -> None:
        while True:
            time.sleep(1.0)
            self.tick()

    def tick(self) -> None:
        """Count a second, and report a hang after `HANG_S`."""
        same = self.waiting and self.waits == self._seen
        self._seen, self._ticks = self.waits, self._ticks + 1 if same else 0
        if self._ticks == HANG_S:
            device_lock.listener("hung", f"a kernel was still running {HANG_S} s after its launch")


_watch: HangWatch | None = None


def synchronize() -> None:
    """Wait for all work that this process launched on the GPU."""
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


def hold_stream(seconds: float) -> None:
    """Keep the current stream busy for about `seconds`, within limits, so that calls can be queued behind each other
    before the first begins."""
    torch.cuda._sleep(int(min(max(seconds, _LEAST_HOLD_S), _LONGEST_HOLD_S) * _CYCLES_PER_S))


def wait_until_idle(device: str) -> bool:
    """Wait until a GPU has finished the work of stopped processes, and return whether it is idle.

    If it stays busy for `_IDLE_WITHIN_S`, the sweep resumes its other cases to find the hanging one, and the GPU is
    tested once more.
    """
    if device == "cpu" or _idle(device):
        return True
    device_lock.listener("busy", "")
    return _idle(device)


def _idle(device: str) -> bool:
    """Return whether launches complete at once for several time slices of the GPU, within `_IDLE_WITHIN_S`."""
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

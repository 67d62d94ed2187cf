"""Autotuners time on a device that nothing else uses.

Cases are compiled side by side, and autotuners time kernels while they compile: beside other cases they would choose by
chance. So their benchmarking functions take the device's lock, as the timing of a case does; but not in a case that is
not timed, whose choice is nobody's speed, while each of its candidates would make all other cases stand still.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from fpxbench.checking.device_lock import device_lock

PURPOSE = "tiles of a kernel"
_IDLE_ANSWER_S, _IDLE_FOR_S, _IDLE_WITHIN_S = 5e-4, 1e-2, 5.0
"""A GPU is idle once it has answered launches within the first for the second; waiting for it ends after the third."""


_timed = True
"""Whether this process's case will be timed."""


def tune_alone(device: str, timed: bool = True) -> None:
    """Have the autotuners of Triton and of PyTorch's compiler, where they are installed, time alone on `device` if the
    case of this process is `timed`, and beside others if not."""
    global _timed
    _timed = timed
    with contextlib.suppress(ImportError):
        triton = importlib.import_module("triton.testing")
        for name in ("do_bench", "do_bench_cudagraph"):
            _wrap(triton, name, device)
    with contextlib.suppress(ImportError):      # of a PyTorch older than 2.9, or newer than this was written for
        for cls in list(vars(importlib.import_module("torch._inductor.runtime.benchmarking")).values()):
            if isinstance(cls, type) and "benchmark_gpu" in vars(cls):
                _wrap(cls, "benchmark_gpu", device)


def _wrap(owner: ModuleType | type, name: str, device: str) -> None:
    function: Callable[..., Any] | None = getattr(owner, name, None)
    if function is None or hasattr(function, "fpxbench_alone"):
        return

    @functools.wraps(function)
    def alone(*arguments: Any, **options: Any) -> Any:
        if not _timed:
            return function(*arguments, **options)
        with device_lock(device, PURPOSE):
            wait_until_idle(device)
            return function(*arguments, **options)

    alone.fpxbench_alone = True     # type: ignore[attr-defined]
    setattr(owner, name, alone)


def wait_until_idle(device: str) -> None:
    """Wait until a GPU answers at once, for as long as several of its time slices: what children that were stopped had
    launched is then done."""
    if device == "cpu":
        return
    probe = torch.zeros(1, device=device)
    give_up = time.perf_counter() + _IDLE_WITHIN_S
    since = time.perf_counter()
    while time.perf_counter() - since < _IDLE_FOR_S and time.perf_counter() < give_up:
        started = time.perf_counter()
        probe.add_(1)
        torch.cuda.synchronize()
        if time.perf_counter() - started > _IDLE_ANSWER_S:
            since = time.perf_counter()

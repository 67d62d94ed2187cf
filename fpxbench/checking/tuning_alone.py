"""Autotuners time on a device that nothing else uses.

Cases are compiled side by side, and autotuners time kernels while they compile: beside other cases they would choose by
chance. So their benchmarking functions take the device's lock, as the timing of a case does; but not in a case that is
not timed, whose choice is nobody's speed, while each of its candidates would make all other cases stand still.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fpxbench.checking.device_lock import device_lock
from fpxbench.checking.device_wait import wait_until_idle

PURPOSE = "tiles of a kernel"

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
    _wrap_all_choices(device)


def _wrap_all_choices(device: str) -> None:
    """Have all candidates of a product timed at once, so that others stand still once, and not for each. The module is
    loaded by the first product that is compiled."""
    with contextlib.suppress(KeyError, AttributeError):
        _wrap(sys.modules["torch._inductor.select_algorithm"].AlgorithmSelectorCache, "benchmark_choices", device)


def _wrap(owner: ModuleType | type, name: str, device: str) -> None:
    function: Callable[..., Any] | None = getattr(owner, name, None)
    if function is None or hasattr(function, "fpxbench_alone"):
        return

    @functools.wraps(function)
    def alone(*arguments: Any, **options: Any) -> Any:
        if not _timed:
            return function(*arguments, **options)
        _wrap_all_choices(device)
        with device_lock(device, PURPOSE):
            wait_until_idle(device)
            return function(*arguments, **options)

    alone.fpxbench_alone = True     # type: ignore[attr-defined]
    setattr(owner, name, staticmethod(alone) if inspect.ismethod(function) else alone)

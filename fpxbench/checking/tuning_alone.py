"""Make autotuners time on an otherwise idle device.

Cases are compiled in parallel, and autotuners time kernels while compiling; beside other cases, their choice would be
random. So their benchmarking functions take the device lock, like the timing of a case. In a case that is not timed
they do not, since the choice does not matter, and each candidate would stop all other cases.
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
    """Make the autotuners of Triton and of PyTorch's compiler, if installed, take the lock of `device` if this
    process's case is `timed`."""
    global _timed
    _timed = timed
    with contextlib.suppress(ImportError):
        triton = importlib.import_module("triton.testing")
        for name in ("do_bench", "do_bench_cudagraph"):
            _wrap(triton, name, device)
    with contextlib.suppress(ImportError):      # not in PyTorch before 2.9, and perhaps not in future versions
        for cls in list(vars(importlib.import_module("torch._inductor.runtime.benchmarking")).values()):
            if isinstance(cls, type) and "benchmark_gpu" in vars(cls):
                _wrap(cls, "benchmark_gpu", device)
    _wrap_all_choices(device)


def _wrap_all_choices(device: str) -> None:
    """Make all candidates of a product be timed under one lock, so that other cases are stopped only once. The module
    is loaded when the first product is compiled."""
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

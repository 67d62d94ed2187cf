"""Detect that an implementation replaced functions of torch or clocks, which other measurements depend on."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fpxbench.checking.contract import ContractViolation
from fpxbench.records.kinds import Kind

_WATCHED: tuple[tuple[str, Any], ...] = (
    ("time", time), ("torch", torch), ("torch.Tensor", torch.Tensor), ("torch.nn.functional", F),
    ("torch.cuda", torch.cuda), ("torch.cuda.Event", torch.cuda.Event), ("torch.cuda.CUDAGraph", torch.cuda.CUDAGraph),
)


def _callables() -> dict[tuple[int, str], Any]:
    return {(number, name): value for number, (_, place) in enumerate(_WATCHED)
            for name, value in list(vars(place).items()) if callable(value)}


_ORIGINAL = _callables()
"""The functions when this module was imported, before any implementation."""


_TORCH = Path(torch.__file__).parent


def replaced_functions() -> list[str]:
    """Return the names of watched functions that were replaced, except by torch itself."""
    return [f"{_WATCHED[number][0]}.{name}" for number, name in _replaced()]


def restore() -> None:
    """Restore the original functions."""
    for number, name in _replaced():
        setattr(_WATCHED[number][1], name, _ORIGINAL[number, name])


def _replaced() -> list[tuple[int, str]]:
    return [(number, name) for (number, name), value in _ORIGINAL.items()
            if (now := vars(_WATCHED[number][1]).get(name)) is not value and not _is_torchs_own(now)]


def _is_torchs_own(function: Any) -> bool:
    """Return whether a function's code is in torch, whose compiler wraps `torch.manual_seed` on first use."""
    code = getattr(function, "__code__", None)
    if code is not None:
        return Path(code.co_filename).is_relative_to(_TORCH)
    module = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).is_relative_to(_TORCH)


def check_untampered() -> None:
    """Raise ContractViolation if functions were replaced, after restoring them."""
    replaced = replaced_functions()
    if replaced:
        restore()
        raise ContractViolation(
            Kind.ENVIRONMENT_PATCHED, f"replaced {', '.join(replaced[:6])}{' and others' if len(replaced) > 6 else ''}:"
            " other implementations and the clock depend on it")


_SETTINGS: tuple[tuple[str, Any, Any], ...] = (
    ("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("number of threads", torch.get_num_threads, torch.set_num_threads),
    ("float32 matmul precision", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    ("deterministic algorithms", torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    ("gradients", torch.is_grad_enabled, torch.set_grad_enabled),
)


@contextmanager
def settings_kept() -> Iterator[list[str]]:
    """Restore torch's global settings on exit; the yielded list then holds the names of the changed ones."""
    changed: list[str] = []
    before = [get() for _, get, _ in _SETTINGS]
    try:
        yield changed
    finally:
        for (name, get, put), value in zip(_SETTINGS, before, strict=True):
            if get() != value:
                changed.append(name)
                put(value)

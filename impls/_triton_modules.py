"""Modules of Triton kernels, compiled or interpreted."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType


@cache
def kernels(name: str, interpreted: bool) -> ModuleType:
    """Return the file `name` beside this one as a module: its kernels compiled, or run by Triton's interpreter.

    Triton decides at the decorator, and a process that interprets everything could not run torch.compile's kernels:
    so a second copy is loaded, and the choice is made around this one import.
    """
    from triton import knobs

    spec = importlib.util.spec_from_file_location(f"{name}_interpreted" if interpreted else name,
                                                  Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module

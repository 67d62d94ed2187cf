"""Modules of Triton kernels, compiled or interpreted."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any


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
    if interpreted:
        _call_directly(module)
    return module


def _call_directly(module: ModuleType) -> None:
    """Let the interpreted kernels of `module` call its device functions without preparing Triton's language anew.

    `InterpretedFunction.__call__` replaces every function of `triton.language` at each call, as the launch of the
    kernel has done already: more than half of the interpreter's time.
    """
    from triton.runtime.interpreter import InterpretedFunction

    class DeviceFunction(InterpretedFunction):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.rewrite()(*args, **kwargs)

    for value in vars(module).values():
        if type(value) is InterpretedFunction:
            value.__class__ = DeviceFunction

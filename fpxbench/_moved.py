"""Import paths of earlier versions, for implementation files that use them.

The modules that an implementation's author imports have moved into packages. Their old names still import, with a
DeprecationWarning, and give the same module object.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    f"fpxbench.{old}": f"fpxbench.{package}.{old}"
    for package, names in {
        "numbers": ("fake_quantize", "formats", "packing", "scaling", "scheme", "weight"),
        "records": ("case", "record", "store", "verdict"),
    }.items()
    for old in names
} | {
    "fpxbench.codec": "fpxbench.numbers.tensor_codec",
    "fpxbench.numbers.codec": "fpxbench.numbers.tensor_codec",
    "fpxbench.model.quantize": "fpxbench.model.quantize_model",
}


class _Alias(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None     # the default, which exec_module replaces

    def exec_module(self, module: ModuleType) -> None:
        new = MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        # The import system returns what sys.modules holds after this call. Returning the real module from create_module
        # instead would overwrite its __spec__.
        sys.modules[module.__name__] = importlib.import_module(new)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _Alias()) if fullname in MOVED else None


def install() -> None:
    """Make the old names importable, once in a process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())

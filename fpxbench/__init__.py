"""fpxbench: is low-bit floating-point matmul still right, and still fast?

The names in `__all__` are the public interface (docs/python.md). They are imported when they are first used, so that
``import fpxbench`` takes milliseconds and loads no PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpxbench.checkpoint.loading import load_checkpoint
    from fpxbench.implementation import Implementation, Support, discover, implementation
    from fpxbench.numbers.fake_quantize import fake_quantize
    from fpxbench.numbers.formats import Format, format_named
    from fpxbench.numbers.quantize import quantize
    from fpxbench.numbers.scaling import Scaling
    from fpxbench.numbers.scheme import Scheme, scheme_named
    from fpxbench.numbers.tensor_codec import decode, encode
    from fpxbench.numbers.weight import QuantizedWeight
    from fpxbench.records.table import Records, load_records
    from fpxbench.sweep.api import run

__version__ = "0.1.0"

__all__ = [
    "Format",
    "Implementation",
    "QuantizedWeight",
    "Records",
    "Scaling",
    "Scheme",
    "Support",
    "decode",
    "discover",
    "encode",
    "fake_quantize",
    "format_named",
    "implementation",
    "load_checkpoint",
    "load_records",
    "quantize",
    "run",
    "scheme_named",
]

_MODULES = {
    "fpxbench.checkpoint.loading": ("load_checkpoint",),
    "fpxbench.implementation": ("Implementation", "Support", "discover", "implementation"),
    "fpxbench.numbers.tensor_codec": ("decode", "encode"),
    "fpxbench.numbers.fake_quantize": ("fake_quantize",),
    "fpxbench.numbers.formats": ("Format", "format_named"),
    "fpxbench.numbers.quantize": ("quantize",),
    "fpxbench.numbers.scaling": ("Scaling",),
    "fpxbench.numbers.scheme": ("Scheme", "scheme_named"),
    "fpxbench.numbers.weight": ("QuantizedWeight",),
    "fpxbench.records.table": ("Records", "load_records"),
    "fpxbench.sweep.api": ("run",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'fpxbench' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


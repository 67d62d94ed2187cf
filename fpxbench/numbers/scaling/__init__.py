"""Scalings by name: which weights share a scale, how it is chosen and how it is stored. Importing this loads no torch.

Each family is one file with a subclass of `Scaling`, and one entry of `FAMILIES`.
"""

from __future__ import annotations

from functools import lru_cache

from fpxbench.numbers.scaling.base import Scales, Scaling
from fpxbench.numbers.scaling.group import GroupScaling
from fpxbench.numbers.scaling.mx import MXScaling
from fpxbench.numbers.scaling.nv import NVScaling
from fpxbench.numbers.scaling.row import RowScaling
from fpxbench.numbers.scaling.scale_format import ScaleFormat
from fpxbench.numbers.scaling.tensor import TensorScaling

__all__ = ["FAMILIES", "ScaleFormat", "Scales", "Scaling", "scaling_named"]

FAMILIES: tuple[type[Scaling], ...] = (TensorScaling, RowScaling, GroupScaling, MXScaling, NVScaling)


@lru_cache(maxsize=None)
def scaling_named(name: str) -> Scaling:
    """Return the scaling of that name: ``tensor``, ``row``, ``mx``, ``nv``, or ``gN``. Raise ValueError for anything else."""
    for family in FAMILIES:
        if (scaling := family.parse(name)) is not None:
            return scaling
    fixed = ", ".join(family.kind for family in FAMILIES if family is not GroupScaling)
    raise ValueError(f"no scaling {name!r}: one of {fixed}, or gN for groups of N (2 to 65536) as in g128")

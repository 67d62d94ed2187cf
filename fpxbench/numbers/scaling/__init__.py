"""Which weights share a scale, and how is it chosen and stored?

Each family is one file with a subclass of `Scaling`, and one entry of `FAMILIES`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from fpxbench.numbers.scaling.base import Scales, Scaling
from fpxbench.numbers.scaling.block2d import Block2DScaling
from fpxbench.numbers.scaling.group import GroupScaling
from fpxbench.numbers.scaling.mx import MXScaling
from fpxbench.numbers.scaling.nv import NVScaling
from fpxbench.numbers.scaling.row import RowScaling
from fpxbench.numbers.scaling.scale_format import ScaleFormat
from fpxbench.numbers.scaling.tensor import TensorScaling

__all__ = ["FAMILIES", "ScaleFormat", "Scales", "Scaling", "scaling_named"]

FAMILIES: tuple[type[Scaling], ...] = (TensorScaling, RowScaling, GroupScaling, Block2DScaling, MXScaling, NVScaling)


@cache
def scaling_named(name: str) -> Scaling:
    """Return the scaling of that name: ``tensor``, ``row``, ``gN``, ``bRxC``, ``mx``, ``nv``, with its modifiers
    (``mx.rceil``).

    Raises ValueError for any other name, and lists the valid ones.
    """
    base, *modifiers = name.split(".")
    for family in FAMILIES:
        if (scaling := family.parse(base)) is not None:
            return _modified(scaling, modifiers)
    raise ValueError(f"no scaling {name!r}: one of tensor, row, mx, nv, nv16x16, gN for groups of N (2 to 65536)"
                     " as in g128, or bRxC for blocks of R rows by C columns as in b128x128")


def _modified(scaling: Scaling, modifiers: list[str]) -> Scaling:
    known = scaling.modifiers()
    for modifier in modifiers:
        if modifier not in known:
            raise ValueError(f"{scaling.base_name} has no modifier {modifier!r}: one of {', '.join(known)}")
    fields = [field for modifier in modifiers for field in known[modifier]]
    if len(set(fields)) < len(fields):
        raise ValueError(f"{scaling.base_name}.{'.'.join(modifiers)} sets {max(fields, key=fields.count)} twice")
    return replace(scaling, **{field: value for modifier in modifiers for field, value in known[modifier].items()})

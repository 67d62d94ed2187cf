"""``row``: one fp32 scale per row (output channel)."""

from __future__ import annotations

from dataclasses import dataclass

from fpxbench.numbers.scaling.base import Scaling


@dataclass(frozen=True)
class RowScaling(Scaling):
    kind = "row"
    description = "one fp32 scale for each row (output channel)"
    source = "torchao PerRow, compressed-tensors channel"

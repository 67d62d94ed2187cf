"""``tensor``: one fp32 scale a weight."""

from __future__ import annotations

from dataclasses import dataclass

from fpxbench.numbers.scaling.base import Scaling


@dataclass(frozen=True)
class TensorScaling(Scaling):
    block_rows: int | None = None

    kind = "tensor"
    description = "one fp32 scale for the whole weight"
    source = "torchao PerTensor, TensorRT-LLM FP8"

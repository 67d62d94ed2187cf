"""``tensor``: one fp32 scale per weight matrix; ``tensor.static`` for activations whose scale was fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fpxbench.numbers.codebook import NumberFormat
from fpxbench.numbers.scaling.base import Scales, Scaling

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATED_AMAX = 8.0
"""The largest magnitude that ``static`` assumes; larger numbers saturate. Of N(0, 1), one number in 10**15 does."""


@dataclass(frozen=True)
class TensorScaling(Scaling):
    block_rows: int | None = None
    static: bool = False

    kind = "tensor"
    description = "one fp32 scale for the whole weight; tensor.static: for activations, fixed at 8 / max beforehand"
    source = "torchao PerTensor, TensorRT-LLM FP8; static: input_scale in ModelOpt's checkpoints"

    @classmethod
    def modifiers(cls) -> dict[str, dict[str, Any]]:
        return {**super().modifiers(), "static": {"static": True}}

    def scales_of(self, amax: Tensor, fmt: NumberFormat) -> Scales:
        """Return ``amax / max``, or under ``static`` the calibrated scale; 1 for a tensor of zeros."""
        return super().scales_of(amax.new_full(amax.shape, CALIBRATED_AMAX) if self.static else amax, fmt)

"""``nv``: NVFP4's two levels, an E4M3 scale for every 16 neighbours along K under one fp32 scale a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fpxbench.numbers.formats import Format
from fpxbench.numbers.scaling.base import Scales, Scaling
from fpxbench.numbers.scaling.scale_format import E4M3_SCALE

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NVScaling(Scaling):
    block: int | None = 16

    kind = "nv"
    description = "an E4M3 scale for every 16 neighbours along K, under one fp32 scale for the weight"
    source = "NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149"
    scale_format = E4M3_SCALE
    has_tensor_scale = True

    def scales_of(self, amax: Tensor, fmt: Format) -> Scales:
        """Return block scales ``amax / max`` over the tensor scale, under which the largest block scale is E4M3's maximum.

        A block of zeros, or one whose scale rounds to zero, has the scale 0; a weight of zeros the tensor scale 1.
        """
        import torch

        tensor_scale = (amax.amax() / (fmt.max * self.scale_format.format.max)).reshape(1)
        tensor_scale = torch.where(tensor_scale > 0, tensor_scale, 1.0)
        return Scales(self.scale_format.encode(amax / fmt.max / tensor_scale), tensor_scale)

"""``nv``: NVFP4's two levels, an E4M3 scale for every block under one fp32 scale for the weight, and its variants.

- ``nv``: 16 along K; the block scale is ``amax / max`` to nearest. arXiv:2509.25149, ModelOpt.
- ``.up``: the block scale is rounded up, so that no weight saturates.
- ``.4over6``: a block's largest weight becomes 6 or 4, whichever has the smaller error. arXiv:2512.02010.
- ``.div``: the stored tensor scale is the reciprocal, and divides. compressed-tensors weight_global_scale.
- ``.normal``: block scales are at least E4M3's smallest normal number, 2^-6. torchao NVFP4Tensor.
- ``nv16x16``: blocks of 16 rows by 16 columns, for training. arXiv:2509.25149 §4.3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from fpxbench.numbers.codebook import NumberFormat
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling.base import Scales, Scaling
from fpxbench.numbers.scaling.scale_format import E4M3_SCALE, ScaleFormat

if TYPE_CHECKING:
    from torch import Tensor

_SIX_OVER_FOUR = 1.5
_LARGEST_SIX = 256.0
"""The largest block scale of the 4/6 rule: 1.5 times it, 384, is also an E4M3 number, but 1.5 x 448 is past E4M3's
maximum.
"""


@dataclass(frozen=True)
class NVScaling(Scaling):
    block: int | None = 16
    scale_format: ScaleFormat = E4M3_SCALE
    four_over_six: bool = False
    divides: bool = False
    normal: bool = False

    kind = "nv"
    description = "an E4M3 scale for 16 neighbours along K (nv16x16: 16 x 16), under one fp32 scale for the weight"
    source = "NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149; Four Over Six, arXiv:2512.02010"
    has_tensor_scale = True

    @classmethod
    def parse(cls, name: str) -> Self | None:
        match = re.fullmatch(r"nv(16x16)?", name)
        return cls(block_rows=16 if match[1] else 1) if match else None

    @property
    def base_name(self) -> str:
        return "nv" if self.block_rows == 1 else f"nv{self.block_rows}x{self.block}"

    @classmethod
    def modifiers(cls) -> dict[str, dict[str, Any]]:
        return {"up": {"scale_format": ScaleFormat(E4M3_SCALE.format, Rounding.UP)}, "4over6": {"four_over_six": True},
                "div": {"divides": True},
            "normal": {"normal": True}}

    def choose(self, weight: Tensor, fmt: NumberFormat, *, shared_amax: Tensor | None = None) -> Scales:
        """Return the scales under which float `weight` [N, K] is stored in `fmt`.

        shared_amax : the largest magnitude of all weights that share a tensor scale (the parts of a fused layer)
        """
        import torch

        scales = self.scales_of(self.block_amax(weight), fmt, shared_amax=shared_amax)
        if not self.four_over_six:
            return scales
        block = self.scale_format.decode(scales.stored)
        larger = Scales(self.scale_format.encode(block * _SIX_OVER_FOUR), scales.tensor_scale)
        errors = [self._squared_error(weight, fmt, candidate) for candidate in (scales, larger)]
        return Scales(torch.where(errors[1] < errors[0], larger.stored, scales.stored), scales.tensor_scale)

    def scales_of(self, amax: Tensor, fmt: NumberFormat, *, shared_amax: Tensor | None = None) -> Scales:
        """Return block scales ``amax / max`` over the tensor scale, under which the largest block scale is E4M3's
        maximum.

        A block of zeros, or one whose scale rounds to zero, has the scale 0; a weight of zeros the tensor scale 1.
        """
        import torch

        largest = _LARGEST_SIX if self.four_over_six else self.scale_format.format.max
        amax_of_all = (amax.amax() if shared_amax is None else shared_amax.float()).reshape(1)
        if self.divides:
            tensor_scale = fmt.max * largest / amax_of_all
            tensor_scale = torch.where(tensor_scale.isfinite(), tensor_scale, 1.0)
            return Scales(self._block_scales(amax / fmt.max * tensor_scale), tensor_scale)
        tensor_scale = amax_of_all / (fmt.max * largest)
        tensor_scale = torch.where(tensor_scale > 0, tensor_scale, 1.0)
        return Scales(self._block_scales(amax / fmt.max / tensor_scale), tensor_scale)

    def _block_scales(self, numbers: Tensor) -> Tensor:
        """Return block scales fp32 ``[R, G]`` as stored."""
        if self.normal:
            numbers = numbers.clamp(min=self.scale_format.format.min_normal)
        return self.scale_format.encode(numbers)

    def levels(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """Return the block scales, fp32 ``[R, G]``, and what they are multiplied by, fp32 ``[1]``."""
        block, tensor_scale = super().levels(scales)
        return block, 1 / tensor_scale if self.divides else tensor_scale

    def factors(self, scales: Scales) -> Tensor:
        """Return what each block's codes are multiplied by, fp32 ``[R, G]``: both levels, rounded once to fp32."""
        block = self.scale_format.decode(scales.stored)
        return block / scales.tensor_scale if self.divides else block * scales.tensor_scale

    def _squared_error(self, weight: Tensor, fmt: NumberFormat, scales: Scales) -> Tensor:
        """Return the squared error of each block under `scales`, ``[R, G]``."""
        import torch

        from fpxbench.numbers.tensor_codec import decode, encode

        n, k = weight.shape
        stored = decode(encode(self.divide(weight, scales), fmt), fmt) * self.spread(self.factors(scales), n, k)
        errors = (weight - stored).double().square()
        sums = torch.zeros(self.grid_shape(n, k), dtype=torch.float64, device=weight.device)
        sums.view(-1).index_add_(0, self.block_index(n, k, weight.device).reshape(-1), errors.reshape(-1))
        return sums

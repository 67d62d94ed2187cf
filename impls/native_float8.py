"""Weights in torch's own float8 dtypes, upcast and multiplied."""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.numbers.dtypes import TORCH_FLOAT8


@implementation("native_float8")
class NativeFloat8(Implementation):
    """`F.linear(x, w.to(x.dtype)) * scale` with w in a `torch.float8_*` dtype: float8 weight-only in eager mode.

    The upcast weight is written to memory and read back, so every call moves five bytes for each stored one. Eager
    PyTorch has no kernel that multiplies float8 weights with 16-bit activations directly.
    """

    layout = "bytes"

    def supports(self, scheme, device):
        if not scheme.quantized or scheme.format.name not in TORCH_FLOAT8:
            return Support.no(
                f"supports weights in a torch.float8 dtype ({', '.join(TORCH_FLOAT8)}), not {scheme.name}"
            )
        if scheme.scaling.block is not None:
            return Support.no(f"supports scales by row or tensor, not blocks of {scheme.scaling.block} ({scheme.name})")
        return Support.yes()

    def matmul(self, x, weight):
        w = weight.packed.view(getattr(torch, TORCH_FLOAT8[weight.scheme.format.name]))
        scale = weight.scale_grid().reshape(-1)   # [N] or [1]
        if x.dtype == torch.float16:        # values reach 57344: unscaled, the product would overflow fp16
            return F.linear(x, (w.float() * scale[:, None]).to(x.dtype))
        return (F.linear(x, w.to(x.dtype)) * scale).to(x.dtype)

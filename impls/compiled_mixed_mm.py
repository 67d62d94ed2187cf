"""Upcast, matmul and scale, for torch.compile to fuse: the function of pytorch/ao issue #228."""

import torch

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.numbers.dtypes import TORCH_FLOAT8

from ._compiling import PerShape


def mixed_mm(a, b, scale):
    """Return ``a @ b * scale``: a [M, K] 16-bit, b [K, N] float8 or int8, scale fp32 [N] or [1]."""
    return (torch.mm(a, b.to(a.dtype)) * scale).to(a.dtype)


def mixed_mm_fp16(a, b, scale):
    """Return the same, scaled before the product: float8 values reach 57344, which would overflow fp16 (65504)."""
    return torch.mm(a, (b.float() * scale).to(a.dtype))


@implementation("compiled_mixed_mm")
class CompiledMixedMM(Implementation):
    """`torch.mm(a, b.to(a.dtype)) * scale` under `torch.compile`, with max-autotune on GPUs.

    It is fast only where Inductor fuses the upcast into the matmul's loads, as its Triton template on GPUs does. On CPU
    the upcast is a separate pass that costs far more than the product: see `cpu_fused`.
    """

    layout = "bytes"

    def __init__(self):
        self._mixed_mm, self._mixed_mm_fp16 = PerShape(mixed_mm), PerShape(mixed_mm_fp16)

    def supports(self, scheme, device):
        if not scheme.quantized or scheme.format.name not in (*TORCH_FLOAT8, "int8"):
            return Support.no(
                f"supports weights in torch's 8-bit dtypes ({', '.join(TORCH_FLOAT8)}, int8), not {scheme.name}"
            )
        if scheme.scaling.block is not None:
            return Support.no(f"supports scales by row or tensor, not blocks of {scheme.scaling.block} ({scheme.name})")
        return Support.yes()

    def matmul(self, x, weight):
        dtype = getattr(torch, TORCH_FLOAT8.get(weight.scheme.format.name, "int8"))
        a, b = x.reshape(-1, x.shape[-1]).contiguous(), weight.packed.view(dtype).t()
        product = self._mixed_mm_fp16 if a.dtype == torch.float16 else self._mixed_mm
        return product(a, b, weight.scale_grid().reshape(-1)).reshape(*x.shape[:-1], weight.shape[0])

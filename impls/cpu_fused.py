"""Decode, product and scale in one pass over the packed weight, on CPU: C++ compiled for the scheme at its first use.

Memory traffic: each packed byte and each scale once. `_cpu_kernels.cpp` has the loops.
"""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation

from ._cpu_build import Kernels, compiler

FEW_TOKENS = 8
"""Up to so many, decoding again for each four is faster than storing the decoded weight."""
BLOCK_ROWS = 512
"""Rows decoded at a time for more tokens: 4 MB of bf16 at K = 4096, which fits a last-level cache."""


def product_dtype(dtype):
    """Return what decoded weights are multiplied in: `dtype`, where oneDNN has its product on this CPU, or fp32."""
    fast = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}.get(dtype, lambda: False)
    return dtype if fast() and torch.backends.mkldnn.enabled else torch.float32


@implementation("cpu_fused")
class CpuFused(Implementation):
    """One loop over the packed weight for up to 8 tokens; for more, rows decoded into the cache for a dense product.

    `torch.compile` of upcast + matmul + scale is slow on CPU: matmul is a library call there, so the upcast weight goes
    to memory and back. Here codes of up to 4 bits (AVX-512: 6) are looked up in registers, and wider ones become fp16
    or fp32 by shifts. Products are summed in fp32. For more tokens a block of rows is decoded to the activation's
    dtype, or to fp32 where the CPU has no fast 16-bit product, and multiplied by PyTorch's own product.
    """

    def supports(self, scheme, device):
        if device != "cpu":
            return Support.no(f"runs on CPUs only; triton_fused does the same on {device}")
        if not scheme.quantized:
            return Support.no(f"{scheme.name} is not quantized, so there is nothing to decode")
        if compiler() is None:
            return Support.no(f"needs a C++ compiler for {scheme.name}: install g++, or name one by CXX", missing=True)
        return Support.yes()

    def matmul(self, x, weight):
        (n, k), kernels = weight.shape, Kernels(weight)
        a = F.pad(x.reshape(-1, k), (0, kernels.k - k))
        if len(a) <= FEW_TOKENS:
            out = kernels.product(a.float().contiguous())
        else:
            dtype = product_dtype(x.dtype)
            a, out = a.to(dtype), x.new_empty(len(a), n)
            w = a.new_empty(min(BLOCK_ROWS, n), kernels.k)
            for begin in range(0, n, BLOCK_ROWS):
                rows = w[:n - begin]
                kernels.decode(begin, rows)
                out[:, begin:begin + BLOCK_ROWS] = F.linear(a, rows)
        return out.to(x.dtype).reshape(*x.shape[:-1], n)

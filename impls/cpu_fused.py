"""Decode, product and scale in one pass over the packed weight, on CPU: C++ compiled for the scheme at its first use.

Memory traffic: each packed byte and each scale once. `_cpu_kernels.cpp` has the loops.
"""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation

from ._cpu_build import Kernels, compiler

FEW_TOKENS = 8
"""Up to this many tokens, decoding again for every four is faster than storing the decoded weight."""
PAIRS_TOKENS = 16
"""The same on CPUs that multiply pairs of bf16."""
BLOCK_ROWS = 512
"""Rows decoded at a time for more tokens: 4 MB of bf16 at K = 4096, which fits a last-level cache."""


def product_dtype(dtype):
    """Return the dtype in which decoded weights are multiplied: `dtype` if oneDNN has its product on this CPU, else
    fp32."""
    fast = {torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
            torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported}.get(dtype, lambda: False)
    return dtype if fast() and torch.backends.mkldnn.enabled else torch.float32


@implementation("cpu_fused")
class CpuFused(Implementation):
    """One loop over the packed weight for up to 16 tokens; for more, rows decoded into the cache for a dense product.

    `torch.compile` of upcast + matmul + scale is slow on CPU: matmul is a library call there, so the upcast weight goes
    to memory and back. Here codes of up to 4 bits (AVX-512: 6) are looked up in registers, and wider ones become fp16
    or fp32 by shifts. Up to 8 tokens, or 16 where the CPU has products of bf16 pairs, are multiplied in fp32 or bf16
    and summed in fp32. For more tokens a block of rows is decoded to the activation's dtype, or to fp32 where
    the CPU has no fast 16-bit product, and multiplied by PyTorch's own product.
    """

    def supports(self, scheme, device):
        if device != "cpu":
            return Support.no(f"runs on CPUs only; triton_fused does the same on {device}")
        if not scheme.quantized:
            return Support.no(f"{scheme.name} is not quantized, so there is nothing to decode")
        if compiler() is None:
            return Support.no(f"needs a C++ compiler for {scheme.name}: install g++, or set CXX", missing=True)
        return Support.yes()

    def matmul(self, x, weight):
        (n, k), kernels = weight.shape, Kernels(weight)
        a = F.pad(x.reshape(-1, k), (0, kernels.k - k))
        out = kernels.product_bf16(a) if by_pairs(a, weight.scheme.scaling) else None
        if out is None:
            out = kernels.product(a.float().contiguous()) if len(a) <= FEW_TOKENS else by_blocks(a, kernels)
        return out.to(x.dtype).reshape(*x.shape[:-1], n)


def by_pairs(a, scaling):
    """Return whether a [M, k] may be multiplied in bf16: if that rounds no weight, or for more than a few tokens."""
    exact = scaling.block is None or scaling.scale_format.powers_of_two
    return a.dtype == torch.bfloat16 and (2 if exact else 5) <= len(a) <= PAIRS_TOKENS


def by_blocks(a, kernels):
    """Return a [M, k] times the weight, [M, N], decoding BLOCK_ROWS rows at a time for PyTorch's product."""
    a = a.to(product_dtype(a.dtype))
    out, w = a.new_empty(len(a), kernels.n), a.new_empty(min(BLOCK_ROWS, kernels.n), kernels.k)
    for begin in range(0, kernels.n, BLOCK_ROWS):
        rows = w[:kernels.n - begin]
        kernels.decode(begin, rows)
        out[:, begin:begin + BLOCK_ROWS] = F.linear(a, rows)
    return out

"""Kernels that are launched before the one before has ended (programmatic dependent launch, sm_90 and later)."""

import torch
import triton
import triton.language as tl

from fpxbench.implementation import Support, implementation

from ._right import Right


@triton.jit
def product_kernel(x, w, y, N, K, WAITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        here = tl.load(x + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        there = tl.load(w + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
        sums += tl.sum(there * here[None, :], axis=1)
    tl.store(y + m * N + n, sums.to(y.dtype.element_ty), mask=n < N)


class LaunchedEarly(Right):
    """One kernel that is launched early, on a weight that was decoded before."""

    def supports(self, scheme, device):
        if device == "cpu" or torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
            return Support.no("needs a GPU of sm_90 or later")
        return super().supports(scheme, device)

    def decoded(self, weight):
        self.kept = getattr(self, "kept", {})
        if id(weight) not in self.kept:
            self.kept[id(weight)] = (weight, super().decoded(weight).contiguous())
        return self.kept[id(weight)][1]

    def matmul(self, x, weight):
        (n, k), w = weight.shape, self.decoded(weight)
        rows = x.reshape(-1, k).contiguous()
        y = rows.new_empty(len(rows), n)
        if y.numel():
            product_kernel[len(rows), triton.cdiv(n, 16)](rows, w, y, n, k, WAITS=self.waits, BLOCK_N=16, BLOCK_K=64,
                                                          launch_pdl=True)
        return y.reshape(*x.shape[:-1], n)


@implementation("faulty_reads_early")
class ReadsEarly(LaunchedEarly):
    """Does not wait for the kernel before it."""

    waits = False


@implementation("faulty_waits")
class Waits(LaunchedEarly):
    """No fault: waits before it reads."""

    waits = True

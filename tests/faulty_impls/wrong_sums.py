"""Weights read rightly, sums wrong; or wrong only in some place."""

import torch

from fpxbench.implementation import implementation

from ._right import Right, faulty


@faulty("product")
def ragged_k(self, x, w):
    """Leaves out what a block of 32 along K does not fill."""
    whole = x.shape[1] // 32 * 32
    return x[:, :whole].float() @ w[:, :whole].T


@faulty("product")
def ragged_n(self, x, w):
    """Gives zeros for the output columns that a block of 32 does not fill."""
    y = Right.product(self, x, w)
    y[:, w.shape[0] // 32 * 32:] = 0
    return y


@faulty("product")
def accumulates_in_bf16(self, x, w):
    """Adds up in bf16, one product at a time, and truncates."""
    y = torch.zeros(x.shape[0], w.shape[0], device=x.device)
    for column, weights in zip(x.float().T, w.T, strict=True):
        y = ((y + column[:, None] * weights).view(torch.int32) & ~0xFFFF).view(torch.float32)
    return y


@implementation("faulty_overflowing_sums")
class OverflowingSums(Right):
    """Adds up unscaled in fp16, and scales after."""

    schemes = ("e5m2-row",)

    def decoded(self, weight):
        self.factor = self.factors(weight)[:, 0]
        return self.table(weight.scheme.format).to(weight.device)[weight.codes().int()]

    def product(self, x, w):
        return super().product(x, w).half().float() * self.factor


@faulty("product")
def outputs_saturated(self, x, w):
    """Clamps its output at 8."""
    return Right.product(self, x, w).clamp(-8, 8)


@faulty("product")
def nan_in_one_element(self, x, w):
    """Gives NaN in one output column."""
    y = Right.product(self, x, w)
    y[0, 5] = torch.nan
    return y


@faulty("decoded")
def gibberish(self, weight):
    """Multiplies by another weight."""
    return torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight.device)


@faulty("product")
def gain(self, x, w):
    """Is 3% too large."""
    return 1.03 * Right.product(self, x, w)


class _Narrow(Right):
    """Sums in blocks of `block` products, each partial sum rounded to `bits` of significand."""

    bits, block = 24, 1

    def product(self, x, w):
        flat = x.reshape(-1, x.shape[-1]).double()
        y = torch.zeros(flat.shape[0], w.shape[0], dtype=torch.float64, device=x.device)
        for part, rows in zip(flat.split(self.block, 1), w.double().split(self.block, 1), strict=True):
            y = self.narrow(y + part @ rows.T)
        return y.float().reshape(*x.shape[:-1], w.shape[0])

    def narrow(self, y):
        mantissa, exponent = torch.frexp(y)
        return torch.ldexp((mantissa * 2.0**self.bits).trunc(), exponent - self.bits)


@implementation("faulty_13_bit_sums")
class ThirteenBitSums(_Narrow):
    """Keeps 13 bits of each partial sum of 16 products."""

    bits, block = 13, 16


@implementation("faulty_bf16_partial_sums")
class Bf16PartialSums(_Narrow):
    """Keeps 8 bits of the sum of every 64 products, as a reduction in bf16 does."""

    bits, block = 8, 64

    def narrow(self, y):
        return y.bfloat16().double()


@faulty("matmul", "mxfp4")
def output_cut(self, x, weight):
    """Cuts the lower half of fp32 off, where it should round: within every bound, and biased."""
    y = self.product(x, self.decoded(weight))
    return (y.view(torch.int32) & ~0xFFFF).view(torch.float32).to(x.dtype)

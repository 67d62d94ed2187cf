"""Bits and scales taken from the wrong place."""

import torch

from fpxbench.implementation import implementation
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.tensor_codec import decode

from ._right import Right, faulty, swapped


@implementation("faulty_nibble_swap")
class NibbleSwap(Right):
    """Takes the high nibble for the low one."""

    schemes = ("mxfp4",)

    def codes(self, weight):
        return swapped(weight.codes(), (1, 0))


@faulty("codes", "e3m2-row")
def plane_swap(self, weight):
    """Reads the four planes of a six-bit code's upper two bits backwards."""
    codes = weight.codes()
    return (codes & 0x0F) | (swapped(codes, (3, 2, 1, 0)) & 0x30)


@faulty("codes", "e3m2-row")
def pieces_exchanged(self, weight):
    """Puts a six-bit code's upper two bits below its lower four."""
    codes = weight.codes()
    return ((codes & 0x0F) << 2) | (codes >> 4)


@faulty("factors", "e4m3fn-g32")
def scale_transposed(self, weight):
    """Reads the scale grid [N, G] as if it lay [G, N] in memory."""
    grid = weight.scale_grid()
    return weight.scheme.scaling.spread(grid.reshape(grid.shape[::-1]).T, *weight.shape)


@faulty("factors")
def row_scale_along_k(self, weight):
    """Applies the row scales to the columns: it broadcasts where N = K, and nothing complains."""
    return weight.scale_grid().T


@faulty("factors", "e4m3fn-row", "mxfp4")
def scale_missing(self, weight):
    """Forgets the scale."""
    return torch.ones(())


@faulty("factors", "nvfp4")
def tensor_scale_missing(self, weight):
    """Forgets NVFP4's second scale."""
    return weight.scheme.scaling.spread(decode(weight.scales, FORMATS["e4m3fn"]), *weight.shape)


@faulty("factors", "mxfp4")
def block_off_by_one(self, weight):
    """Multiplies each block by the scale of the next one."""
    return weight.scheme.scaling.spread(weight.scale_grid().roll(-1, dims=1), *weight.shape)


@faulty("factors", "e4m3fn-g32")
def boundary_off_by_one(self, weight):
    """Begins each block one weight late."""
    factors = Right.factors(self, weight)
    return torch.cat([factors[:, :1], factors[:, :-1]], dim=1)


@faulty("factors", "mxfp4")
def scale_exponent(self, weight):
    """Reads E8M0 with bias 126."""
    return 2 * Right.factors(self, weight)


@implementation("faulty_two_mistakes")
class TwoMistakes(NibbleSwap):
    """Swaps nibbles and forgets the scale."""

    def factors(self, weight):
        return torch.ones(())


@faulty("decoded", "mxfp4")
def outputs_exchanged(self, weight):
    """The halves of a fused layer come out in the other order."""
    return Right.decoded(self, weight).roll(weight.shape[0] // 2, 0)


@faulty("factors", "mxfp4")
def last_scale_left_out(self, weight):
    """The scale of the last block along K is never applied."""
    factors = Right.factors(self, weight).clone()
    factors[:, (weight.shape[1] - 1) // 32 * 32:] = 1
    return factors


@faulty("factors", "e4m3fn-b128x128")
def scale_rows_of_four(self, weight):
    """Takes a row of the scale grid for as long as the next multiple of four, as cuBLAS does with blocks of 128 x 128.
    """
    grid = weight.scale_grid()
    rows, columns = grid.shape
    at = torch.arange(rows)[:, None] * (-(-columns // 4) * 4) + torch.arange(columns)
    return weight.scheme.scaling.spread(grid.reshape(-1)[at.to(grid.device) % grid.numel()], *weight.shape)

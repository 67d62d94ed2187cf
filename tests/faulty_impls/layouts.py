"""Bits and scales taken from the wrong place."""

import torch

from fpxbench.implementation import implementation
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.tensor_codec import decode

from ._right import Right, swapped


@implementation("faulty_nibble_swap")
class NibbleSwap(Right):
    """Takes the high nibble for the low one."""

    schemes = ("mxfp4",)

    def codes(self, weight):
        return swapped(weight.codes(), (1, 0))


@implementation("faulty_plane_swap")
class PlaneSwap(Right):
    """Reads the four planes of a six-bit code's upper two bits backwards."""

    schemes = ("e3m2-row",)

    def codes(self, weight):
        codes = weight.codes()
        return (codes & 0x0F) | (swapped(codes, (3, 2, 1, 0)) & 0x30)


@implementation("faulty_pieces_exchanged")
class PiecesExchanged(Right):
    """Puts a six-bit code's upper two bits below its lower four."""

    schemes = ("e3m2-row",)

    def codes(self, weight):
        codes = weight.codes()
        return ((codes & 0x0F) << 2) | (codes >> 4)


@implementation("faulty_scale_transposed")
class ScaleTransposed(Right):
    """Reads the scale grid [N, G] as if it lay [G, N] in memory."""

    schemes = ("e4m3fn-g32",)

    def factors(self, weight):
        grid = weight.scale_grid()
        return weight.scheme.scaling.spread(grid.reshape(grid.shape[::-1]).T, *weight.shape)


@implementation("faulty_row_scale_along_k")
class RowScaleAlongK(Right):
    """Applies the row scales to the columns: it broadcasts where N = K, and nothing complains."""

    def factors(self, weight):
        return weight.scale_grid().T


@implementation("faulty_scale_missing")
class ScaleMissing(Right):
    """Forgets the scale."""

    schemes = ("e4m3fn-row", "mxfp4")

    def factors(self, weight):
        return torch.ones(())


@implementation("faulty_tensor_scale_missing")
class TensorScaleMissing(Right):
    """Forgets NVFP4's second scale."""

    schemes = ("nvfp4",)

    def factors(self, weight):
        return weight.scheme.scaling.spread(decode(weight.scales, FORMATS["e4m3fn"]), *weight.shape)


@implementation("faulty_block_off_by_one")
class BlockOffByOne(Right):
    """Multiplies each block by the scale of the next one."""

    schemes = ("mxfp4",)

    def factors(self, weight):
        return weight.scheme.scaling.spread(weight.scale_grid().roll(-1, dims=1), *weight.shape)


@implementation("faulty_boundary_off_by_one")
class BoundaryOffByOne(Right):
    """Begins each block one weight late."""

    schemes = ("e4m3fn-g32",)

    def factors(self, weight):
        factors = super().factors(weight)
        return torch.cat([factors[:, :1], factors[:, :-1]], dim=1)


@implementation("faulty_scale_exponent")
class ScaleExponent(Right):
    """Reads E8M0 with bias 126."""

    schemes = ("mxfp4",)

    def factors(self, weight):
        return 2 * super().factors(weight)


@implementation("faulty_two_mistakes")
class TwoMistakes(NibbleSwap):
    """Swaps nibbles and forgets the scale."""

    def factors(self, weight):
        return torch.ones(())


@implementation("faulty_outputs_exchanged")
class OutputsExchanged(Right):
    """The halves of a fused layer come out in the other order."""

    schemes = ("mxfp4",)

    def decoded(self, weight):
        return super().decoded(weight).roll(weight.shape[0] // 2, 0)


@implementation("faulty_last_scale_left_out")
class LastScaleLeftOut(Right):
    """The scale of the last block along K is never applied."""

    schemes = ("mxfp4",)

    def factors(self, weight):
        factors = super().factors(weight).clone()
        factors[:, (weight.shape[1] - 1) // 32 * 32:] = 1
        return factors


@implementation("faulty_scale_rows_of_four")
class ScaleRowsOfFour(Right):
    """Takes a row of the scale grid for as long as the next multiple of four, as cuBLAS does with blocks of 128 x 128.
    """

    schemes = ("e4m3fn-b128x128",)

    def factors(self, weight):
        grid = weight.scale_grid()
        rows, columns = grid.shape
        at = torch.arange(rows)[:, None] * (-(-columns // 4) * 4) + torch.arange(columns)
        return weight.scheme.scaling.spread(grid.reshape(-1)[at.to(grid.device) % grid.numel()], *weight.shape)

"""int8 weights with one scale per row: the layer in use today, and the one that float8 has to beat."""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation

from ._compiling import PerShape


def int8_linear(x, w, scale):
    """Return x @ (w * scale).T: x [M, K] 16-bit, w int8 [N, K], scale fp32 [N] -> [M, N]."""
    return (F.linear(x, w.to(x.dtype)) * scale).to(x.dtype)


@implementation("int8_weight_only")
class Int8WeightOnly(Implementation):
    """`F.linear(x, w.to(x.dtype)) * scale`: compiled on GPUs, ATen's own int8 kernel on CPU.

    Users get these: gpt-fast and torchao write this expression, and on CPU Inductor's weight-only pattern replaces it
    by `torch._weight_int8pack_mm`, which reads each weight's byte once and decodes it in registers.
    """

    # The CPU kernel reads 16 weights at a time, past the end of a ragged row (torch 2.13: wrong numbers or a segfault).
    # The planar layout pads K to a multiple of 32 by zeros; at 8 bits it is otherwise plain bytes.
    layout = "planar"

    def __init__(self):
        self._int8_linear = PerShape(int8_linear)

    def supports(self, scheme, device):
        if scheme.name != "int8-row":
            return Support.no(f"supports int8-row only, not {scheme.name}")
        return Support.yes()

    def matmul(self, x, weight):
        w, scale = weight.packed.view(torch.int8), weight.scales.reshape(-1)
        flat = F.pad(x.reshape(-1, x.shape[-1]), (0, w.shape[1] - x.shape[-1])).contiguous()
        if flat.is_cuda:
            out = self._int8_linear(flat, w, scale)
        else:
            # The kernel takes scales in x's dtype. Given ones, the fp32 scale is applied afterwards, without rounding
            # it.
            product = torch._weight_int8pack_mm(flat, w, torch.ones(w.shape[0], dtype=x.dtype))
            out = (product * scale).to(x.dtype)
        return out.reshape(*x.shape[:-1], weight.shape[0])

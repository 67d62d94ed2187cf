"""The 16-bit layer that every quantized one is compared with."""

import torch.nn.functional as F

from fpxbench.checking.grouped_product import grouped_product
from fpxbench.implementation import Implementation, Support, implementation


@implementation("dense", baseline=True)
class Dense(Implementation):
    """`F.linear` with a 16-bit weight: two bytes of memory traffic per weight, no decode.

    With few tokens a layer is bound by reading its weight, so a weight of b bits can be at most 16/b times as fast.
    """

    def supports(self, scheme, device):
        if scheme.quantized:
            return Support.no(f"stores the weight in bf16 or fp16, and {scheme.name} is quantized")
        return Support.yes()

    def matmul(self, x, weight):
        if x.dtype != weight.packed.dtype:      # converting the weight would measure the conversion, and round it
            raise TypeError(f"a {weight.scheme.name} weight multiplies activations of its own dtype, not {x.dtype}")
        return F.linear(x, weight.packed)

    def grouped_matmul(self, x, weight, offsets):
        return grouped_product(x, weight.packed, offsets)

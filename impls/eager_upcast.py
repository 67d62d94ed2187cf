"""Any scheme, decoded on every call by ordinary torch ops, then multiplied in 16 bits."""

import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.impls._upcast import upcast


@implementation("eager_upcast")
class EagerUpcast(Implementation):
    """Shifts, a table look-up, a multiplication by the scales and `F.linear`, each a separate pass over memory.

    It supports every scheme, also those that quantize activations: these are rounded by the reference codec, and
    multiplied in fp32. It is slow on every device: it moves some thirty bytes for each weight of one byte or
    less. It shows what fewer bits cost without a kernel.
    """

    quantizes_activations = True

    def supports(self, scheme, device):
        if not scheme.quantized:
            return Support.no(f"{scheme.name} is not quantized, so there is nothing to upcast")
        return Support.yes()

    def matmul(self, x, weight):
        w = upcast(weight)
        if weight.scheme.activation is not None:
            return F.linear(weight.scheme.rounded_activation(x), w).to(x.dtype)
        return F.linear(x, w.to(x.dtype))

"""bitsandbytes' 4-bit weights: NF4, and its own FP4."""

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.impls.peers._libraries import library, missing
from fpxbench.numbers.weight import QuantizedWeight

TYPES = {"nf4-g64": "nf4", "bnbfp4-g64": "fp4"}
BLOCK = 64
LAYOUT = "nibbles_high_first"


@implementation("bitsandbytes")
class BitsAndBytes(Implementation):
    """`bitsandbytes.matmul_4bit`: a fused kernel for one token; decode and a dense product for more.

    It quantizes its own way, over blocks of 64 of the flattened weight; where K is a multiple of 64 those are blocks of
    a row, and the codes and scales are read back by the oracle.
    """

    own_layouts = dict.fromkeys(TYPES, LAYOUT)

    def supports(self, scheme, device):
        if (reason := missing("bitsandbytes", "bitsandbytes", device, needs_gpu=False)) is not None:
            return reason
        if scheme.name not in TYPES:
            return Support.no(f"supports {' and '.join(TYPES)} only, not {scheme.name}")
        return Support.yes()

    def library(self):
        return library("bitsandbytes")

    def quantize(self, weight, scheme):
        from bitsandbytes.functional import quantize_4bit

        n, k = weight.shape
        if k % BLOCK:
            raise NotImplementedError(f"blocks of {BLOCK} of the flattened weight cross its rows where K = {k}")
        codes, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type=TYPES[scheme.name])
        return QuantizedWeight(scheme, (n, k), LAYOUT, codes.view(n, k // 2),
                               state.absmax.view(n, k // BLOCK).float())

    def matmul(self, x, weight):
        import bitsandbytes
        from bitsandbytes.functional import QuantState, get_4bit_type

        kind = TYPES[weight.scheme.name]
        state = QuantState(absmax=weight.scales.reshape(-1), shape=weight.shape, dtype=x.dtype, blocksize=BLOCK,
                           code=get_4bit_type(kind, device=x.device), quant_type=kind)
        return bitsandbytes.matmul_4bit(x, weight.packed.reshape(-1, 1).t(), state)

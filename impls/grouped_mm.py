"""PyTorch's grouped product, on experts that are decoded to 16 bits on every call."""

import torch
import torch.nn.functional as F

from fpxbench.checking import grouped_product
from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.impls._upcast import upcast
from fpxbench.numbers.experts import QuantizedExperts, rows_of_experts


@implementation("grouped_mm")
class GroupedMM(Implementation):
    """`torch.nn.functional.grouped_mm` (`torch._grouped_mm` before 2.10) with the experts in 16 bits.

    Experts that have tokens are decoded by ordinary torch ops, in passes over memory; then one kernel multiplies them
    all. It reads the offsets on the host, to leave the other experts alone.
    """

    experts_only = True

    def supports(self, scheme, device):
        if not scheme.quantized or scheme.activation is not None:
            return Support.no(f"supports quantized weights with 16-bit activations only, not {scheme.name}")
        refusal = grouped_product.why_not(device, torch.bfloat16)
        return Support.no(refusal, missing="has no" in refusal) if refusal else Support.yes()

    def matmul(self, x, weight):
        rows = x.reshape(-1, x.shape[-1])
        offsets = torch.tensor([len(rows)], dtype=torch.int32, device=x.device)
        out = self.grouped_matmul(rows, QuantizedExperts.stack([weight]), offsets)
        return out.reshape(*x.shape[:-1], weight.shape[0])

    def grouped_matmul(self, x, weight, offsets):
        groups = rows_of_experts(offsets)
        if not groups:
            return x.new_empty(0, weight.shape[0])
        # K is padded with zeros: the kernel requires rows of a multiple of 16 bytes.
        padding = -weight.shape[1] % grouped_product.ALIGNMENT
        dense = torch.stack([F.pad(upcast(weight.experts[expert]).to(x.dtype), (0, padding)) for expert, *_ in groups])
        ends = torch.tensor([last for _, _, last in groups], dtype=torch.int32, device=x.device)
        return grouped_product.grouped_product(F.pad(x, (0, padding)), dense, ends)

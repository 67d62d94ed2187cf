"""int8 activations times int8 weights, summed in int32."""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation


@implementation("int_mm")
class IntMM(Implementation):
    """`torch._int_mm`: int8 activations times int8 weights, summed in int32, then both scales.

    One scale per token and one per channel. Nothing is rounded between the codes and the output.
    """

    layout = "bytes"
    quantizes_activations = True

    def supports(self, scheme, device):
        if scheme.name not in ("int8-row+int8-row", "int8-tensor+int8-row"):
            return Support.no(f"supports int8-row+int8-row only, not {scheme.name}")
        return Support.yes()

    def matmul(self, x, weight):
        n, k = weight.shape
        flat = x.reshape(-1, k)
        m = flat.shape[0]
        if m == 0:
            return x.new_empty(*x.shape[:-1], n)
        amax = flat.abs().amax(dim=1, keepdim=True).float()
        scale = torch.where(amax == 0, 1.0, amax / 127)     # NaN in a token makes its scale NaN, and so its output
        codes = (flat.float() / scale).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
        # On CUDA more than 16 tokens, and N and K in multiples of 8.
        rows = max(0, 17 - m) if x.is_cuda else 0
        a = F.pad(codes, (0, -k % 8, 0, rows))
        b = F.pad(weight.packed, (0, -k % 8, 0, -n % 8)).view(torch.int8)
        out = torch._int_mm(a, b.t())[:m, :n].float() * scale * weight.scale_grid().reshape(1, -1)
        return out.to(x.dtype).reshape(*x.shape[:-1], n)

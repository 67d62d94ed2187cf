"""NVFP4 activations times NVFP4 weights by the device's own matrix instructions."""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation

from ._scaled_operands import compute_capability, float8_formats, tiled


@implementation("scaled_mm_fp4")
class ScaledMMFP4(Implementation):
    """`torch._scaled_mm` on NVFP4 weights and activations, on sm_100 and later.

    The tensor scales multiply the product, which is rounded to bf16 first. The activation is quantized by the reference
    codec, outside the product.
    """

    layout = "nibbles_low_first"
    quantizes_activations = True

    def supports(self, scheme, device):
        parts = (scheme, scheme.activation)
        if not all(part is not None and part.quantized and part.format.name == "e2m1" and part.scaling.base_name == "nv"
                   for part in parts):
            return Support.no(f"supports nvfp4+nvfp4 only, not {scheme.name}")
        if compute_capability(device) < (10, 0):
            name = float8_formats(device)[1]
            return Support.no(f"torch._scaled_mm multiplies NVFP4 from sm_100 on, and this is {name}")
        return Support.yes()

    def matmul(self, x, weight):
        (n, k), scheme = weight.shape, weight.scheme
        flat = F.pad(x.reshape(-1, k), (0, -k % 64))
        if flat.shape[0] == 0:
            return x.new_empty(*x.shape[:-1], n)
        codes, scales = scheme.quantized_activation(flat)
        a = (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.float4_e2m1fn_x2)
        b = F.pad(weight.packed, (0, a.shape[1] - weight.packed.shape[1], 0, -n % 16)).view(torch.float4_e2m1fn_x2).t()
        blocks = scales.stored.shape[1] - weight.scales.shape[1]
        scale_a, scale_b = (tiled(stored).view(torch.float8_e4m3fn) for stored in (
            scales.stored, F.pad(weight.scales, (0, blocks, 0, -n % 16))))
        out = torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16)
        factor = tensor_factor(scheme.scaling, weight.tensor_scale) * tensor_factor(
            scheme.activation.scaling, scales.tensor_scale)
        return (out[:, :n] * factor).to(x.dtype).reshape(*x.shape[:-1], n)


def tensor_factor(scaling, stored):
    """Return what a stored tensor scale multiplies by: itself, or its reciprocal under ``.div``."""
    return 1 / stored if scaling.divides else stored

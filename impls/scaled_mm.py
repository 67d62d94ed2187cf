"""Quantized activation times quantized weight by the device's own matrix instructions."""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.numbers.dtypes import TORCH_FLOAT8

from ._scaled_operands import FNUZ, compute_capability, float8_formats, float8_rows, tiled


def activation_kind(scheme):
    """Return how `scheme` scales activations: ``row``, ``tensor``, ``g128``, ``mx``, ``nv``; ``row`` if weight-only."""
    return scheme.activation.scaling.base_name if scheme.activation is not None else "row"


def shapes_refused(scheme, known):
    """Return the refusal of a scheme whose scales are not in `known`; None if they are."""
    pair = f"{scheme.scaling.base_name}+{activation_kind(scheme)}"
    if pair in known:
        return None
    return Support.no(f"supports weight and activation scales of {', '.join(known)} only, not {scheme.name}")


@implementation("scaled_mm")
class ScaledMM(Implementation):
    """`torch._scaled_mm`: the activation is rounded to float8, row by row, and both operands are one byte per element.

    The only eager way without an upcast, at the cost of the activation's precision. For a scheme that quantizes
    activations, it follows the scheme's rule: one scale per token or tensor, on sm_90 blocks of 128 by 128 and of 128,
    on sm_100 MXFP8. On CPU it is a reference loop, some fifty times slower than bf16. Blocks of an activation are
    quantized by the reference codec, outside the product.
    """

    layout = "bytes"
    activation_format = "e4m3fn"    # on gfx942 e4m3fnuz, which has the same precision
    quantizes_activations = True

    def supports(self, scheme, device):
        if not scheme.quantized or scheme.format.name not in TORCH_FLOAT8:
            return Support.no(f"supports float8 weights only, not {scheme.name}")
        refusal = shapes_refused(scheme, ("row+row", "row+tensor", "tensor+row", "tensor+tensor", "b128x128+g128",
                                          "mx+mx"))
        if refusal is not None:
            return refusal
        if scheme.activation is not None and scheme.activation.format.name not in TORCH_FLOAT8:
            return Support.no(f"supports float8 activations only, not {scheme.activation.format.name}")
        formats, name = float8_formats(device)
        used = [scheme.format.name] + ([scheme.activation.format.name] if scheme.activation is not None else [])
        if not set(used) <= set(formats) or used == ["e5m2", "e5m2"]:
            known = " and ".join(formats) or "no float8 format"
            return Support.no(f"torch._scaled_mm supports {known} on {name}, not {' times '.join(used)}")
        if scheme.scaling.base_name == "b128x128" and compute_capability(device) != (9, 0):
            return Support.no(f"torch._scaled_mm multiplies scales of 128 by 128 blocks on sm_90, and this is {name}")
        if scheme.scaling.base_name == "mx" and compute_capability(device) < (10, 0):
            return Support.no(f"torch._scaled_mm multiplies MX scales from sm_100 on, and this is {name}")
        return Support.yes()

    def max_elements(self, device):
        return 1 << 24 if device == "cpu" else None

    def matmul(self, x, weight):
        (n, k), scheme = weight.shape, weight.scheme
        flat = x.reshape(-1, k)
        if flat.shape[0] == 0:      # _scaled_mm refuses M = 0
            return x.new_empty(*x.shape[:-1], n)
        if x.is_cuda and x.dtype is not torch.bfloat16:     # rounded to bf16 first, three bits of fp16 would be lost
            raise NotImplementedError(f"torch._scaled_mm writes bfloat16 under scales of rows, not {x.dtype}")
        # The CUDA kernels need N and K in multiples of 16; a byte of 0 is 0.0 in every format. Under blocks of 128 by
        # 128, M in multiples of 4, and K in multiples of 512: the check in PyTorch wants the weight's scales without
        # gaps, and cuBLAS reads them in rows of a multiple of four. Otherwise the product is wrong, without an error
        # (torch 2.11, CUDA 13.0, H200: relative error 0.3 at K = 896).
        of_n, of_k, of_m = {"b128x128": (128, 512, 4), "mx": (128, 128, 1)}.get(scheme.scaling.base_name, (16, 16, 1))
        m = flat.shape[0]
        flat, packed = F.pad(flat, (0, -k % of_k, 0, -m % of_m)), F.pad(weight.packed, (0, -k % of_k, 0, -n % of_n))
        w = packed.view(getattr(torch, TORCH_FLOAT8[scheme.format.name])).t()
        operands = {"b128x128": self._blocks, "mx": self._mx}.get(scheme.scaling.base_name, self._rows)
        codes, scale_a, scale_b = operands(flat, weight, packed.shape[0])
        out = torch._scaled_mm(codes, w, scale_a=scale_a, scale_b=scale_b, out_dtype=x.dtype)
        return out[:m, :n].reshape(*x.shape[:-1], n)

    def _rows(self, flat, weight, rows):
        """Return codes float8 [M, K], scales fp32 [M, 1] and [1, rows]."""
        scheme = weight.scheme
        n = weight.shape[0]
        scale = F.pad(weight.scale_grid().reshape(-1).expand(n), (0, rows - n)).reshape(1, -1).contiguous()
        if scheme.activation is None or scheme.activation.scaling.name == "row":
            name = "e4m3fnuz" if scheme.format.name in FNUZ else "e4m3fn"
            if scheme.activation is not None:
                name = scheme.activation.format.name
            return *float8_rows(flat, getattr(torch, TORCH_FLOAT8[name])), scale
        codes, scales = scheme.quantized_activation(flat)
        factors = scheme.activation.scaling.factors(scales)     # [M, 1] or [1, 1]
        return self._viewed(codes, scheme), factors.expand(len(flat), 1).contiguous(), scale

    def _blocks(self, flat, weight, rows):
        """Return scales fp32 [M, K / 128], column by column, and [K / 128, rows / 128]."""
        codes, scales = weight.scheme.quantized_activation(flat)
        factors, grid = weight.scheme.activation.scaling.factors(scales), weight.scale_grid()
        grid = F.pad(grid, (0, factors.shape[1] - grid.shape[1]), value=1.0)
        return self._viewed(codes, weight.scheme), factors.t().contiguous().t(), grid.contiguous().t()

    def _mx(self, flat, weight, rows):
        """Return scales E8M0 in tiles."""
        codes, scales = weight.scheme.quantized_activation(flat)
        scale_a, scale_b = (tiled(stored).view(torch.float8_e8m0fnu) for stored in (
            scales.stored, F.pad(weight.scales, (0, scales.stored.shape[1] - weight.scales.shape[1]))))
        return self._viewed(codes, weight.scheme), scale_a, scale_b

    @staticmethod
    def _viewed(codes, scheme):
        return codes.view(getattr(torch, TORCH_FLOAT8[scheme.activation.format.name]))

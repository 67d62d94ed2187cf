"""float8 times float8 by the device's own matrix instructions."""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.numbers.dtypes import TORCH_FLOAT8

OCP, FNUZ = ("e4m3fn", "e5m2"), ("e4m3fnuz", "e5m2fnuz")


def float8_rows(x, dtype):
    """Return x [M, K] as float8 codes, and one fp32 scale a row, [M, 1]."""
    largest = torch.finfo(dtype).max
    amax = x.abs().amax(dim=1, keepdim=True).float()
    scale = torch.where(amax > 0, amax / largest, 1.0)
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def float8_formats(device):
    """Return the formats that `torch._scaled_mm` supports on `device`, and the device's name."""
    if device == "cpu":
        return OCP + FNUZ, "a CPU"
    if torch.version.hip:
        arch = torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
        return {"gfx942": FNUZ, "gfx950": OCP}.get(arch, ()), arch
    major, minor = torch.cuda.get_device_capability()
    return OCP if (major, minor) >= (8, 9) else (), f"sm_{major}{minor}"


@implementation("scaled_mm")
class ScaledMM(Implementation):
    """`torch._scaled_mm`: the activation is rounded to float8, row by row, and both operands stay in a byte.

    The only eager way without an upcast, at the cost of the activation's precision. On CPU it is a reference loop, some
    fifty times slower than bf16.
    """

    layout = "bytes"
    activation_format = "e4m3fn"    # on gfx942 e4m3fnuz, which has the same precision

    def supports(self, scheme, device):
        if not scheme.quantized or scheme.format.name not in TORCH_FLOAT8 or scheme.scaling.block is not None:
            return Support.no(f"supports float8 weights with one scale a row or a tensor, not {scheme.name}")
        formats, name = float8_formats(device)
        if scheme.format.name not in formats:
            known = " and ".join(formats) or "no float8 format"
            return Support.no(f"torch._scaled_mm supports {known} on {name}, not {scheme.format.name}")
        return Support.yes()

    def max_elements(self, device):
        return 1 << 24 if device == "cpu" else None

    def matmul(self, x, weight):
        (n, k), name = weight.shape, weight.scheme.format.name
        flat = x.reshape(-1, k)
        if flat.shape[0] == 0:      # _scaled_mm refuses M = 0
            return x.new_empty(*x.shape[:-1], n)
        # The CUDA kernels need N and K in multiples of 16; a byte of 0 is 0.0 in every format.
        packed = F.pad(weight.packed, (0, -k % 16, 0, -n % 16))
        scale = F.pad(weight.scale_grid().reshape(-1).expand(n), (0, -n % 16)).reshape(1, -1)
        activation_dtype = torch.float8_e4m3fnuz if name in FNUZ else torch.float8_e4m3fn
        codes, row_scale = float8_rows(F.pad(flat, (0, -k % 16)), activation_dtype)
        # Row-wise scaled kernels write bf16 on CUDA.
        out_dtype = torch.bfloat16 if x.is_cuda else x.dtype
        w = packed.view(getattr(torch, TORCH_FLOAT8[name])).t()
        out = torch._scaled_mm(codes, w, scale_a=row_scale, scale_b=scale.contiguous(), out_dtype=out_dtype)
        return out[:, :n].to(x.dtype).reshape(*x.shape[:-1], n)

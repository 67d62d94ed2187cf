"""Operands as `torch._scaled_mm` takes them."""

import torch
import torch.nn.functional as F

OCP, FNUZ = ("e4m3fn", "e5m2"), ("e4m3fnuz", "e5m2fnuz")


def float8_formats(device):
    """Return the formats that `torch._scaled_mm` supports on `device`, and the device's name."""
    if device == "cpu":
        return OCP + FNUZ, "a CPU"
    if torch.version.hip:
        arch = torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
        return {"gfx942": FNUZ, "gfx950": OCP}.get(arch, ()), arch
    major, minor = torch.cuda.get_device_capability()
    return OCP if (major, minor) >= (8, 9) else (), f"sm_{major}{minor}"


def compute_capability(device):
    """Return NVIDIA's compute capability, as in (9, 0); (0, 0) for any other device."""
    return (0, 0) if device == "cpu" or torch.version.hip else torch.cuda.get_device_capability()


def float8_rows(x, dtype):
    """Return x [M, K] as float8 codes, and one fp32 scale per row, [M, 1]."""
    largest = torch.finfo(dtype).max
    amax = x.abs().amax(dim=1, keepdim=True).float()
    scale = torch.where(amax > 0, amax / largest, 1.0)
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def tiled(scales):
    """Return block scales [R, G] in the order in which tensor cores read them: tiles of 128 rows by 4 blocks, a row's
    four blocks together, rows 32 apart next to each other. Padded by zeros; one dimension.

    Source: cuBLAS, "1D block scaling factors layout".
    """
    padded = F.pad(scales, (0, -scales.shape[1] % 4, 0, -scales.shape[0] % 128))
    rows, blocks = padded.shape
    return padded.view(rows // 128, 4, 32, blocks // 4, 4).permute(0, 3, 2, 1, 4).reshape(-1)

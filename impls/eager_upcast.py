"""Any scheme, decoded on every call by ordinary torch ops, then multiplied in 16 bits."""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.packing import padded_k, pieces


def decode_table(fmt, device):
    """Return the number of each code, fp32 ``[2**bits]``, from the format's fields by shifts and one multiplication."""
    if isinstance(fmt, Codebook):
        return torch.tensor([fmt.value(code) for code in range(1 << fmt.bits)], device=device)
    code = torch.arange(1 << fmt.bits, dtype=torch.int32, device=device)
    if fmt.twos_complement:
        signed = torch.where(code >> (fmt.bits - 1) > 0, code - (1 << fmt.bits), code)
        return signed * 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    magnitude = code & fmt.magnitude_mask
    exponent, mantissa = magnitude >> fmt.mantissa_bits, magnitude & ((1 << fmt.mantissa_bits) - 1)
    significand = mantissa + ((exponent > 0).int() << fmt.mantissa_bits)
    unit = ((exponent.clamp(min=1) - fmt.bias - fmt.mantissa_bits + 127) << 23).view(torch.float32)
    negative = code > fmt.magnitude_mask
    value = torch.where(negative, -(significand * unit), significand * unit)
    if fmt.specials == "ieee":
        value = torch.where(exponent == (1 << fmt.exponent_bits) - 1, value * torch.inf, value)
        return torch.where((mantissa > 0) & ~torch.isfinite(value), torch.nan, value)
    if fmt.specials == "fn":
        return torch.where(magnitude == fmt.magnitude_mask, torch.nan, value)
    if fmt.specials == "fnuz":
        return torch.where(negative & (magnitude == 0), torch.nan, value)
    return value


def unpack_planar(packed, bits, k):
    """Return uint8 codes ``[N, K]`` of planar bytes: a shift and a mask for each plane of each piece."""
    codes, start = None, 0
    for offset, width in pieces(bits):
        size = padded_k(k) * width // 8
        piece = packed[:, start:start + size]
        planes = [((piece >> shift) & ((1 << width) - 1)) << offset for shift in range(0, 8, width)]
        part = torch.cat(planes, dim=1)
        codes, start = part if codes is None else codes | part, start + size
    return codes[:, :k]


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
        fmt, scaling = weight.scheme.format, weight.scheme.scaling
        codes = unpack_planar(weight.packed, fmt.bits, weight.shape[1])
        w = decode_table(fmt, x.device)[codes.int()]
        w = w * scaling.spread(weight.scale_grid(), *weight.shape)
        if weight.scheme.activation is not None:
            return F.linear(weight.scheme.rounded_activation(x), w).to(x.dtype)
        return F.linear(x, w.to(x.dtype))

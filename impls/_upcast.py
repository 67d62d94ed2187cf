"""Decode a weight in planar rows by ordinary torch ops."""

import torch

from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.packing import padded_k, pieces


def upcast(weight):
    """Return the numbers of a weight in planar rows, fp32 [N, K]: a table look-up, and a multiplication by the scales.
    """
    fmt, scaling = weight.scheme.format, weight.scheme.scaling
    codes = unpack_planar(weight.packed, fmt.bits, weight.shape[1])
    values = decode_table(fmt, codes.device)[codes.int()]
    return values * scaling.spread(weight.scale_grid(), *weight.shape)


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

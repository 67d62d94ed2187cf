"""Decode, product and scale in one vectorised pass over the packed weight, on CPU, by Inductor alone.

Memory traffic: each packed byte once, plus the scales; at one token nothing else. Cost: about ten integer and float
instructions for a vector of 16 weights.
"""

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.packing import pieces

from ._compiling import compiled


def values(code, fmt):
    """Return fp32 numbers of int32 codes, exact, by operations that Inductor vectorises, without subnormal operands."""
    if fmt.twos_complement:
        signed = (code << (32 - fmt.bits)) >> (32 - fmt.bits)
        return signed.to(torch.float32) * 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    magnitude = code & fmt.magnitude_mask
    bits = (magnitude << (23 - fmt.mantissa_bits)) + ((127 - fmt.bias) << 23)
    if fmt.specials == "ieee":
        infinity = ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits
        bits = torch.where(magnitude >= infinity, bits | 0x7F800000, bits)
    elif fmt.specials == "fn":
        bits = torch.where(magnitude == fmt.magnitude_mask, 0x7FC00000, bits)
    subnormal = magnitude.to(torch.float32) * 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    value = torch.where(magnitude < 1 << fmt.mantissa_bits, subnormal, bits.view(torch.float32))
    sign = (code << (32 - fmt.bits)) & -(1 << 31)
    value = (value.view(torch.int32) | sign).view(torch.float32)
    if fmt.specials == "fnuz":
        value = torch.where(code == fmt.nan_code, torch.nan, value)
    return value


def code_words(words, bits):
    """Yield the int32 codes of planar rows, given as int32 words [N, row_bytes / 4]: [N, S] for each plane and byte.

    Tensor ``t = 4 * plane + byte`` has at i the weight ``k = 4 * (S * plane + i) + byte``. `activation_words` puts the
    activation in the same order.
    """
    planes = 8 // pieces(bits)[-1][1]
    s = words.shape[1] * 32 // (bits * 4 * planes)
    for plane in range(planes):
        for byte in range(4):
            code, start = 0, 0
            for offset, width in pieces(bits):
                slices = planes * width // 8      # planes that share this piece's shift
                first = start + plane % slices * s
                field = words[:, first:first + s] >> (8 * byte + plane // slices * width)
                code = code | ((field & ((1 << width) - 1)) << offset)
                start += slices * s
            yield code


def activation_words(x, bits, k_pad):
    """Return x [M, K] as fp32 [M, T, S], zeros past K, in the order of `code_words`."""
    planes = 8 // pieces(bits)[-1][1]
    words = F.pad(x.float(), (0, k_pad - x.shape[1])).unflatten(1, (planes, -1, 4))
    # Contiguous: over a strided view Inductor vectorises across rows, which is three times slower.
    return words.transpose(2, 3).contiguous().flatten(1, 2)


def decoded(words, grid, fmt, block):
    """Yield the scaled weight, fp32, as [N, S] tensors in the order of `code_words`."""
    for t, code in enumerate(code_words(words, fmt.bits)):
        plane, byte = divmod(t, 4)
        if block is None:
            scale = grid
        else:
            k = 4 * (code.shape[1] * plane + torch.arange(code.shape[1]))
            if block % 4:
                k = k + byte        # otherwise a word's bytes share a scale, which Inductor gathers once
            scale = grid[:, (k // block).clamp(max=grid.shape[1] - 1)]      # zeros past K: any scale will do
        yield values(code, fmt) * scale


def matvec(x, words, grid, fmt, block):
    """Multiply one token in one pass: x fp32 [T, S], words int32 [N, row_bytes / 4], grid fp32 [N or 1, G] -> fp32 [N].
    """
    return sum(w * x[t] for t, w in enumerate(decoded(words, grid, fmt, block))).sum(dim=1)


def decode_rows(words, grid, fmt, block):
    """Return the scaled weight, fp32 [N, K_pad], columns in the order of `code_words`."""
    return torch.cat(list(decoded(words, grid, fmt, block)), dim=1)


MATVEC_TOKENS = 4
"""Up to so many tokens, a pass a token is faster than storing the decoded weight."""
BLOCK_ROWS = 512
"""Rows decoded at a time for more tokens: 8 MB of fp32 at K = 4096, which fits a last-level cache."""


@implementation("cpu_fused")
class CpuFused(Implementation):
    """Decode, product and scale as one loop over int32 words of the packed weight, which Inductor vectorises on CPU.

    `torch.compile` of upcast + matmul + scale is slow on CPU: matmul is a library call there, so the upcast weight goes
    to memory and back; and Inductor's C++ backend stores a 16-bit result of integer decoding, and reads the FNUZ
    dtypes, one weight at a time. As a product and a sum over 32-bit words, one token costs about what reading the
    weight in bf16 does: decoding takes the time that the smaller weight saves. Up to four tokens cost one such pass
    each; for more, rows are decoded into the cache a block at a time for a 16-bit matmul, and decoding dominates.
    """

    def __init__(self):
        self._matvec, self._decode_rows = compiled(matvec), compiled(decode_rows)

    def supports(self, scheme, device):
        if device != "cpu":
            return Support.no(f"runs on CPUs only; triton_fused does the same on {device}")
        if not scheme.quantized:
            return Support.no(f"{scheme.name} is not quantized, so there is nothing to decode")
        if isinstance(scheme.format, Codebook):
            return Support.no(f"decodes by arithmetic, and {scheme.format.name} is a list of values")
        return Support.yes()

    def matmul(self, x, weight):
        n, k = weight.shape
        fmt, block = weight.scheme.format, weight.scheme.scaling.block
        words, grid = weight.packed.view(torch.int32), weight.row_scales()
        a = activation_words(x.reshape(-1, k), fmt.bits, words.shape[1] * 32 // fmt.bits)
        out = a.new_empty(len(a), n)
        if len(a) <= MATVEC_TOKENS:
            for token in range(len(a)):
                out[token] = self._matvec(a[token], words, grid, fmt, block)
        else:
            a = a.flatten(1).to(x.dtype)
            for start in range(0, n, BLOCK_ROWS):
                rows = slice(start, start + BLOCK_ROWS)
                w = self._decode_rows(words[rows], grid[rows] if len(grid) == n else grid, fmt, block)
                out[:, rows] = F.linear(a, w.to(x.dtype))
        return out.to(x.dtype).reshape(*x.shape[:-1], n)

"""Small implementations, each the essence of a fault that public bug reports of low-bit kernels describe, and right
ones that look odd."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import Rounding, decode, decode_table, encode
from fpxbench.numbers.weight import QuantizedWeight


class World(Implementation):
    """Decode, scale, multiply; a subclass does one of these otherwise."""

    layout = "bytes"
    name: ClassVar[str] = "world"

    def supports(self, scheme, device):
        return Support.yes()

    def values(self, weight):
        return decode(weight.codes(), weight.scheme.format)

    def block_scales(self, weight):
        return weight.scheme.scaling.levels(weight.stored_scales)[0]

    def global_scale(self, weight):
        return 1.0 if weight.tensor_scale is None else weight.tensor_scale

    def decoded(self, weight):
        scales = self.block_scales(weight) * self.global_scale(weight)
        return self.values(weight) * weight.scheme.scaling.spread(scales, *weight.shape)

    def matmul(self, x, weight):
        return (x.float() @ self.decoded(weight).T).to(x.dtype)


class ScalesInTiles(World):
    """Scales stored row by row are read in the 128 x 4 order of tensor cores; past the end lies zero."""

    def block_scales(self, weight):
        stored, (n, g) = weight.scales, weight.scales.shape
        row, block = torch.arange(n)[:, None], torch.arange(g)[None, :]
        at = (row // 128 * -(-g // 4) + block // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4
        memory = torch.zeros(-(-n // 128) * 128 * -(-g // 4) * 4, dtype=torch.uint8, device=stored.device)
        memory[:n * g] = stored.reshape(-1)
        return weight.scheme.scaling.scale_format.decode(memory[at])


class GlobalDivided(World):
    """The file keeps the reciprocal of the global scale; the kernel takes it for the scale."""

    def global_scale(self, weight):
        return 1 / weight.tensor_scale


class GlobalAsDivisor(GlobalDivided):
    """Stores the reciprocal and divides by it: right, by another convention."""

    def quantize(self, weight, scheme):
        stored = super().quantize(weight, scheme)
        return replace(stored, tensor_scale=1 / stored.tensor_scale)


class NanAsZero(World):
    """A software decode of FNUZ without its NaN."""

    def values(self, weight):
        return super().values(weight).nan_to_num(0.0)


class FnOnFnuzHardware(World):
    """E4M3FN's bytes on FNUZ hardware, -0 made +0, the scale not doubled."""

    def values(self, weight):
        codes = weight.codes()
        return decode(codes.masked_fill(codes == 0x80, 0), FORMATS["e4m3fnuz"])


class ScaleByShift(World):
    """E8M0 shifted into fp32's exponent field."""

    def block_scales(self, weight):
        return (weight.scales.int() << 23).view(torch.float32)


class ScaleInFp16(ScaleByShift):
    """The same, kept in fp16."""

    def block_scales(self, weight):
        return super().block_scales(weight).half().float()


class PairsOfBlocks(World):
    """A tile of two blocks takes the first one's scale."""

    def block_scales(self, weight):
        scales = super().block_scales(weight)
        return scales[:, torch.arange(scales.shape[1]) // 2 * 2]


class ScaleTwice(World):
    """The scale is in the operand and again in the epilogue."""

    def block_scales(self, weight):
        return super().block_scales(weight).square()


class SquareTransposed(World):
    """Whether to transpose is guessed from the shape."""

    def values(self, weight):
        values = super().values(weight)
        return values.T if weight.shape[0] == weight.shape[1] else values


class TailOfK(World):
    """Steps of 256 along K; what is left over is dropped."""

    def matmul(self, x, weight):
        whole = x.shape[-1] // 256 * 256
        return (x[..., :whole].float() @ self.decoded(weight)[:, :whole].T).to(x.dtype)


class SomeTokens(World):
    """Zeros for some token counts."""

    def matmul(self, x, weight):
        y, m = super().matmul(x, weight), x.reshape(-1, x.shape[-1]).shape[0]
        return y * 0 if m == 2 or 5 <= m <= 8 or 17 <= m <= 32 else y


class FirstOfBatch(World):
    """Reads the activation as [M, K] at its address, whatever its shape and strides."""

    def matmul(self, x, weight):
        m, k = x.shape[-2:] if x.dim() > 1 else (1, x.shape[0])
        y = (torch.as_strided(x, (m, k), (k, 1)).float() @ self.decoded(weight).T).to(x.dtype)
        if x.dim() < 3:
            return y.reshape(*x.shape[:-1], -1)
        return torch.cat([y[None], y.new_zeros(x.shape[0] - 1, *y.shape)])


class PaddingRead(World):
    """Pads K to 32 with memory that was never written."""

    def matmul(self, x, weight):
        k = x.shape[-1]
        padded = torch.empty(*x.shape[:-1], k + -k % 32, dtype=x.dtype, device=x.device)
        padded[..., :k] = x
        return (padded.float() @ torch.nn.functional.pad(self.decoded(weight), (0, -k % 32)).T).to(x.dtype)


class StaleScale(World):
    """Quantizes the activation by the scale of the first call."""

    activation_format = "e4m3fn"
    scale = None

    def matmul(self, x, weight):
        if self.scale is None:
            self.scale = x.float().abs().amax() / 448
        codes = encode((x.float() / self.scale).clamp(-448, 448), FORMATS["e4m3fn"])
        return (decode(codes, FORMATS["e4m3fn"]) * self.scale @ self.decoded(weight).T).to(x.dtype)


class ActivationTruncated(World):
    """Rounds the activation toward zero."""

    activation_format = "e4m3fn"
    rounding = Rounding.TOWARD_ZERO

    def matmul(self, x, weight):
        flat = x.float().reshape(-1, x.shape[-1])
        scaling = scheme_named("e4m3fn-row").scaling
        scales = scaling.choose(flat, FORMATS["e4m3fn"])
        codes = encode(scaling.divide(flat, scales), FORMATS["e4m3fn"], rounding=self.rounding)
        rounded = decode(codes, FORMATS["e4m3fn"]) * scaling.spread(scaling.factors(scales), *flat.shape)
        return (rounded @ self.decoded(weight).T).to(x.dtype).reshape(*x.shape[:-1], -1)


class ActivationRounded(ActivationTruncated):
    """Rounds the activation to nearest: right."""

    rounding = Rounding.NEAREST_EVEN


class ZerosDividedByZero(World):
    """Divides by amax / 448 without a floor."""

    def quantize(self, weight, scheme):
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        codes = encode(weight / scale, scheme.format)
        return QuantizedWeight.from_codes(codes, replace_scales(scheme, weight, scale), scheme, self.layout)


def replace_scales(scheme, weight, stored):
    return replace(scheme.quantize(weight)[1], stored=stored)


class ByRule(World):
    """Quantizes by another right rule than the scheme's."""

    rule: ClassVar[str] = "rceil"

    def quantize(self, weight, scheme):
        other = scheme_named(f"{scheme.format.name}-{scheme.scaling.base_name}.{self.rule}")
        codes, scales = other.quantize(weight)
        stored = scales.stored if other.scaling.scale_format.coded else scales.stored.float()
        return QuantizedWeight.from_codes(codes, replace(scales, stored=stored), scheme, self.layout)


class Remembers(World):
    """Knows the answer to an activation that it has seen."""

    def __init__(self):
        self.seen = {}

    def matmul(self, x, weight):
        key = x.contiguous().reshape(-1).view(torch.int16).cpu().numpy().tobytes()
        if key not in self.seen:
            self.seen[key] = super().matmul(x, weight)
        return self.seen[key].clone()


class ScaleBlind(World):
    """The scales were never loaded: all are 1."""

    def block_scales(self, weight):
        return torch.ones_like(super().block_scales(weight))


class SubnormalsRebased(World):
    """Exponent field 0 like any other: 0 is 0.5, 0.5 is 0.75."""

    def values(self, weight):
        table = decode_table(weight.scheme.format, weight.device)
        table[[0, 1, 8, 9]] = table.new_tensor([0.5, 0.75, -0.5, -0.75])
        return table[weight.codes().int()]


class RowsByShare(World):
    """Takes a block's height for N over the number of blocks."""

    def decoded(self, weight):
        n, k = weight.shape
        rows = torch.arange(n) // (n // weight.scales.shape[0])
        scales = weight.scales[rows.clamp(max=weight.scales.shape[0] - 1)].repeat_interleave(128, dim=1)[:, :k]
        return self.values(weight) * scales


class RefusesNan(World):
    """Quantizes the activation by the weight's own scheme, which holds no NaN: it raises for one."""

    activation_format = "e2m1"

    def matmul(self, x, weight):
        scheme = weight.scheme
        flat = x.float().reshape(-1, x.shape[-1])
        quantized = scheme.dequantize(*scheme.quantize(flat)).reshape(x.shape)
        return (quantized @ self.decoded(weight).T).to(x.dtype)


class TunedInPlace(World):
    """Adds into its output, and is run three times on it when a shape is tuned: its first product is three times as
    large."""

    def __init__(self):
        self.tuned = set()

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        times = 1 if x.shape in self.tuned else 3
        self.tuned.add(x.shape)
        return times * y

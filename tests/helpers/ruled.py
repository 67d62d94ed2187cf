"""Right implementations that quantize by another rule than the scheme's, and sum in some order; with a bias, wrong
ones."""

from __future__ import annotations

from dataclasses import replace

import torch

from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode_table, encode
from fpxbench.numbers.weight import QuantizedWeight

ORDERS = {
    "in one": lambda x, w: x.float() @ w.T,
    "in fp64": lambda x, w: x.double() @ w.double().T,
    "decoded to 16 bits first": lambda x, w: x.float() @ w.to(x.dtype).float().T,
    "from the end": lambda x, w: x.flip(-1).float() @ w.flip(1).T,
    "in pairs": lambda x, w: x.float()[..., 0::2] @ w[:, 0::2].T + x.float()[..., 1::2] @ w[:, 1::2].T,
    "split along K": lambda x, w: x.float()[..., :17] @ w[:, :17].T + x.float()[..., 17:] @ w[:, 17:].T,
}
RULES = {
    "mxfp4": ("rceil", "ceil", "even", "stochastic"),
    "mxfp8_e4m3fn": ("rceil", "even"),
    "mxfp6_e2m3": ("rceil", "ceil"),
    "nvfp4": ("up", "4over6", "div", "normal", "shared"),
    "e4m3fn-row": ("bf16", "fp16", "e8m0", "floor", "stochastic"),
    "e3m2-g32": ("bf16", "search", "floor", "stochastic"),
    "e2m1-g32": ("search", "bf16"),
    "e5m2-g128": ("fp16", "floor"),
}
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8)
FLOOR = 1e-12


class ByRule(Implementation):
    """Quantizes by a rule, and multiplies by what it stored."""

    name = "ruled"
    layout = "bytes"

    def __init__(self, rule: str, order: str = "in one", *, declared: bool = True, bias: float = 0.0) -> None:
        self.rule, self.order, self.bias = rule, order, bias
        self.scale_rule = rule if declared else None

    def supports(self, scheme, device):
        return Support.yes()

    def judged(self, scheme):
        own = self.rule in ("shared", "floor", "search", "stochastic")
        return scheme if own else scheme_named(f"{scheme.format.name}-{scheme.scaling.base_name}.{self.rule}")

    def quantize(self, weight, scheme):
        other = self.judged(scheme)
        fmt, scaling = other.format, other.scaling
        scales = scaling.choose(weight, fmt)
        if self.rule == "shared":
            scales = scaling.choose(weight, fmt, shared_amax=3 * weight.abs().amax())
        if self.rule == "floor":
            scales = Scales(scales.stored.clamp(min=FLOOR))
        if self.rule == "search":
            scales = searched(weight, other, scales)
        values = scaling.divide(weight, scales)
        if self.rule == "stochastic":
            codes = encode(values, fmt, Rounding.STOCHASTIC, random_bits=23) if not self.bias else self.biased(
                values, fmt)
        else:
            codes = encode(values, fmt)
        stored = scales.stored
        if not scheme.scaling.scale_format.coded:       # numbers, whatever format they are of
            stored = scaling.scale_format.decode(stored) if scaling.scale_format.coded else stored.float()
        return QuantizedWeight.from_codes(codes, replace(scales, stored=stored), scheme, self.layout)

    def biased(self, values, fmt):
        """Return codes that go up more often than they should."""
        grid = decode_table(fmt)
        grid = grid[grid.isfinite()].unique()
        above = torch.searchsorted(grid, values).clamp(1, len(grid) - 1)
        low, high = grid[above - 1], grid[above]
        place = (values - low) / (high - low)
        up = (torch.rand(values.shape) < place + self.bias) & (place > 0)
        return encode(torch.where(up, high, low), fmt)

    def matmul(self, x, weight):
        scheme = self.judged(weight.scheme)
        stored = weight.scales
        if scheme.scaling.scale_format.coded and stored.dtype != torch.uint8:
            stored = scheme.scaling.scale_format.encode(stored)
        decoded = scheme.dequantize(weight.codes(), Scales(stored, weight.tensor_scale))
        return ORDERS[self.order](x, decoded).to(x.dtype)


def searched(weight, scheme, scales):
    """Return, of a few multiples of each block's scale, the one under which it errs least."""
    fmt, scaling = scheme.format, scheme.scaling
    block, (n, k) = scaling.block, weight.shape
    best = None
    for factor in FACTORS:
        tried = Scales(scales.stored * factor)
        decoded = scheme.dequantize(encode(scaling.divide(weight, tried), fmt), tried)
        padded = torch.nn.functional.pad((decoded - weight).square(), (0, -k % block))
        error = padded.reshape(n, -1, block).sum(2)
        if best is None:
            best = error, tried.stored
        else:
            best = torch.minimum(best[0], error), torch.where(error < best[0], tried.stored, best[1])
    return Scales(best[1])

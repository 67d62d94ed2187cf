"""Activations quantized wrongly on purpose: by the readers and encoders of `fault_injection`, as a weight [M, K] would
be, or by a rule of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from fault_injection import nearest, numbers, over_rows, read, store
from injections import Injection, injections
from torch import Tensor

from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.kinds import Group, Kind

SCHEMES = (
    "e4m3fn-row+e4m3fn-row",
    "e4m3fn-tensor+e4m3fn-tensor",
    "e4m3fn-b128x128+e4m3fn-g128",
    "mxfp8_e4m3fn+mxfp8_e4m3fn",
    "mxfp4+mxfp8_e4m3fn",
    "nvfp4+nvfp4",
    "int8-row+int8-row",
)
_NOT_OF_ACTIVATIONS = "NaN read as a number", "NaN read as zero"
"""Faults in codes that an activation's quantizer does not store."""
_OTHERWISE = {"read with the sibling's bias only": Kind.SCALED, "block scales as FNUZ": Kind.SCALED,
              "a constant for rows 8 to 15": Kind.M_DEPENDENT}
"""No quantizer stores the codes that would tell the first two from one factor; rows are tokens, of which calls have
more or fewer."""


@dataclass(frozen=True)
class OwnRule:
    """A fault that is no other choice in storing or reading: x fp32 [M, K] and the first one -> values."""

    values: Callable[[Tensor, Tensor, object], Tensor]


class FaultyActivation(Implementation):
    """Reads its weight rightly, and quantizes the activation with a fault."""

    name = "injected"
    layout = "bytes"
    quantizes_activations = True

    def __init__(self, injection: Injection) -> None:
        self.injection = injection
        self.first: Tensor | None = None
        self.multiply = over_rows(lambda x, w: (x.double() @ w.double().T).to(torch.bfloat16))

    def supports(self, scheme, device):
        return Support.yes()

    def matmul(self, x, weight):
        flat = x.reshape(-1, x.shape[-1]).float()
        if not len(flat):
            return x.new_zeros(*x.shape[:-1], weight.shape[0])
        self.first = flat if self.first is None else self.first
        finite = flat.isfinite()
        values = self.quantized(torch.where(finite, flat, 0.0), weight.scheme.activation)
        values = torch.where(finite, values, torch.nan).reshape(x.shape)
        return self.multiply(values, weight.dequantize()).to(x.dtype)

    def quantized(self, x: Tensor, scheme) -> Tensor:
        how = self.injection.how
        if isinstance(rule := how.get("rule"), OwnRule):
            return rule.values(x, self.first, scheme)
        stored = store(x, scheme, "bytes", **(how if self.injection.storing else {}))
        return read(stored, **({} if self.injection.storing else how))


def right(x: Tensor, scheme) -> Tensor:
    return read(store(x, scheme, "bytes"))


def under_fixed_scale(x: Tensor, scale: float, scheme) -> Tensor:
    tensor = scheme_named(f"{scheme.format.name}-tensor")
    loud = torch.cat([x, torch.full((1, x.shape[1]), scale * tensor.format.max)])
    return read(store(loud.clamp(-scale * tensor.format.max, scale * tensor.format.max), tensor, "bytes"))[:-1]


def by_another(name: str) -> Callable[[Tensor, Tensor, object], Tensor]:
    return lambda x, first, scheme: right(x, scheme_named(name))


def first_scale(x: Tensor, first: Tensor, scheme) -> Tensor:
    return under_fixed_scale(x, float(first.abs().max()) / scheme.format.max, scheme)


def zeros_lost(x: Tensor, first: Tensor, scheme) -> Tensor:
    block = scheme.scaling.block or x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % block)).reshape(len(x), -1, block)
    zeros = (padded == 0).all(2).repeat_interleave(block, 1)[:, : x.shape[1]]
    if scheme.scaling.block_rows is None:
        zeros = torch.full_like(zeros, bool((x == 0).all()))
    return torch.where(zeros, torch.nan, right(x, scheme))


def global_of_first(x: Tensor, first: Tensor, scheme) -> Tensor:
    """Return NVFP4 under the tensor scale of the first activation."""
    fmt = scheme.format
    tensor = float(first.abs().max()) / (fmt.max * 448)
    amax = torch.nn.functional.pad(x, (0, -x.shape[1] % 16)).reshape(len(x), -1, 16).abs().amax(2)
    e4m3 = numbers(FORMATS["e4m3fn"])
    scales = e4m3[nearest((amax / fmt.max / tensor).double().clamp(max=448).numpy(), FORMATS["e4m3fn"])]
    factors = np.repeat(scales, 16, axis=1)[:, : x.shape[1]] * tensor
    quotients = np.divide(x.double().numpy(), factors, out=np.zeros(factors.shape), where=factors > 0)
    return torch.from_numpy(numbers(fmt)[nearest(quotients, fmt)] * factors)


def under_the_maximum_of(kept: Callable[[int, int], np.ndarray]) -> Callable[[Tensor, Tensor, object], Tensor]:
    """Return a quantizer whose scales are those of the elements of a block that `kept`(length, element) gives."""
    def values(x: Tensor, first: Tensor, scheme) -> Tensor:
        length = scheme.scaling.block or x.shape[1]
        mask = torch.from_numpy(kept(length, np.arange(x.shape[1]) % length))
        seen = torch.where(mask[None, :], x, 0.0)
        scales = scheme.quantize(seen)[1]
        stored = replace(store(seen, scheme, "bytes"), scales=scales.stored, tensor_scale=scales.tensor_scale)
        ones = replace(stored, packed=torch.full_like(stored.packed, nearest(np.ones(1), scheme.format)[0]))
        factors = read(ones).numpy()
        quotients = np.divide(x.double().numpy(), factors, out=np.zeros(factors.shape), where=factors > 0)
        return torch.from_numpy(numbers(scheme.format)[nearest(quotients, scheme.format)] * factors)

    return values


def activation_injections(scheme) -> list[Injection]:
    """Return every fault that can be injected in quantizing the activation of `scheme`."""
    quantized = scheme.activation
    fmt, scaling = quantized.format, quantized.scaling
    found = [replace(injection, kind=_OTHERWISE.get(injection.about, injection.kind))
             for injection in injections(quantized, "bytes")
             if injection.kind.group is not Group.LAYOUT and injection.about not in _NOT_OF_ACTIVATIONS]

    def own(kind: Kind, about: str, values: Callable[[Tensor, Tensor, object], Tensor]) -> None:
        found.append(Injection(kind, about, {"rule": OwnRule(values)}))

    own(Kind.SCALED, "0.8 of the product", lambda x, first, scheme: 0.8 * right(x, scheme))
    own(Kind.STALE_ACTIVATION_SCALE, "the scale of the first call", first_scale)
    own(Kind.SATURATED, "a fixed scale", lambda x, first, scheme: under_fixed_scale(x, 1.7 / scheme.format.max, scheme))
    own(Kind.INACCURATE, "not quantized", lambda x, first, scheme: x)
    own(Kind.SATURATED, "the maximum of the first quarter", under_the_maximum_of(lambda n, at: at < n // 4))
    own(Kind.SATURATED, "the maximum of the last half", under_the_maximum_of(lambda n, at: at >= n // 2))
    own(Kind.SATURATED, "the maximum of every fourth element", under_the_maximum_of(lambda n, at: at % 4 == 1))
    own(Kind.INACCURATE, "its mean is removed", lambda x, first, scheme: right(x - x.mean(1, keepdim=True), scheme))
    if scaling.block_rows == 1:
        own(Kind.ZERO_BLOCK, "zeros divided by their scale", zeros_lost)
    if scaling.name == "row":
        own(Kind.SCALE_TRANSPOSED, "per channel, not per token", lambda x, first, scheme: right(
            x.T.contiguous(), scheme_named(f"{scheme.format.name}-row")).T)
    other = "e5m2" if fmt.name == "e4m3fn" else "e4m3fn"
    own(Kind.ACTIVATION_QUANTIZED, f"{other} a token", by_another(f"{other}-row"))
    for name in ("row", "tensor", "g32"):
        if scaling.name != name:
            own(Kind.ACTIVATION_QUANTIZED, f"{fmt.name}-{name}", by_another(f"{fmt.name}-{name}"))
    if scaling.has_tensor_scale:
        own(Kind.STALE_ACTIVATION_SCALE, "the tensor scale of the first call", global_of_first)
    return found

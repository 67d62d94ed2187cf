"""Activations quantized wrongly on purpose: by the readers and encoders of `fault_injection`, as a weight [M, K] would
be, or by a rule of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from fault_injection import factors_of, nearest, numbers, over_rows, read, store
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
    return torch.from_numpy(numbers(fmt)[nearest(_over(x, factors), fmt)] * factors)


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
        return torch.from_numpy(numbers(scheme.format)[nearest(_over(x, factors), scheme.format)] * factors)

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
    return [*found, *_other_readings(quantized), *_other_encoders(quantized)]


def _other_readings(scheme) -> Iterator[Injection]:
    """Yield readings of codes and scales of which no hypothesis is written down."""
    fmt, scaling, bits = scheme.format, scheme.scaling, scheme.format.bits
    yield Injection(Kind.FORMAT_MISTAKEN, "bits rotated", {"bit_order": [(bit + 1) % bits for bit in range(bits)]})
    order = np.random.default_rng(3).permutation(bits).tolist()
    yield Injection(Kind.FORMAT_MISTAKEN, "bits in a random order", {"bit_order": order})
    if not fmt.twos_complement:
        yield Injection(Kind.FORMAT_MISTAKEN, "all bits but the sign inverted", {"inverted": (1 << (bits - 1)) - 1})
    for kind, about, factor in (
        (Kind.SCALE_MISREAD, "scales to the power of 1.5", lambda value: value**1.5),
        (Kind.SCALE_MISREAD, "scales below 2^-5 doubled", lambda value: np.where(value < 2.0**-5, 2 * value, value)),
        (Kind.SCALE_NARROWED, "scales below 2^-5 are zero", lambda value: np.where(value < 2.0**-5, 0.0, value)),
    ):
        yield Injection(kind, about, {"function": _of_the_stored(scaling, factor)})
    if scaling.block_rows is None:
        return
    yield Injection(Kind.SCALE_PERMUTED, "tokens' scales in a random order", {"row_map": _Shuffled()})
    yield Injection(Kind.SCALE_MISSING, "a constant for the last 40 columns",
                    {"constant": (slice(None), slice(-40, None), 2.0)})
    if scaling.block is not None:
        yield Injection(Kind.SCALE_SHARED, "every third block's scale", {"block_map": _Thirds()})


class _Shuffled:
    """A random order of the rows [N, 1] that it is indexed by."""

    def __getitem__(self, row: np.ndarray) -> np.ndarray:
        return np.random.default_rng(len(row)).permutation(len(row))[row]


class _Thirds:
    def __getitem__(self, block: np.ndarray) -> np.ndarray:
        return block // 3 * 3


def _of_the_stored(scaling, factor: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    if not scaling.scale_format.coded:
        return lambda stored: factor(stored.astype(np.float64))
    values = scaling.scale_format.decode(torch.arange(256, dtype=torch.uint8)).double().numpy()
    return lambda stored: factor(values[stored])


def _other_encoders(scheme) -> Iterator[Injection]:
    def under(about: str, kind: Kind, divided: Callable[[np.ndarray], np.ndarray],
              multiplied: Callable[[np.ndarray], np.ndarray]) -> Injection:
        def values(x: Tensor, first: Tensor, scheme) -> Tensor:
            factors = factors_of(store(x, scheme, "bytes"))
            return torch.from_numpy(numbers(scheme.format)[nearest(_over(x, divided(factors)), scheme.format)]
                                    * multiplied(factors))
        return Injection(kind, about, {"rule": OwnRule(values)})

    yield under("divided by twice the scale", Kind.SCALED, lambda factors: 2 * factors, lambda factors: factors)
    if scheme.scaling.block_rows is not None:
        yield under("divided by the previous token's scale", Kind.BLOCK_OFF_BY_ONE,
                    lambda factors: np.roll(factors, 1, 0), lambda factors: factors)
    if not scheme.scaling.scale_format.coded:
        yield under("1.1 of each scale throughout", Kind.WRONG_MAX, lambda factors: 1.1 * factors,
                    lambda factors: 1.1 * factors)
    for part in (0.3, 0.7):
        yield Injection(Kind.INACCURATE, f"rounded up from {part} on", {"rule": OwnRule(_rounded_from(part))})


def _rounded_from(part: float) -> Callable[[Tensor, Tensor, object], Tensor]:
    def values(x: Tensor, first: Tensor, scheme) -> Tensor:
        factors, grid = factors_of(store(x, scheme, "bytes")), numbers(scheme.format)
        grid = np.unique(np.abs(grid[np.isfinite(grid)]))
        grid = grid[grid <= scheme.format.max]
        quotients = _over(x, factors)
        size = np.clip(np.abs(quotients), 0, grid[-1])
        above = np.clip(np.searchsorted(grid, size), 1, len(grid) - 1)
        low, high = grid[above - 1], grid[above]
        rounded = np.where(size - low >= part * (high - low), high, low)
        return torch.from_numpy(np.copysign(rounded, quotients) * factors)

    return values


def _over(x: Tensor, factors: np.ndarray) -> np.ndarray:
    return np.divide(x.double().numpy(), factors, out=np.zeros(factors.shape), where=factors > 0)

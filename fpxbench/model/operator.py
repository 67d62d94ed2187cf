"""The products of a FloatTensor as custom operators: ``torch.ops.fpxbench.linear`` and ``grouped_linear``."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fpxbench.implementation import Implementation, discover, find
from fpxbench.model.generate_messages import AUTO, USUAL
from fpxbench.model.held_linear import is_opaque
from fpxbench.numbers.experts import QuantizedExperts, rows_of_experts
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.weight import QuantizedWeight

PREFERENCE = {"cuda": ("triton_fused", "compiled_mixed_mm", "eager_upcast"), "cpu": ("cpu_fused", "eager_upcast")}
"""Device -> implementations for ``usual``, the first that supports the scheme; for ``auto`` if no record ranks any."""
RESULTS_VARIABLE = "FPX_RESULTS"


@cache
def resolve(name: str, scheme: Scheme, device: str, *, opaque: bool = False) -> tuple[str, type[Implementation]]:
    """Return the implementation that multiplies `scheme` on `device`: the one named, or for ``auto`` the fastest right
    one.

    The fastest is taken from the records in $FPX_RESULTS (default ``results``) for this device; without records, and
    for ``usual``, it is the first of `PREFERENCE` that supports the scheme. With `opaque`, an implementation given by
    name may keep weights in a form of its own. Raise ValueError, with the reason, if it does not exist or does not
    support the scheme.
    """
    known, _ = discover()
    usual = PREFERENCE.get(device, PREFERENCE["cpu"])
    names = {AUTO: [*_fastest(scheme.name, device), *usual] if name == AUTO else [], USUAL: usual}.get(name, [name])
    reasons = []
    for candidate in names:
        if candidate not in known:
            reasons.append(f"{candidate} does not exist")
            continue
        cls = find(candidate, known)
        support = cls().support(scheme, device)
        own_form = is_opaque(cls) and not (opaque and names == [name])
        if support.supported and not own_form and not cls.baseline:
            return candidate, cls
        reasons.append(f"{candidate}: {support.reason or 'keeps weights in a form of its own'}")
    raise ValueError(f"no implementation multiplies {scheme.name} on {device}: {'; '.join(reasons)}")


def _fastest(scheme: str, device: str) -> list[str]:
    """Return the right, timed implementations of this kind of device, by median speedup, fastest first."""
    from statistics import median

    from fpxbench.records.store import Store, latest
    from fpxbench.records.verdict import Status

    folder = Path(os.environ.get(RESULTS_VARIABLE) or "results")
    if not folder.is_dir():
        return []
    speedups: dict[str, list[float]] = {}
    wrong = set()
    records, _ = Store(folder).read_all()
    for record in latest(records):
        if record.case.scheme != scheme or record.machine.kind != device:
            continue
        if record.verdict.status is Status.OK and record.timing and record.timing.speedup:
            speedups.setdefault(record.case.implementation, []).append(record.timing.speedup)
        elif record.verdict.status not in (Status.OK, Status.UNSUPPORTED, Status.MISSING):
            wrong.add(record.case.implementation)
    return sorted(speedups.keys() - wrong, key=lambda name: -median(speedups[name]))


@cache
def instance_for(name: str, scheme: str, device: str, n: int, k: int) -> Implementation:
    """Return the one instance for all weights [n, k] of `scheme` on `device`. Raise ValueError as `resolve` does."""
    return resolve(name, scheme_named(scheme), device)[1]()


Weight = TypeVar("Weight", bound=QuantizedWeight)


def readable(instance: Implementation, weight: Weight) -> Weight:
    """Return a weight, or experts, in a layout that `instance` reads: unchanged if it already is."""
    layout = instance.layout_for(weight.scheme, weight.shape, weight.device)
    return weight if instance.any_layout or weight.layout == layout else weight.relayout(layout)


@torch.library.custom_op("fpxbench::linear", mutates_args=())
def linear(x: Tensor, packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, bias: Tensor | None,
           scheme: str, layout: str, implementation: str, n: int, k: int) -> Tensor:
    """Return ``x @ weight.T + bias``, [..., N] in x's dtype, computed by `implementation`."""
    if x.numel() == 0:      # before the weight may be repacked, which costs a pass over it
        return x.new_empty(*x.shape[:-1], n)
    instance = instance_for(implementation, scheme, x.device.type, n, k)
    weight = QuantizedWeight(scheme_named(scheme), (n, k), layout, packed, scales, tensor_scale)
    out = instance.matmul(x, readable(instance, weight))
    return out if bias is None else out + bias


_EXPERTS = WeakIdKeyDictionary()


def kept_experts(packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, scheme: str, layout: str,
                 shape: tuple[int, int]) -> QuantizedExperts:
    """Return the same object in every call while the tensors are alive and unchanged, so that an implementation can
    cache what it derives from each expert."""
    stored = [tensor for tensor in (packed, scales, tensor_scale) if tensor is not None]
    state = scheme, layout, [(id(tensor), None if tensor.is_inference() else tensor._version) for tensor in stored]
    kept = _EXPERTS.get(packed)
    if kept is None or kept[0] != state:
        # A view of `packed` would keep it and this entry alive. The scales are kept so that their ids stay unique.
        alias = packed.new_empty(0).set_(packed.untyped_storage(), packed.storage_offset(), packed.shape,
                                         packed.stride())
        experts = QuantizedExperts(scheme_named(scheme), shape, layout, alias, scales, tensor_scale)
        kept = _EXPERTS[packed] = (state, stored[1:], experts)
    return kept[2]


@torch.library.custom_op("fpxbench::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, offsets: Tensor,
                   scheme: str, layout: str, implementation: str, n: int, k: int) -> Tensor:
    """Return each row of x [T, K] times its expert's weight, [T, N] in x's dtype, computed by `implementation`.

    Rows of expert e end before row ``offsets[e]``: see `Implementation.grouped_matmul`.
    """
    if x.numel() == 0:
        return x.new_empty(len(x), n)
    instance = instance_for(implementation, scheme, x.device.type, n, k)
    experts = kept_experts(packed, scales, tensor_scale, scheme, layout, (n, k))
    return instance.grouped_matmul(x, readable(instance, experts), offsets)


@linear.register_fake
@grouped_linear.register_fake
def _product_like(x: Tensor, *weight: Any) -> Tensor:
    """Return an empty result [..., N]: an operator's last two arguments are N and K."""
    return x.new_empty(*x.shape[:-1], weight[-2])


def _keep_for_backward(ctx, inputs, output) -> None:
    _, packed, scales, tensor_scale, bias, scheme, layout, _, n, k = inputs
    ctx.save_for_backward(packed, scales, tensor_scale)
    ctx.weight, ctx.has_bias = (scheme, layout, n, k), bias is not None


def _backward(ctx, gradient: Tensor):
    """Return the gradients of the activation and the bias; codes have none."""
    (packed, scales, tensor_scale), (scheme, layout, n, k) = ctx.saved_tensors, ctx.weight
    weight = QuantizedWeight(scheme_named(scheme), (n, k), layout, packed, scales, tensor_scale).dequantize()
    of_bias = gradient.reshape(-1, n).sum(dim=0) if ctx.has_bias else None
    return gradient @ weight.to(gradient.dtype), None, None, None, of_bias, None, None, None, None, None


linear.register_autograd(_backward, setup_context=_keep_for_backward)


@torch.library.custom_op("fpxbench::grouped_linear_gradient", mutates_args=())
def grouped_linear_gradient(gradient: Tensor, packed: Tensor, scales: Tensor, tensor_scale: Tensor | None,
                            offsets: Tensor, scheme: str, layout: str, n: int, k: int) -> Tensor:
    """Return the gradient of `grouped_linear`'s activation, [T, K], from the gradient of its output, [T, N].

    A separate operator, because it reads the offsets' values, which a compiler cannot trace.
    """
    experts = QuantizedExperts(scheme_named(scheme), (n, k), layout, packed, scales, tensor_scale)
    of_x = gradient.new_empty(len(gradient), k)
    for expert, first, last in rows_of_experts(offsets):
        of_x[first:last] = gradient[first:last] @ experts.experts[expert].dequantize().to(gradient.dtype)
    return of_x


@grouped_linear_gradient.register_fake
def _gradient_like(gradient: Tensor, *weight: Any) -> Tensor:
    return gradient.new_empty(len(gradient), weight[-1])


def _keep_grouped_for_backward(ctx, inputs, output) -> None:
    _, packed, scales, tensor_scale, offsets, scheme, layout, _, n, k = inputs
    ctx.save_for_backward(packed, scales, tensor_scale, offsets)
    ctx.weight = scheme, layout, n, k


def _grouped_backward(ctx, gradient: Tensor):
    """Return the gradient of the activation; codes have none."""
    return grouped_linear_gradient(gradient, *ctx.saved_tensors, *ctx.weight), *([None] * 9)


grouped_linear.register_autograd(_grouped_backward, setup_context=_keep_grouped_for_backward)

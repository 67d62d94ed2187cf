"""Compute the projections of one input as one product: query, key and value; gate and up.

Every serving stack does this. The layers are found by tracing a forward pass, not by name: linear layers of one module
that receive the same tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.quantize_model import is_left

Groups = list[list[str]]
"""Names of the modules to merge, group by group, in the order in which the model calls them."""


class Projection(nn.Module):
    """A module in the place of a merged linear layer: returns that layer's part of the merged product."""

    def __init__(self, product: MergedProduct, index: int) -> None:
        super().__init__()
        self.product, self.index = product, index

    def forward(self, x: Tensor) -> Tensor:
        return self.product.part(x, self.index)

    def extra_repr(self) -> str:
        return f"part {self.index + 1} of {self.product.name}"


class MergedProduct:
    """The product of a merged layer: computed for its first part, and kept until its last.

    The layer is looked up by name in `parent`, so a module that replaces it there is called instead.
    """

    def __init__(self, parent: nn.Module, name: str, sizes: Sequence[int]) -> None:
        self.parent, self.name, self.sizes = parent, name, list(sizes)
        self._x: Tensor | None = None
        self._parts: Sequence[Tensor] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        """Return part `index` of ``layer(x)``, [..., size of the part]: a view."""
        if self._x is not x:
            self._x, self._parts = x, getattr(self.parent, self.name)(x).split(self.sizes, dim=-1)
        part = self._parts[index]
        if index == len(self.sizes) - 1:
            self._x, self._parts = None, ()
        return part


@torch.no_grad()
def projection_groups(model: nn.Module, **inputs: Any) -> Groups:
    """Return the linear layers of `model` that can be computed as one product.

    The layers of a group are in one module and are called once each, consecutively, with the same tensor. The model is
    called with `inputs`; without any, with one token. Tied layers, and those that quantization leaves by default, are
    in no group.
    """
    calls: list[tuple[tuple[Any, ...], str]] = []
    kept: list[Tensor] = []        # keeps the tensors alive, so that their ids stay unique

    def note(name: str) -> Any:
        def hook(module: Any, given: tuple[Any, ...]) -> None:
            x = given[0]
            version = None if x.is_inference() else x._version
            calls.append(((name.rpartition(".")[0], id(x), version, module.weight.dtype, module.in_features), name))
            kept.append(x)
        return hook

    parameters = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    handles = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()
               if type(module) is nn.Linear and not is_left(name) and parameters.count(id(module.weight)) == 1]
    try:
        model(**inputs or {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device),
                           "use_cache": False})
    finally:
        for handle in handles:
            handle.remove()
    names = [name for _, name in calls]
    groups = [[name for _, name in group] for _, group in groupby(calls, lambda call: call[0])]
    return [group for group in groups if len(group) > 1 and all(names.count(name) == 1 for name in group)]


@torch.no_grad()
def merge_projections_(model: nn.Module, groups: Groups | None = None) -> dict[str, str]:
    """Replace each group of linear layers (None: `projection_groups`) by one layer, named by joining their names with
    ``+``: ``layers.0.mlp.gate_proj+up_proj``.

    Groups are merged one by one, so that only one group's weights are in memory twice. Quantized weights are joined
    code by code; a group is left unmerged if that would change a number (tensor scales that differ) or is impossible.
    Return the unmerged groups, by the name that the merged layer would have, each with the reason.
    """
    left = {}
    for group in projection_groups(model) if groups is None else groups:
        of_parent = group[0].rpartition(".")[0]
        parent = model.get_submodule(of_parent)
        parts = [name.rpartition(".")[2] for name in group]
        merged = "+".join(parts)
        try:
            layer = _joined([getattr(parent, part) for part in parts])
        except NotImplementedError as error:
            left[f"{of_parent}.{merged}".lstrip(".")] = str(error)
            continue
        product = MergedProduct(parent, merged, [getattr(parent, part).out_features for part in parts])
        for index, part in enumerate(parts):
            setattr(parent, part, Projection(product, index))
        parent.add_module(merged, layer)
    return left


def _joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Return one layer that computes the concatenated outputs of `layers`.

    Raise NotImplementedError for quantized weights without a common scale, and for layers of different kinds.
    """
    if any(type(layer) is not nn.Linear for layer in layers):
        raise NotImplementedError("an implementation keeps one of these weights in a form of its own")
    first = layers[0]
    weight: Any = torch.cat([layer.weight.detach() for layer in layers])
    if isinstance(weight, FloatTensor):
        weight = weight.laid_out()
    n = sum(layer.out_features for layer in layers)
    joined = nn.Linear(first.in_features, n, bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    kept: Any = joined.weight.data
    if isinstance(kept, FloatTensor):
        kept.prepare()
    given = next((layer.bias for layer in layers if layer.bias is not None), None)
    if given is not None:
        biases: list[Tensor] = [layer.bias if layer.bias is not None else given.new_zeros(layer.out_features)
                                for layer in layers]
        joined.register_parameter("bias", nn.Parameter(torch.cat(biases), requires_grad=False))
    return joined.train(first.training)

"""Load a case's weights and activations from files, onto the case's device."""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.checkpoint.loading import read_experts, read_quantized, read_tensor
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weight_source import TensorSource, WeightSource
from fpxbench.numbers.weight import QuantizedWeight


def stored_weight(source: WeightSource, layout: str, device: str) -> QuantizedWeight:
    """Return a layer's own codes and scales in an implementation's `layout`.

    Raise CheckpointError for a missing layer, and for one with NaN or infinity, whose products cannot be checked.
    """
    return _usable(read_quantized(source), source, layout, device)


def stored_experts(source: WeightSource, layout: str, device: str) -> list[QuantizedWeight]:
    """Return the weights of all experts of a layer, each as `stored_weight` returns it."""
    return [_usable(weight, source.model_copy(update={"expert": expert}), layout, device)
            for expert, weight in enumerate(read_experts(source))]


def _usable(weight: QuantizedWeight, source: WeightSource, layout: str, device: str) -> QuantizedWeight:
    bad = int((~torch.isfinite(weight.dequantize())).sum())
    if bad:
        total = weight.shape[0] * weight.shape[1]
        raise CheckpointError(f"{source}: {bad} of {total} weights decode to NaN or infinity")
    return weight.relayout(layout).to(device)


def weight(source: WeightSource, device: str) -> Tensor:
    """Return an unquantized weight, fp32 [N, K]. Raise CheckpointError if it is missing, or not finite."""
    return read_tensor(source).to(device)


def activations(source: TensorSource, device: str) -> Tensor:
    """Return the rows of a tensor [..., K], fp32 [R, K]. Raise CheckpointError if it is missing, or not finite."""
    values = read_tensor(source)
    return values.reshape(-1, values.shape[-1]).to(device)

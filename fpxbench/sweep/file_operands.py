"""What a case multiplies where a file holds it, on the case's device."""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.checkpoint.loading import read_experts, read_quantized, read_tensor
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weight_source import TensorSource, WeightSource
from fpxbench.numbers.weight import QuantizedWeight


def stored_weight(source: WeightSource, layout: str, device: str) -> QuantizedWeight:
    """Return a layer's own codes and scales in an implementation's `layout`.

    Raises CheckpointError for a layer that is gone, and for one with weights that are no numbers: no product with it
    can be judged.
    """
    return _usable(read_quantized(source), source, layout, device)


def stored_experts(source: WeightSource, layout: str, device: str) -> list[QuantizedWeight]:
    """Return the weights of all experts of a layer as `stored_weight` does."""
    return [_usable(weight, source.model_copy(update={"expert": expert}), layout, device)
            for expert, weight in enumerate(read_experts(source))]


def _usable(weight: QuantizedWeight, source: WeightSource, layout: str, device: str) -> QuantizedWeight:
    bad = int((~torch.isfinite(weight.dequantize())).sum())
    if bad:
        total = weight.shape[0] * weight.shape[1]
        raise CheckpointError(f"{source}: {bad} of {total} weights decode to NaN or infinity")
    return weight.relayout(layout).to(device)


def weight(source: WeightSource, device: str) -> Tensor:
    """Return an unquantized weight, fp32 [N, K]. Raises CheckpointError if it is gone, or not finite."""
    return read_tensor(source).to(device)


def activations(source: TensorSource, device: str) -> Tensor:
    """Return the rows of a tensor [..., K], fp32 [R, K]. Raises CheckpointError if it is gone, or not finite."""
    values = read_tensor(source)
    return values.reshape(-1, values.shape[-1]).to(device)

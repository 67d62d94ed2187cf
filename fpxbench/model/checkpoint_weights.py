"""Load the weights of a quantized checkpoint into a model, with codes and scales as the file stores them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpxbench.checkpoint.checkpoint_folder import Checkpoint, open_checkpoint
from fpxbench.checkpoint.layers import QuantizedLayer, quantized_layers
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weights import read_plain, read_weight
from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.generate_messages import AUTO
from fpxbench.model.operator import resolve
from fpxbench.model.quantize_model import Quantization, Replaced


def load_quantized_(model: nn.Module, path: str | Path, implementation: str = AUTO) -> Quantization:
    """Load a checkpoint's weights into `model`: quantized ones as `FloatTensor`s, the rest as plain tensors.

    Codes and scales keep their values; codes are repacked into the layout that `implementation` reads. A layer that
    does not fit is left unchanged, with the reason. Experts are left too: checkpoints store them one by one or stacked,
    and only the model's own loader knows which.

    Raise CheckpointError if the path holds no checkpoint, and ValueError if no quantized layer of the file fits.
    """
    checkpoint, done = open_checkpoint(path), Quantization()
    modules, used = dict(model.named_modules()), set()
    for layer in quantized_layers(checkpoint):
        used |= {tensor.name for tensor in layer.tensors.values()}
        module = modules.get(layer.name)
        reason = _reason_to_leave(layer, module)
        if not reason and isinstance(module, nn.Linear):
            try:
                done.replaced.append(_replaced(layer, module, implementation))
                continue
            except (CheckpointError, ValueError) as error:
                reason = str(error)
        done.left[f"{layer.name}.weight"] = reason
    if not done.replaced:
        raise ValueError(f"no quantized layer of {path} fits {type(model).__name__}: " + (
            "; ".join(f"{name}: {reason}" for name, reason in list(done.left.items())[:5]) or "the file has none"))
    _copy_plain(model, checkpoint, used, done)
    return done


def _reason_to_leave(layer: QuantizedLayer, module: nn.Module | None) -> str:
    if layer.experts > 1:
        return f"holds {layer.experts} experts"
    if not isinstance(module, nn.Linear):
        return "the model has " + (
            "no module of that name" if module is None else f"a {type(module).__name__} of that name, not an nn.Linear")
    due = tuple(module.weight.shape)
    return "" if due == (layer.n, layer.k) else f"is [{layer.n}, {layer.k}] in the file and {list(due)} in the model"


def _replaced(layer: QuantizedLayer, module: nn.Linear, implementation: str) -> Replaced:
    weight, old = read_weight(layer).to(module.weight.device), module.weight
    name, cls = resolve(implementation, weight.scheme, old.device.type)
    dtype = old.dtype if old.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    if weight.scales is not None and weight.scales.dtype in (torch.bfloat16, torch.float16):
        weight = replace(weight, scales=weight.scales.float())      # what kernels read
    stored = cls().stored(weight)
    tensor = FloatTensor.from_weight(stored, dtype, name)
    held: Any = nn.Parameter(tensor, requires_grad=False)
    module.weight = held
    held.prepare()
    return Replaced(f"{layer.name}.weight", weight.scheme.name, name, (layer.n, layer.k), 2 * layer.n * layer.k,
                    tensor.nbytes_stored, layer.k)


def _copy_plain(model: nn.Module, checkpoint: Checkpoint, used: set[str], done: Quantization) -> None:
    """Copy unquantized tensors of the checkpoint to tensors of the model with the same name and shape."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, entry in checkpoint.tensors.items():
        target = state.get(name)
        if name in used:
            continue
        if target is None or tuple(target.shape) != tuple(entry.shape) or isinstance(target.data, FloatTensor):
            done.left[name] = "the model has no tensor of that name and shape"
            continue
        with torch.no_grad():
            target.copy_(read_plain(entry).reshape(target.shape))

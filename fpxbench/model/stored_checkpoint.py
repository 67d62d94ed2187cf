"""Load a folder of already quantized weights into a model, as its own codes or decoded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import nn

from fpxbench.checkpoint.checkpoint_folder import open_checkpoint
from fpxbench.checkpoint.layers import quantized_layers
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.model.checkpoint_weights import load_quantized_
from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.quantize_model import Quantization


def stored_schemes(folder: Path) -> dict[str, int]:
    """Return scheme -> number of quantized layers in a folder's files, most first; {} if none is quantized."""
    try:
        layers = quantized_layers(open_checkpoint(folder))
    except (CheckpointError, OSError):      # no safetensors in it: left to transformers
        return {}
    return dict(Counter(layer.scheme for layer in layers if layer.scheme is not None).most_common())


def load_stored_(model: nn.Module, folder: Path, implementation: str, *, partly: bool = False) -> Quantization:
    """Fill `model` from a quantized folder: codes as `FloatTensor`s, the rest as plain tensors.

    Raise ValueError if the files do not fill every weight of the model, unless `partly` says that it already has
    values; and as `load_quantized_` does.
    """
    if not partly:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))       # marks what is not filled
    done = load_quantized_(model, folder, implementation)
    empty = [name for name, parameter in model.named_parameters()
             if not isinstance(parameter.data, FloatTensor) and bool(parameter.flatten()[:1].isnan().any())]
    if empty:
        reasons = [f"{name} ({done.left.get(name, 'not in the file')})" for name in empty[:3]]
        raise ValueError(f"{len(empty)} weights of the model are missing from {folder.name}: {', '.join(reasons)}")
    return done


def decode_(model: nn.Module) -> None:
    """Replace every `FloatTensor` of `model` by its decoded numbers, in 16 bits."""
    for module in list(model.modules()):
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter.data, FloatTensor):
                setattr(module, attribute, nn.Parameter(parameter.data.dequantize(), requires_grad=False))

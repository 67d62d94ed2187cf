"""Layers of a file as weights in memory: `load_checkpoint`, and what a case is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fpxbench.checkpoint.checkpoint_folder import open_checkpoint
from fpxbench.checkpoint.layers import QuantizedLayer, quantized_layers
from fpxbench.checkpoint.tensor_entry import CheckpointError, TensorEntry
from fpxbench.checkpoint.weight_source import TensorSource, WeightSource
from fpxbench.checkpoint.weights import read_plain, read_weight
from fpxbench.numbers.weight import QuantizedWeight


class CheckpointWeights(Mapping[str, QuantizedWeight]):
    """The quantized layers of a checkpoint by name, each read when it is looked up.

    Experts of one layer are ``name[0]``, ``name[1]``, … . `problems` has a sentence for each thing that is wrong; a
    layer that cannot be read appears only there.
    """

    def __init__(self, path: str | Path) -> None:
        checkpoint = open_checkpoint(path)
        self.path = Path(path)
        self.problems = list(checkpoint.problems)
        self._layers: dict[str, tuple[QuantizedLayer, int]] = {}
        for layer in quantized_layers(checkpoint):
            self.problems += layer.problems
            if layer.scheme is None or layer.problems:
                continue
            for expert in range(layer.experts):
                self._layers[layer.name if layer.experts == 1 else f"{layer.name}[{expert}]"] = layer, expert

    def __getitem__(self, name: str) -> QuantizedWeight:
        layer, expert = self._layers[name]
        return read_weight(layer, expert)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def load_checkpoint(path: str | Path) -> CheckpointWeights:
    """Open a safetensors or GGUF file, or a folder of them: a mapping from its quantized layers to `QuantizedWeight`.

    Only headers are read; a layer's codes and scales are read, unchanged, when it is looked up. Raises CheckpointError
    (a ValueError) if there is no tensor to list.
    """
    return CheckpointWeights(path)


def read_quantized(source: WeightSource) -> QuantizedWeight:
    """Return a quantized layer with the file's codes and scales. Raises CheckpointError if it is gone."""
    return read_weight(_layer(source), source.expert)


def read_experts(source: WeightSource) -> list[QuantizedWeight]:
    """Return the weights of all experts of a layer. Raises CheckpointError as `read_quantized` does."""
    layer = _layer(source)
    return [read_weight(layer, expert) for expert in range(layer.experts)]


def _layer(source: WeightSource) -> QuantizedLayer:
    for layer in quantized_layers(open_checkpoint(source.path)):
        if layer.name == source.name:
            return layer
    raise CheckpointError(f"{source.path}: no quantized layer {source.name!r} any more")


def read_tensor(source: WeightSource | TensorSource) -> Tensor:
    """Return an unquantized tensor, fp32. Raises CheckpointError if it is gone, or not finite."""
    entry: TensorEntry | None = open_checkpoint(source.path).tensors.get(source.name)
    if entry is None:
        raise CheckpointError(f"{source.path}: no tensor {source.name!r} any more")
    values = read_plain(entry)
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(f"{source.path}: {source.name} holds {int((~values.isfinite()).sum())} numbers that are "
                              "NaN or infinite")
    return values

"""Write chosen layers of a checkpoint to a safetensors file: in another dialect, or decoded."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import torch
from pydantic import BaseModel
from safetensors.torch import save_file

from fpxbench.checkpoint.checkpoint_folder import open_checkpoint
from fpxbench.checkpoint.dialect_conversion import convert
from fpxbench.checkpoint.layers import QuantizedLayer, quantized_layers
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weights import read_numbers


class WriteRequest(BaseModel):
    path: str
    layers: list[str] = []
    """Globs over layers' names; none: all."""
    dialect: str | None = None
    """None: decoded, as fp32."""
    nearest: bool = False
    """If a reciprocal is not an fp32 number: use the nearest one instead of refusing."""
    output: str


class Written(BaseModel):
    written: int
    refusals: list[str]


def write(request: WriteRequest) -> Written:
    """Write the layers that can be written. Raises CheckpointError if no layer is selected."""
    layers = [layer for layer in quantized_layers(open_checkpoint(request.path))
              if not request.layers or any(fnmatchcase(layer.name, glob) for glob in request.layers)]
    if not layers:
        raise CheckpointError(
            f"{request.path}: no quantized layer" + (f" matches {', '.join(request.layers)}" if request.layers else "")
        )
    output = Path(request.output)
    if request.dialect is None:
        return _decoded(layers, output)
    written, refusals = convert(layers, request.dialect, output, nearest=request.nearest)
    return Written(written=written, refusals=refusals)


def _decoded(layers: list[QuantizedLayer], output: Path) -> Written:
    tensors, refusals = {}, []
    for layer in layers:
        try:
            weights = [read_numbers(layer, expert) for expert in range(layer.experts)]
        except CheckpointError as error:
            refusals.append(str(error))
            continue
        tensors[f"{layer.name}.weight"] = weights[0] if layer.experts == 1 else torch.stack(weights)
    if tensors:
        save_file(tensors, output)
    return Written(written=len(tensors), refusals=refusals)

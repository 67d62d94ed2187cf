"""Save and load FloatTensors as safetensors: codes by rows, scales, and the tensors' context as JSON metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpxbench.model.float_tensor.subclass import FloatTensor

KEY = "fpxbench.float_tensors"
"""Metadata key: JSON of tensor name -> `FloatTensor.context`."""


def flattened(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the plain tensors and metadata that store a state dict; a FloatTensor becomes ``NAME.packed``,
    ``NAME.scales``, … Raise ValueError if a part would have the name of another tensor."""
    plain: dict[str, Tensor] = {}
    contexts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        inner = tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor
        parts = {name: tensor.detach()}
        if isinstance(inner, FloatTensor):
            inner = inner.portable()        # the file must not depend on the device it was written from
            parts = {f"{name}.{part}": values for part, values in inner._parts().items()}
            contexts[name] = inner.context() | {"dtype": str(inner.dtype).removeprefix("torch.")}
        for part, values in parts.items():
            if part in plain:
                raise ValueError(f"two tensors would be called {part!r} in the file; rename {name!r}")
            plain[part] = values.contiguous()
    return plain, {KEY: json.dumps(contexts)}


def unflattened(plain: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the state dict that `flattened` was given. Raise ValueError if the metadata or a part is missing."""
    if KEY not in metadata:
        raise ValueError(f"the file's metadata has no {KEY!r}: it was not written by save_file")
    contexts, found = json.loads(metadata[KEY]), dict(plain)
    for name, context in contexts.items():
        parts = {part: found.pop(f"{name}.{part}", None) for part in ("packed", "scales", "tensor_scale")}
        if parts["packed"] is None or parts["scales"] is None:
            raise ValueError(f"the file lacks {name}.packed or {name}.scales")
        context |= {"dtype": getattr(torch, context["dtype"]), "shape": tuple(context["shape"])}
        found[name] = FloatTensor(parts["packed"], parts["scales"], parts["tensor_scale"], **context)
    return found


def save_file(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a state dict to a safetensors file, codes packed. Raise ValueError as `flattened` does."""
    from safetensors.torch import save_file as save

    plain, metadata = flattened(tensors)
    save(plain, str(path), metadata=metadata)


def load_file(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """Return the state dict that `save_file` wrote. Raise ValueError for another file."""
    from safetensors import safe_open
    from safetensors.torch import load_file as load

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    return unflattened(load(str(path), device=device), metadata)

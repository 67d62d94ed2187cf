"""Layers that inference engines fuse share an input, and for NVFP4 and static activations also a scale."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from fpxbench.checkpoint.layers import QuantizedLayer
from fpxbench.checkpoint.tensor_entry import CheckpointError, TensorEntry

_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))
_PARTS = {part: group for group in _FUSED for part in group}


def disagreements(layers: list[QuantizedLayer]) -> list[str]:
    """Return a sentence for each fused group whose parts have different second-level or activation scales."""
    groups: dict[tuple[str, tuple[str, ...]], list[QuantizedLayer]] = defaultdict(list)
    for layer in layers:
        prefix, _, last = layer.name.rpartition(".")
        if last in _PARTS:
            groups[prefix, _PARTS[last]].append(layer)
    problems = []
    for (prefix, _), parts in groups.items():
        for what in ("global_scale", "activation_scale"):
            values = [_number(getattr(part, what)) for part in parts]
            if len(parts) > 1 and None not in values and len(set(values)) > 1:
                names = ", ".join(
                    f"{part.name.rpartition('.')[2]} {value:.4g}" for part, value in zip(parts, values, strict=True)
                )
                problems.append(f"{prefix}: {what.replace('_', ' ')}s of layers that are fused differ: {names}")
    return problems


def _number(entry: TensorEntry | None) -> float | None:
    if entry is None or entry.elements != 1:
        return None
    try:
        return float(np.asarray(entry.numbers(), np.float64).reshape(-1)[0])
    except CheckpointError:
        return None

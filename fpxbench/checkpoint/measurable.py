"""The layers of a file that can be measured, with their workloads. Reads headers only, and imports no torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fpxbench.checkpoint.checkpoint_folder import Checkpoint, open_checkpoint
from fpxbench.checkpoint.layers import QuantizedLayer, quantized_layers
from fpxbench.checkpoint.tensor_entry import FLOATS, CheckpointError, TensorEntry
from fpxbench.checkpoint.weight_source import TensorSource, WeightSource
from fpxbench.did_you_mean import did_you_mean
from fpxbench.workloads import FROM_CHECKPOINT, FROM_FILE

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk", "moe_top_k")
_MOST_UNNAMED = 8
_LONGEST_NAME = 56
_SAMPLED_BYTES = 1 << 16


@dataclass(frozen=True)
class MeasurableLayer:
    """A layer as cases name it: workload, N, K, and the scheme of its codes (None: not quantized yet)."""

    workload: str
    n: int
    k: int
    scheme: str | None
    source: WeightSource
    experts: int = 1
    experts_per_token: int = 1


def checkpoint_layers(path: Path, globs: Iterable[str] = ()) -> list[MeasurableLayer]:
    """Return the quantized layers that `globs` select; without globs one layer of each scheme and shape.

    The experts of a layer [E, N, K] are one workload, a grouped product. Raises CheckpointError if no layer is
    selected.
    """
    checkpoint = open_checkpoint(path)
    globs, found = list(globs), quantized_layers(checkpoint)
    usable = [layer for layer in found if layer.scheme and not layer.problems]
    if not usable:
        reasons = [problem for layer in found for problem in layer.problems]
        raise CheckpointError(f"{path}: no quantized layer that can be read" + (f": {reasons[0]}" if reasons else ""))
    if not globs:
        firsts = {(layer.scheme, layer.n, layer.k, layer.experts): layer for layer in reversed(usable)}
        chosen = list(firsts.values())[::-1]
    for glob in globs:
        if not any(fnmatchcase(layer.name, glob) for layer in usable):
            known = [layer.name for layer in usable]
            hint = did_you_mean(glob, known, f"`fpxbench checkpoint {path}` shows them; the first is {known[0]}")
            raise CheckpointError(f"{path}: no quantized layer {glob!r}; {hint}")
    if globs:
        chosen = [layer for layer in usable if any(fnmatchcase(layer.name, glob) for glob in globs)]
    per_token = _experts_per_token(checkpoint)
    return [_of_layer(path, layer, per_token) for layer in chosen]


def file_weights(given: str) -> list[MeasurableLayer]:
    """Return the unquantized matrices of ``FILE`` or ``FILE:NAME``, NAME a glob.

    Raises CheckpointError where there is none, and where a file without NAME holds more than a few.
    """
    path, glob = split_name(given)
    entries = open_checkpoint(path).tensors
    matrices = [entry for entry in entries.values() if entry.dtype in FLOATS and len(entry.shape) == 2]
    chosen = [entry for entry in matrices if fnmatchcase(entry.name, glob or "*")]
    if not chosen:
        known = [entry.name for entry in matrices]
        hint = did_you_mean(glob, known, f"it holds {', '.join(known[:5]) or 'none'}")
        raise CheckpointError(f"{path}: no matrix of floating-point numbers{f' {glob!r}' if glob else ''}; {hint}")
    if not glob and len(chosen) > _MOST_UNNAMED:
        raise CheckpointError(f"{path} holds {len(chosen)} matrices: name one, or several by glob, as in "
                              f"{path}:{chosen[0].name}")
    return [MeasurableLayer(_workload(FROM_FILE, entry.name.removesuffix(".weight"), [entry]), entry.shape[0],
                            entry.shape[1], None,
                            WeightSource(path=str(path.absolute()), name=entry.name, quantized=False))
            for entry in chosen]


def file_activations(given: str) -> tuple[TensorSource, int]:
    """Return which tensor of ``FILE`` or ``FILE:NAME`` holds activations, and its K.

    Raises CheckpointError unless it is one tensor ``[..., K]`` of floating-point numbers.
    """
    path, glob = split_name(given)
    tensors = [entry for entry in open_checkpoint(path).tensors.values()
               if entry.dtype in FLOATS and len(entry.shape) >= 2 and fnmatchcase(entry.name, glob or "*")]
    if len(tensors) != 1:
        names = ", ".join(entry.name for entry in tensors[:5])
        raise CheckpointError(f"{path}: activations are one tensor [..., K] of floating-point numbers, as in FILE:NAME;"
                              f" {f'{len(tensors)} fit: {names}' if tensors else 'none fits'}")
    source = TensorSource(path=str(path.absolute()), name=tensors[0].name, digest=_digest(tensors))
    return source, tensors[0].shape[-1]


def split_name(given: str) -> tuple[Path, str]:
    """Return the path and the name of ``PATH[:NAME]``; the name is empty where none is given."""
    if Path(given).exists():
        return Path(given), ""
    path, colon, name = given.rpartition(":")
    return (Path(path), name) if colon else (Path(given), "")


def _of_layer(path: Path, layer: QuantizedLayer, per_token: int) -> MeasurableLayer:
    source = WeightSource(path=str(path.absolute()), name=layer.name)
    return MeasurableLayer(
        _workload(FROM_CHECKPOINT, layer.name, layer.tensors.values()), layer.n, layer.k, layer.scheme, source,
        layer.experts, min(per_token, layer.experts)
    )


def _experts_per_token(checkpoint: Checkpoint) -> int:
    """Return the number of experts per token from the config; 1 if it does not say."""
    text = checkpoint.config.get("text_config")
    places = [checkpoint.config, text if isinstance(text, dict) else {}, checkpoint.metadata]
    counts = [place[key] for place in places for key in place
              if key in _EXPERTS_PER_TOKEN or key.endswith(".expert_used_count")]
    return next((count for count in counts if type(count) is int and count > 0), 1)


def _workload(prefix: str, name: str, entries: Iterable[TensorEntry]) -> str:
    """Return a workload's name that is valid in ids and unique to the weight: it ends with a digest of shapes and
    contents."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    if len(safe) > _LONGEST_NAME:
        safe = "-" + safe[1 - _LONGEST_NAME:]
    return f"{prefix}{safe}.{_digest(entries)[:6]}"


def _digest(entries: Iterable[TensorEntry]) -> str:
    digest = hashlib.sha256()
    for part in _sampled(entries):
        digest.update(part)
    return digest.hexdigest()[:16]


def _sampled(entries: Iterable[TensorEntry]) -> Iterator[bytes]:
    """Yield shape, dtype, and the first and the last bytes of each tensor: enough to distinguish weights of any
    size."""
    for entry in entries:
        yield f"{entry.dtype} {entry.shape}".encode()
        count = min(entry.nbytes, _SAMPLED_BYTES)
        yield entry.raw(0, count).tobytes()
        yield entry.raw(entry.nbytes - count, count).tobytes()

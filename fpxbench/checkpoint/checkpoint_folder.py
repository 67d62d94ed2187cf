"""Open a checkpoint: a safetensors or GGUF file, or a folder of shards with its index and config.json.

Reads headers only. A fault in one file becomes a message, and the other files are still listed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from fpxbench.checkpoint import gguf_header, safetensors_header
from fpxbench.checkpoint.tensor_entry import CheckpointError, TensorEntry
from fpxbench.counted import counted

_INDEX = "*.safetensors.index.json"
_CONFIGS = ("config.json", "hf_quant_config.json")
_MOST_JSON_BYTES = 1 << 26
_TENSORS = (".safetensors", ".gguf")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass
class Checkpoint:
    """The headers of a checkpoint.

    Parameters
    ----------
    path : the file or folder
    files : its files of tensors, in order
    tensors : by name
    config : config.json, with hf_quant_config.json's ``quantization`` under that key; empty if there is none
    metadata : of the files' headers (safetensors ``__metadata__``, GGUF key-value pairs)
    problems : one sentence for each thing that is wrong
    """

    path: Path
    files: list[Path] = field(default_factory=list)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read the headers under `path`. Raises CheckpointError with the reason if there is no tensor to list."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    checkpoint = Checkpoint(path)
    index = _read_folder(checkpoint) if path.is_dir() else {}
    if not path.is_dir():
        checkpoint.files = [path]
    for file in checkpoint.files:
        try:
            entries, metadata, problems = _header_reader(file)(file)
        except (CheckpointError, OSError) as error:
            checkpoint.problems.append(f"{file.name}: {error.strerror}" if isinstance(error, OSError) else str(error))
            continue
        checkpoint.problems += problems
        checkpoint.metadata |= metadata
        for entry in entries:
            if entry.name in checkpoint.tensors:
                first = checkpoint.tensors[entry.name].file.name
                checkpoint.problems.append(f"{entry.name!r} is in {first} and in {file.name}; the first is used")
            checkpoint.tensors.setdefault(entry.name, entry)
    _compare_with_index(checkpoint, index)
    if not checkpoint.tensors:
        raise CheckpointError("; ".join(checkpoint.problems[:5]) or f"{path}: contains no safetensors or GGUF file")
    return checkpoint


def _header_reader(file: Path):
    with open(file, "rb") as stream:
        magic = stream.read(4)
    return gguf_header.read_header if magic == b"GGUF" else safetensors_header.read_header


def _read_folder(checkpoint: Checkpoint) -> dict[str, str]:
    """Fill in the files and the config of a folder; return the index's tensor -> file, empty without an index."""
    folder, problems = checkpoint.path, checkpoint.problems
    for name in _CONFIGS:
        described = _json(folder / name, problems) if (folder / name).exists() else {}
        checkpoint.config |= described if name == "config.json" else {"hf_quant_config": described}
    index: dict[str, str] = {}
    for file in sorted(folder.glob(_INDEX)):
        weight_map = _json(file, problems).get("weight_map", {})
        if not isinstance(weight_map, dict):
            problems.append(f"{file.name}: weight_map is not an object; ignored")
            continue
        index |= {str(tensor): str(shard) for tensor, shard in weight_map.items()}
    names = {file.name for file in folder.iterdir() if file.suffix in _TENSORS}
    for shard in sorted(set(index.values()) - names):
        reason = "is a path and not a file of the folder" if "/" in shard or "\\" in shard else "is not in the folder"
        problems.append(f"the index names {shard[:200]!r}, which {reason}")
    checkpoint.files = [folder / name for name in sorted(names) if _inside(folder / name, folder, problems)]
    pickles = sum(file.suffix in _PICKLES for file in folder.iterdir())
    if pickles:
        problems.append(f"{counted(pickles, 'file')} of Python pickles ({', '.join(_PICKLES)}) not opened: "
                        f"pickles can run code")
    return index


def _inside(file: Path, folder: Path, problems: list[str]) -> bool:
    """Return whether a file lies in the folder, links followed. A hub cache's links into its own ``blobs`` count as
    inside."""
    target, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if target.is_relative_to(home) or target.is_relative_to(blobs):
        return True
    problems.append(f"{file.name} is a link out of the folder, to {target}; it is not followed")
    return False


def _json(file: Path, problems: list[str]) -> dict[str, object]:
    try:
        if file.stat().st_size > _MOST_JSON_BYTES:
            problems.append(f"{file.name}: over {_MOST_JSON_BYTES >> 20} MiB; not read")
            return {}
        found = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{file.name}: not valid JSON ({str(error)[:200]})")
        return {}
    if isinstance(found, dict):
        return found
    problems.append(f"{file.name}: a JSON {type(found).__name__}, not an object")
    return {}


def _compare_with_index(checkpoint: Checkpoint, index: dict[str, str]) -> None:
    if not index:
        return
    missing = [name for name in index if name not in checkpoint.tensors]
    extra = [name for name in checkpoint.tensors if name not in index]
    for names, what in ((missing, "are in the index but in no file"), (extra, "are in a file but not in the index")):
        if names:
            checkpoint.problems.append(f"{len(names)} tensors {what}; the first is {names[0][:200]!r}")

"""Read the header of a safetensors file: nothing is mapped, nothing is unpickled, every size and offset is checked.

The format: 8 bytes, little-endian, the header's length; that many bytes of JSON; the tensors' bytes. The safetensors
library refuses a file as a whole; here each valid tensor is listed, and each invalid one becomes a message.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

from fpxbench.checkpoint.tensor_entry import ITEM_BITS, CheckpointError, TensorEntry
from fpxbench.counted import counted

MOST_HEADER_BYTES = 1 << 28
"""256 MiB: a million tensors take about half of it. The library's own limit is 100 MB."""
_MOST_NAME = 1024
_MOST_DIMENSIONS = 16
_SHOWN = 5


def read_header(file: Path) -> tuple[list[TensorEntry], dict[str, str], list[str]]:
    """Return the tensors of a safetensors `file`, its metadata, and a message for each thing that is wrong with it.

    Raises CheckpointError if nothing of it can be used: it is not a safetensors file, or its header is cut short.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if len(first) < 8:
            raise CheckpointError(f"{file.name}: {size} bytes, too short for a safetensors file")
        if length > size - 8:
            raise CheckpointError(f"{file.name}: its header claims {length} bytes and the file has {size - 8}: "
                                  "it is cut short, or not a safetensors file")
        if length > MOST_HEADER_BYTES:
            raise CheckpointError(f"{file.name}: its header of {length} bytes is over the limit of {MOST_HEADER_BYTES}")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: its header is not JSON ({str(error)[:200]})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file.name}: its header is a JSON {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", {})
    entries, problems = [], []
    for name, described in header.items():
        try:
            entries.append(_entry(name, described, file, 8 + length, size))
        except CheckpointError as error:
            problems.append(str(error))
    sound, overlapping = _without_overlaps(entries)
    problems += overlapping
    if not isinstance(metadata, dict):
        problems.append(f"{file.name}: __metadata__ is not an object; ignored")
        metadata = {}
    return sound, {str(key): str(value) for key, value in metadata.items()}, _summarized(file, problems)


def _entry(name: str, described: object, file: Path, data: int, size: int) -> TensorEntry:
    where = f"{file.name}: {name[:_MOST_NAME]!r}"
    if not isinstance(described, dict) or len(name) > _MOST_NAME:
        raise CheckpointError(f"{where} is not described as a tensor")
    dtype, shape, offsets = (described.get(key) for key in ("dtype", "shape", "data_offsets"))
    if dtype not in ITEM_BITS:
        raise CheckpointError(f"{where} has dtype {str(dtype)[:40]!r}, which safetensors does not define")
    if not (isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS and
            all(type(side) is int and 0 <= side < 1 << 48 for side in shape)):
        raise CheckpointError(f"{where} has shape {str(shape)[:80]}, which no tensor can have")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(place) is int for place in offsets)):
        raise CheckpointError(f"{where} has data_offsets {str(offsets)[:80]}, where two integers belong")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise CheckpointError(f"{where} has data_offsets {offsets}, which run backwards")
    if data + end > size:
        raise CheckpointError(f"{where} lies at bytes {begin} to {end} of {max(size - data, 0)}: the file is cut short")
    needed = -(-prod(shape) * ITEM_BITS[dtype] // 8)
    if end - begin != needed:
        raise CheckpointError(f"{where} has {end - begin} bytes, and {dtype} {shape} takes {needed}")
    return TensorEntry(name, dtype, tuple(shape), file, data + begin, data + end)


def _without_overlaps(entries: list[TensorEntry]) -> tuple[list[TensorEntry], list[str]]:
    sound: list[TensorEntry] = []
    problems = []
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if sound and entry.nbytes and entry.begin < sound[-1].end:
            problems.append(f"{entry.file.name}: {entry.name!r} overlaps {sound[-1].name!r} in the file")
        else:
            sound.append(entry)
    return sound, problems


def _summarized(file: Path, problems: list[str]) -> list[str]:
    """Return at most `_SHOWN` messages and a count: a hostile header can hold a million."""
    if len(problems) <= _SHOWN:
        return problems
    return [*problems[:_SHOWN], f"{file.name}: {counted(len(problems) - _SHOWN, 'more tensor')} like these"]

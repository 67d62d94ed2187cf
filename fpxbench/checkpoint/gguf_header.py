"""Read the header of a GGUF file: metadata and tensors, with every count and offset checked.

Versions 2 and 3, little-endian. Source: the GGUF specification (ggml-org/ggml docs/gguf.md).
"""

from __future__ import annotations

import struct
from io import BufferedReader
from math import prod
from pathlib import Path

from fpxbench.checkpoint.tensor_entry import CheckpointError, TensorEntry

BLOCK_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
"""GGUF type number -> name, elements per block, bytes per block."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MOST_STRING = 1 << 24
_MOST_COUNT = 1 << 24
_KEPT_ARRAY = 64
"""Elements of a metadata array that are kept: nothing here needs a tokenizer's vocabulary."""


def read_header(file: Path) -> tuple[list[TensorEntry], dict[str, object], list[str]]:
    """Return the tensors of a GGUF `file`, its metadata (64 elements of each array), and a message for each fault.

    Raises CheckpointError if it is not a GGUF file or its header is cut short or impossible.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        reader = _HeaderReader(stream, file.name)
        if stream.read(4) != b"GGUF":
            raise CheckpointError(f"{file.name}: not a GGUF file: it does not begin with GGUF")
        version = reader.scalar("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{file.name}: GGUF version {version}; only versions 2 and 3 are supported")
        count, pairs = reader.count("tensors"), reader.count("metadata entries")
        metadata: dict[str, object] = {}
        for _ in range(pairs):
            key = reader.string()
            metadata[key] = reader.value(reader.scalar("<I"))
        described = [_described(reader) for _ in range(count)]
        end_of_header = stream.tell()
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
        raise CheckpointError(f"{file.name}: general.alignment is {alignment!r}, not a number from 1 to {1 << 20}")
    data = -(-end_of_header // alignment) * alignment
    entries, problems = [], []
    for name, shape, number, offset in described:
        try:
            entries.append(_entry(name, shape, number, data + offset, file, size))
        except CheckpointError as error:
            problems.append(str(error))
    return entries, metadata, problems


class _HeaderReader:
    def __init__(self, stream: BufferedReader, name: str) -> None:
        self._stream, self._name = stream, name

    def bytes(self, count: int) -> bytes:
        read = self._stream.read(count)
        if len(read) < count:
            raise CheckpointError(f"{self._name}: its header is cut short")
        return read

    def scalar(self, code: str) -> int:
        return struct.unpack(code, self.bytes(struct.calcsize(code)))[0]

    def count(self, what: str) -> int:
        number = self.scalar("<Q")
        if number > _MOST_COUNT:
            raise CheckpointError(f"{self._name}: claims {number} {what}")
        return number

    def string(self) -> str:
        length = self.scalar("<Q")
        if length > _MOST_STRING:
            raise CheckpointError(f"{self._name}: claims a string of {length} bytes")
        return self.bytes(length).decode(errors="replace")

    def value(self, kind: int, depth: int = 0) -> object:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            if depth > 4:
                raise CheckpointError(f"{self._name}: metadata arrays are nested more than 4 deep")
            of, length = self.scalar("<I"), self.count("elements of a metadata array")
            kept = []
            for index in range(length):
                element = self.value(of, depth + 1)
                if index < _KEPT_ARRAY:
                    kept.append(element)
            return kept
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._name}: metadata of unknown type {kind}")
        return self.scalar(_SCALARS[kind])


def _described(reader: _HeaderReader) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = reader.string(), reader.scalar("<I")
    if dimensions > 8:
        raise CheckpointError(f"tensor {name[:200]!r} claims {dimensions} dimensions")
    shape = tuple(reader.scalar("<Q") for _ in range(dimensions))
    return name, shape[::-1], reader.scalar("<I"), reader.scalar("<Q")     # GGUF lists the innermost dimension first


def _entry(name: str, shape: tuple[int, ...], number: int, begin: int, file: Path, size: int) -> TensorEntry:
    where = f"{file.name}: {name[:200]!r}"
    if number not in BLOCK_TYPES:
        raise CheckpointError(f"{where} has the unknown type {number}")
    dtype, elements, nbytes = BLOCK_TYPES[number]
    if shape and shape[-1] % elements:
        raise CheckpointError(f"{where} has rows of {shape[-1]}, not a multiple of {dtype}'s block of {elements}")
    end = begin + prod(shape) // elements * nbytes
    if end > size:
        raise CheckpointError(f"{where} ends at byte {end} of {size}: the file is cut short")
    return TensorEntry(name, dtype, shape, file, begin, end)

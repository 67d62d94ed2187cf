"""A tensor of a checkpoint as its file's header lists it, read only when asked for."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E5M2": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}
"""Bits of an element, by the names that safetensors gives to dtypes (safetensors 0.6)."""

_NUMPY = {
    "F64": "<f8", "I64": "<i8", "U64": "<u8", "F32": "<f4", "I32": "<i4", "U32": "<u4",
    "F16": "<f2", "I16": "<i2", "U16": "<u2", "I8": "i1", "BOOL": "u1",
}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class CheckpointError(ValueError):
    """A checkpoint does not have what was requested of it; the message gives the file and the reason."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor's place in a file.

    Parameters
    ----------
    name : as the file has it
    dtype : a key of `ITEM_BITS`, or a GGUF block type's name (``Q8_0``), whose bytes are read as they are
    shape : outermost dimension first, in elements
    file : the file that holds it
    begin, end : its bytes in that file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return prod(self.shape)

    def raw(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Return bytes `first` to `first + count` of the tensor, uint8, mapped from the file and not copied.

        Raises CheckpointError if the file ends before them.
        """
        count = self.nbytes - first if count is None else count
        if first < 0 or count < 0 or first + count > self.nbytes:
            raise CheckpointError(f"{self.name}: bytes {first} to {first + count} of a tensor of {self.nbytes}")
        if not count:
            return np.empty(0, np.uint8)
        try:
            return np.memmap(self.file, np.uint8, "r", offset=self.begin + first, shape=(count,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file.name}: {self.name} cannot be read: {error}") from error

    def numbers(self) -> np.ndarray:
        """Return the tensor as numbers in its shape: bf16 widened to fp32, 8-bit float codes as uint8.

        Raises CheckpointError for dtypes whose elements are not whole bytes.
        """
        raw = self.raw()
        if self.dtype == "BF16":
            return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        if self.dtype in _NUMPY:
            return raw.view(_NUMPY[self.dtype]).reshape(self.shape)
        if ITEM_BITS.get(self.dtype) == 8:
            return raw.reshape(self.shape)
        raise CheckpointError(f"{self.name}: elements of {self.dtype} are not whole bytes; read them with raw()")

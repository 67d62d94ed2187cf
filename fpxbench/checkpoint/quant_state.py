"""The description of a flattened layer, stored beside its codes as JSON in a tensor of bytes (bitsandbytes).

Codes and scales are flat: the weight's rows one after another, a scale for each run of `block` weights. The scales may
be codes themselves: an offset was subtracted, and each `nested_block` of them share a scale.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from fpxbench.checkpoint.tensor_entry import CheckpointError, TensorEntry

_MOST_BYTES = 1 << 12
_LARGEST = 1 << 32


@dataclass(frozen=True)
class QuantState:
    """The parsed JSON. `nested_block` is 0 where the scales are numbers."""

    n: int
    k: int
    block: int
    nested_block: int = 0
    nested_offset: float = 0.0


def read_state(entry: TensorEntry) -> QuantState:
    """Parse a tensor of JSON. Raise CheckpointError if it does not describe a matrix."""
    where = f"{entry.file.name}: {entry.name}"
    if entry.dtype != "U8" or entry.nbytes > _MOST_BYTES:
        raise CheckpointError(f"{where} is {entry.dtype} {list(entry.shape)}, not a few bytes of JSON")
    try:
        found = json.loads(bytes(entry.raw()))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON ({str(error)[:120]})") from None
    shape = found.get("shape") if isinstance(found, dict) else None
    sizes = [*shape, found.get("blocksize")] if isinstance(shape, list) else []
    nested, offset = (found.get("nested_blocksize", 0), found.get("nested_offset", 0.0)) if sizes else (0, 0.0)
    if len(sizes) != 3 or not all(type(size) is int and 0 < size < _LARGEST for size in sizes) or not (
            type(nested) is int and 0 <= nested < _LARGEST and isinstance(offset, int | float)):
        raise CheckpointError(f"{where} describes no matrix: shape {str(shape)[:60]}, blocksize"
                              f" {str(found.get('blocksize') if isinstance(found, dict) else None)[:20]}")
    return QuantState(*sizes, nested_block=nested, nested_offset=float(offset))


def state_bytes(quant_type: str, n: int, k: int, block: int) -> bytes:
    """Return the JSON of a layer whose scales are numbers, as bitsandbytes writes it."""
    described = {"quant_type": quant_type, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
    return json.dumps(described).encode()

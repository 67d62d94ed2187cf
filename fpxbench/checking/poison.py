"""Fill memory with a pattern before a call, so that an output which was never written shows.

On a CPU the C library does it (glibc's M_PERTURB: every allocation is filled, by native code's own mallocs too); on a
GPU the block that the caching allocator hands out next is filled and given back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

POISON_BYTE = 0xFE
"""As bf16 -1.7e38, as fp16 a NaN: no product of random operands looks like it."""

_M_PERTURB = -6   # <malloc.h>; new memory is filled with the complement of the value, and 0 turns it off


@contextmanager
def poisoned_memory(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[None]:
    """Have new memory hold `POISON_BYTE` while this is open: all of it on a CPU, the next output of `shape` on a GPU."""
    if device == "cpu":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is None:     # not glibc
            yield
            return
        mallopt(_M_PERTURB, POISON_BYTE ^ 0xFF)
        try:
            yield
        finally:
            mallopt(_M_PERTURB, 0)
    else:
        block = torch.empty(shape, dtype=dtype, device=device)
        block.view(torch.uint8).fill_(POISON_BYTE)
        del block
        yield


def unwritten_elements(y: Tensor) -> int:
    """How many elements of a 16-bit output still hold the pattern."""
    pattern = int.from_bytes(bytes([POISON_BYTE] * 2), "little", signed=True)
    return int((y.contiguous().view(torch.int16) == pattern).sum())

"""Fill memory with a pattern before a call, so that what was never written shows.

On a CPU the C library does it (glibc's M_PERTURB: every allocation is filled, by native code's own mallocs too). On a
GPU the caching allocator's free blocks are filled: those that the next allocations are cut from.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

NAN = 0xFF
"""NaN in every dtype that has one (bf16, fp16, fp32, FP8, E8M0): it shows wherever it is multiplied, by 0 too."""
LARGE = 0x7B
"""Large and finite: 1.3e36 in bf16 and fp32, 61,296 in fp16, 352 in E4M3FN. It shows where NaN is filtered out."""
ZERO = 0x00
"""What fresh memory often holds by chance. Never checked with; for telling whether a result depends on the pattern."""
PATTERNS = (NAN, LARGE)

_M_PERTURB = -6   # <malloc.h>
_LARGEST_BLOCK = 1 << 25
_SMALLEST_BLOCK = 1 << 9    # the CUDA caching allocator's granularity


def pattern_name(pattern: int) -> str:
    """Return how messages call a pattern."""
    return {NAN: "NaN", LARGE: "large numbers", ZERO: "zeros"}[pattern]


@contextmanager
def poisoned_memory(device: str, nbytes: int, pattern: int) -> Iterator[None]:
    """Make new memory hold `pattern` while this is open: all of it on a CPU, an output of `nbytes` first on a GPU."""
    if device != "cpu":
        fill_free_blocks(device, nbytes, pattern)
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:     # not glibc
        yield
        return
    # New memory is filled with the low byte of ~value. 0 turns it off, so 0xFF is asked for by 0x100.
    mallopt(_M_PERTURB, (pattern ^ 0xFF) or 0x100)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def fill_free_blocks(device: str, nbytes: int, pattern: int) -> None:
    """Fill the blocks that a CUDA device's caching allocator hands out next: one of `nbytes`, and of each power of
    two."""
    sizes = [max(nbytes, 1)]
    size = _SMALLEST_BLOCK
    while size <= _LARGEST_BLOCK:
        sizes += [size, size]
        size *= 2
    blocks = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    for block in blocks:
        block.fill_(pattern)


def holds_pattern(y: Tensor, pattern: int) -> Tensor:
    """Return where a 16-bit output still holds the pattern, bool in its shape."""
    bits = int.from_bytes(bytes([pattern] * 2), "little", signed=True)
    return y.contiguous().view(torch.int16) == bits

"""Fill memory with a pattern before a call, so that unwritten outputs show.

On a CPU the C library does this (glibc's M_PERTURB fills every allocation, including native code's). On a GPU the
caching allocator's free blocks are filled, from which the next allocations are cut; memory newly taken from the driver
is not filled.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAN = 0xFF
"""NaN in every dtype that has one (bf16, fp16, fp32, FP8, E8M0): it shows in every product, even with 0."""
LARGE = 0x7B
"""Large and finite: 1.3e36 in bf16 and fp32, 61,296 in fp16, 352 in E4M3FN. It shows if NaN is filtered out."""
ZERO = 0x00
"""What fresh memory often holds. Not used for checks, only to find out whether a result depends on the pattern."""
PATTERNS = (NAN, LARGE)

_UNFILLED = {torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
             torch.ops.aten.new_empty_strided}
_M_PERTURB = -6   # <malloc.h>
_LARGEST_BLOCK = 1 << 25
_SMALLEST_BLOCK = 1 << 9    # the CUDA caching allocator's granularity
SMALL = 1 << 20
"""The largest allocation from its pool of small blocks, whose segments are twice as large."""


class FreeBlock(NamedTuple):
    """A free block of the caching allocator: its bytes, and whether it is in the pool of small blocks."""

    size: int
    small: bool


def pattern_name(pattern: int) -> str:
    """Return a pattern's name in messages."""
    return {NAN: "NaN", LARGE: "large numbers", ZERO: "zeros"}[pattern]


@contextmanager
def poisoned_memory(device: str, nbytes: int, pattern: int) -> Iterator[None]:
    """Fill new memory with `pattern` within the context: all of it on a CPU, free blocks, at least `nbytes`, on a GPU.
    """
    if device != "cpu":
        fill_free_blocks(device, nbytes, pattern)
        yield
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:     # not glibc
        yield
        return
    # glibc fills new memory with the low byte of ~value. 0 turns it off, so 0x100 stands for 0xFF.
    mallopt(_M_PERTURB, (pattern ^ 0xFF) or 0x100)
    try:
        yield
    finally:
        mallopt(_M_PERTURB, 0)


def filled_allocations(pattern: int) -> TorchDispatchMode:
    """Return a mode that fills each uninitialized tensor that PyTorch allocates with `pattern`.

    It also fills blocks that a call frees and reuses, which filling memory before the call cannot. Use it only to
    diagnose a wrong output: modes affect compilers.
    """
    # PyTorch asks `_should_skip_dynamo` when the class is created, so it is created when what was compiled is known.
    class FilledAllocations(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            # Skipping imports the compiler, which would take seconds for each wrong case that compiles nothing.
            return "torch._dynamo" in sys.modules

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func.overloadpacket in _UNFILLED and isinstance(made, Tensor) and made.numel():
                memory = made.untyped_storage()
                torch.empty(0, dtype=torch.uint8, device=made.device).set_(memory).fill_(pattern)
            return made

    return FilledAllocations()


def fill_free_blocks(device: str, nbytes: int, pattern: int) -> None:
    """Fill all free blocks of a CUDA device's caching allocator on this stream, after making sure that there are some
    of `nbytes` and of each power of two."""
    powers = [1 << power for power in range(_SMALLEST_BLOCK.bit_length() - 1, _LARGEST_BLOCK.bit_length())]
    sizes = [max(nbytes, 1), *powers, *powers]
    blocks = _allocated(sizes, device)
    if torch.cuda.get_allocator_backend() == "native":      # cudaMallocAsync does not report free blocks
        blocks.clear()
        blocks = _allocated(sizes_that_fill(_free_blocks(torch.cuda.memory_snapshot(), device)), device)
    for block in blocks:
        block.fill_(pattern)


def _allocated(sizes: Sequence[int], device: str) -> list[Tensor]:
    return [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]


def sizes_that_fill(free: Sequence[FreeBlock]) -> list[int]:
    """Return the sizes of allocations that together take all `free` blocks, largest first.

    The allocator takes the smallest block that fits, so each block is requested by its own size. A block of the small
    pool that exceeds the pool's largest allocation is requested in two parts. Of a block above 32 MiB only the
    beginning is requested, from which later allocations are cut.
    """
    sizes: list[int] = []
    for block in free:
        if block.small and block.size > SMALL:
            sizes += [SMALL, block.size - SMALL]
        elif block.small or block.size > SMALL:
            sizes.append(min(block.size, _LARGEST_BLOCK))
    return sorted(sizes, reverse=True)


def _free_blocks(segments: list[dict[str, Any]], device: str) -> list[FreeBlock]:
    """Return the current stream's free blocks in `segments`, except those of CUDA graphs."""
    index, stream = torch.device(device).index, torch.cuda.current_stream(device).cuda_stream
    index = torch.cuda.current_device() if index is None else index
    return [FreeBlock(block["size"], segment["segment_type"] == "small") for segment in segments
            if segment["device"] == index and segment["stream"] == stream
            and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
            for block in segment["blocks"] if block["state"] == "inactive"]


def holds_pattern(y: Tensor, pattern: int) -> Tensor:
    """Return where a 16-bit output still holds the pattern, bool in its shape."""
    bits = int.from_bytes(bytes([pattern] * 2), "little", signed=True)
    return y.contiguous().view(torch.int16) == bits

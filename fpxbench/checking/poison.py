"""Fill memory with a pattern before a call, so that what was never written shows.

On a CPU the C library does it (glibc's M_PERTURB: every allocation is filled, by native code's own mallocs too). On a
GPU the caching allocator's free blocks are filled, from which the next allocations are cut: what it takes from the
driver anew holds what other programs left there.
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
"""NaN in every dtype that has one (bf16, fp16, fp32, FP8, E8M0): it shows wherever it is multiplied, by 0 too."""
LARGE = 0x7B
"""Large and finite: 1.3e36 in bf16 and fp32, 61,296 in fp16, 352 in E4M3FN. It shows where NaN is filtered out."""
ZERO = 0x00
"""What fresh memory often holds by chance. Never checked with; for telling whether a result depends on the pattern."""
PATTERNS = (NAN, LARGE)

_UNFILLED = {torch.ops.aten.empty, torch.ops.aten.empty_strided, torch.ops.aten.empty_like, torch.ops.aten.new_empty,
             torch.ops.aten.new_empty_strided}
_M_PERTURB = -6   # <malloc.h>
_LARGEST_BLOCK = 1 << 25
_SMALLEST_BLOCK = 1 << 9    # the CUDA caching allocator's granularity
SMALL = 1 << 20
"""The most that its pool of small blocks serves, from segments of twice as much."""


class FreeBlock(NamedTuple):
    """A free block of the caching allocator: its bytes, and whether it is of the pool of small blocks."""

    size: int
    small: bool


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


def filled_allocations(pattern: int) -> TorchDispatchMode:
    """Return a mode that makes each tensor that PyTorch allocates without values hold `pattern`, while it is open.

    A block that a call frees and takes again holds what the call itself left there, whatever it was filled with before
    the call. It is for asking again why an output is wrong: a mode is seen by compilers.
    """
    # PyTorch asks when the class is made, which therefore is each time: only then is it known what has been compiled.
    class FilledAllocations(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls) -> bool:
            # Skipping imports the compiler, which takes seconds in the child of each wrong case that compiles nothing.
            return "torch._dynamo" in sys.modules

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func.overloadpacket in _UNFILLED and isinstance(made, Tensor) and made.numel():
                memory = made.untyped_storage()
                torch.empty(0, dtype=torch.uint8, device=made.device).set_(memory).fill_(pattern)
            return made

    return FilledAllocations()


def fill_free_blocks(device: str, nbytes: int, pattern: int) -> None:
    """Fill what a CUDA device's caching allocator hands out next on this stream: all of its free blocks, once there are
    some of `nbytes` and of each power of two."""
    powers = [1 << power for power in range(_SMALLEST_BLOCK.bit_length() - 1, _LARGEST_BLOCK.bit_length())]
    sizes = [max(nbytes, 1), *powers, *powers]
    blocks = _allocated(sizes, device)
    if torch.cuda.get_allocator_backend() == "native":      # cudaMallocAsync does not tell what is free
        blocks.clear()
        blocks = _allocated(sizes_that_fill(_free_blocks(torch.cuda.memory_snapshot(), device)), device)
    for block in blocks:
        block.fill_(pattern)


def _allocated(sizes: Sequence[int], device: str) -> list[Tensor]:
    return [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]


def sizes_that_fill(free: Sequence[FreeBlock]) -> list[int]:
    """Return the sizes of the allocations that together take all of the `free` blocks, the largest first.

    An allocator takes the smallest block that an allocation fits in, so each block is asked for by its own size; one of
    the small pool that is larger than what that pool serves, by the most that it serves and the rest. Of a block above
    32 MiB the beginning is asked for, from which others are cut.
    """
    sizes: list[int] = []
    for block in free:
        if block.small and block.size > SMALL:
            sizes += [SMALL, block.size - SMALL]
        elif block.small or block.size > SMALL:
            sizes.append(min(block.size, _LARGEST_BLOCK))
    return sorted(sizes, reverse=True)


def _free_blocks(segments: list[dict[str, Any]], device: str) -> list[FreeBlock]:
    """Return the free blocks of the current stream that are in `segments`, those of CUDA graphs left out."""
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

"""What a layout is, and what the layouts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# The most elements that a pass over a part of the codes works on, on a CPU. It then runs in cache, its result does not come
# fresh from the operating system, which costs more than the pass, and it stays below torch's grain for threads, whose
# barriers cost a hundred times the pass as soon as anything else runs on the machine.
CPU_GRAIN = 1 << 15


@dataclass(frozen=True)
class Layout:
    """Where the bits of codes [N, K] lie in bytes [N, row_bytes].

    name : as `pack`, `QuantizedWeight.layout` and `Implementation.layout` say it
    description : the layout in one sentence; docs/layouts.md says it bit by bit
    widths : the code widths that it takes, in bits
    row_bytes : (k, bits) -> the bytes that a row of k codes takes
    write : (codes [N, K], bits, packed [N, row_bytes]) fills `packed`; padding is zero
    read : (packed [N, row_bytes], bits, codes [N, K]) fills `codes`; padding is not looked at
    tile : N and K must be multiples of it
    """

    name: str
    description: str
    widths: tuple[int, ...]
    row_bytes: Callable[[int, int], int]
    write: Callable[[Tensor, int, Tensor], None]
    read: Callable[[Tensor, int, Tensor], None]
    tile: int = 1

    def check(self, bits: int, n: int, k: int) -> None:
        """Raises ValueError for a width or a shape that the layout does not take."""
        if bits not in self.widths:
            one_of = ", ".join(map(str, self.widths))
            raise ValueError(f"layout {self.name!r} takes codes of {one_of} bits, not {bits}")
        if n % self.tile or k % self.tile:
            raise ValueError(f"layout {self.name!r} takes N and K in multiples of {self.tile}, not [{n}, {k}]")


def parts(count: int, at_once: int, on: torch.device) -> list[slice]:
    """``range(count)`` in slices to work on one after the other: `at_once` on a CPU, but at least one; all at once elsewhere."""
    step = max(1, at_once if on.type == "cpu" else count)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def by_rows(work: Callable[[Tensor, int, Tensor], None], codes_at_once: Callable[[int], int]) -> Callable[[Tensor, int, Tensor], None]:
    """`work(source, bits, target)`, for a layout whose rows do not depend on each other, on rows of `codes_at_once(bits)` codes
    at a time."""

    def work_by_rows(source: Tensor, bits: int, target: Tensor) -> None:
        k = max(source.shape[1], target.shape[1])
        for rows in parts(source.shape[0], codes_at_once(bits) // k, source.device):
            work(source[rows], bits, target[rows])

    return work_by_rows


def padded(codes: Tensor, k: int) -> Tensor:
    """`codes` with zero columns up to `k`; the same tensor where it has as many already."""
    return codes if codes.shape[1] == k else torch.nn.functional.pad(codes, (0, k - codes.shape[1]))


def with_padding(codes: Tensor, k: int) -> Tensor:
    """A place to read `k` columns to: `codes` itself where it has as many, else a new tensor to copy from."""
    return codes if codes.shape[1] == k else codes.new_empty(codes.shape[0], k)


def moved(words: Tensor, source: int, target: int, width: int, every: int | None = None) -> Tensor:
    """The `width` bits from `source` up of each word, at `target`; all others are zero. With `every`, the same is done in each
    `every` bits of a word. The bits that are moved must not reach into the next ones, nor be a word's sign and move down."""
    shifted = words >> (source - target) if source > target else words << (target - source) if target > source else words
    return shifted & _mask(target, width, every, words.dtype)


@lru_cache(maxsize=256)
def _mask(start: int, width: int, every: int | None, dtype: torch.dtype) -> int:
    bits = 8 * dtype.itemsize
    mask = sum(((1 << width) - 1) << (first + start) for first in range(0, bits, every or bits))
    return mask - (1 << bits) if dtype.is_signed and mask >> (bits - 1) else mask

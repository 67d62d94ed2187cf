"""The class of a layout, and the functions that layouts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# The most elements of a pass on a CPU. The data then stays in cache; the result needs no new pages from the operating
# system, which cost more than the pass; and torch uses one thread for it: with several, barriers cost a hundred times
# the pass as soon as anything else runs on the machine.
CPU_GRAIN = 1 << 15


@dataclass(frozen=True)
class Layout:
    """Where the bits of codes [N, K] lie in bytes [N, row_bytes].

    name : as in `pack`, `QuantizedWeight.layout` and `Implementation.layout`
    description : one sentence; docs/layouts.md has the bits
    widths : the code widths that it supports, in bits
    row_bytes : (k, bits) -> the bytes of a row of k codes
    write : (codes [N, K], bits, packed [N, row_bytes]) fills `packed`; padding is zero
    read : (packed [N, row_bytes], bits, codes [N, K]) fills `codes`; padding is ignored
    tile : N and K must be multiples of it
    row_tile : number of rows whose bytes are contiguous, so that a weight can be cut at multiples of it; None: a weight
        cannot be cut
    """

    name: str
    description: str
    widths: tuple[int, ...]
    row_bytes: Callable[[int, int], int]
    write: Callable[[Tensor, int, Tensor], object]
    read: Callable[[Tensor, int, Tensor], object]
    tile: int = 1
    row_tile: int | None = 1

    def check(self, bits: int, n: int, k: int) -> None:
        """Raise ValueError for a width or a shape that the layout does not support."""
        if bits not in self.widths:
            one_of = ", ".join(map(str, self.widths))
            raise ValueError(f"layout {self.name!r} supports codes of {one_of} bits, not {bits}")
        if n % self.tile or k % self.tile:
            raise ValueError(f"layout {self.name!r} supports N and K in multiples of {self.tile}, not [{n}, {k}]")


def parts(count: int, at_once: int, on: torch.device) -> list[slice]:
    """Return ``range(count)`` as slices: of `at_once` elements (at least 1) on a CPU, as one slice on other devices."""
    step = max(1, at_once if on.type == "cpu" else count)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def by_rows(
    work: Callable[[Tensor, int, Tensor], None], codes_at_once: Callable[[int], int]
) -> Callable[[Tensor, int, Tensor], None]:
    """Return `work(source, bits, target)` applied to a few rows of about `codes_at_once(bits)` codes at a time, for
    layouts with independent rows."""

    def work_by_rows(source: Tensor, bits: int, target: Tensor) -> None:
        k = max(source.shape[1], target.shape[1])
        for rows in parts(source.shape[0], codes_at_once(bits) // k, source.device):
            work(source[rows], bits, target[rows])

    return work_by_rows


def padded(codes: Tensor, k: int) -> Tensor:
    """Return `codes` with zero columns added up to `k`; the same tensor if none are needed."""
    return codes if codes.shape[1] == k else torch.nn.functional.pad(codes, (0, k - codes.shape[1]))


def with_padding(codes: Tensor, k: int) -> Tensor:
    """Return a tensor to read `k` columns into: `codes` itself if it has `k`, else a new one to copy from."""
    return codes if codes.shape[1] == k else codes.new_empty(codes.shape[0], k)


def moved(words: Tensor, source: int, target: int, width: int, every: int | None = None) -> Tensor:
    """Return each word's `width` bits from bit `source` up, moved to bit `target`; all other bits are zero.

    With `every`, the same in each `every` bits of a word. Moved bits must not reach into the next ones, nor include a
    word's sign and move down.
    """
    shifted = (
        words >> (source - target) if source > target else words << (target - source) if target > source else words
    )
    return shifted & _mask(target, width, every, words.dtype)


@lru_cache(maxsize=256)
def _mask(start: int, width: int, every: int | None, dtype: torch.dtype) -> int:
    bits = 8 * dtype.itemsize
    mask = sum(((1 << width) - 1) << (first + start) for first in range(0, bits, every or bits))
    return mask - (1 << bits) if dtype.is_signed and mask >> (bits - 1) else mask

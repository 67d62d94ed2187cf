"""What a layout is, and what the layouts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes of codes worked on at a time on a CPU: the passes over them then run in cache, and what lies between two passes
# does not come fresh from the operating system, which costs more than any of them.
CPU_CHUNK = 1 << 21


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


def row_parts(tensor: Tensor, row_size: int, multiple: int = 1) -> list[slice]:
    """Slices of rows to work on one after the other: on a CPU about CPU_CHUNK bytes, whole `multiple`s of rows; else all."""
    n = tensor.shape[0]
    step = n if tensor.device.type != "cpu" else max(1, CPU_CHUNK // max(1, row_size * multiple)) * multiple
    return [slice(start, min(start + step, n)) for start in range(0, n, max(1, step))]


def by_rows(work: Callable[[Tensor, int, Tensor], None]) -> Callable[[Tensor, int, Tensor], None]:
    """`work(source, bits, target)`, for a layout whose rows do not depend on each other, a few rows at a time."""

    def work_by_rows(source: Tensor, bits: int, target: Tensor) -> None:
        for rows in row_parts(source, max(source.shape[1], target.shape[1])):
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
    word_bits = 8 * words.element_size()
    every = every or word_bits
    mask = sum(((1 << width) - 1) << (start + target) for start in range(0, word_bits, every))
    if mask >> (word_bits - 1) and words.dtype.is_signed:
        mask -= 1 << word_bits
    shifted = words >> (source - target) if source > target else words << (target - source) if target > source else words
    return shifted & mask

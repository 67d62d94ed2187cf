"""FP6-LLM's 2 + 4 split: the order in which the threads of a tensor core instruction read a weight.

From "FP6-LLM: Efficiently Serving Large Language Models Through FP6-Centric Algorithm-System Co-Design",
arXiv:2401.14112, the prepacking in its authors' code (later Quant-LLM), and torchao's `pack_tc_floatx`, which extend 2
+ 4 to 1 + 2 + 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from fpxbench.numbers.packing import layout
from fpxbench.numbers.packing.layout import Layout, moved, parts
from fpxbench.numbers.packing.planar import pieces

TILE = 64


def _write(codes: Tensor, bits: int, packed: Tensor) -> None:
    for threads, words in _parts(codes, bits, packed):
        pairs = threads.contiguous().view(torch.int16)
        for _, _, piece in words:
            piece.zero_()
        for h, c in product(range(2), range(2)):
            pair = pairs[h, c].to(torch.int32)
            # the even column's code in the lower half, the odd one's in the upper
            lanes = (pair | (pair << 8)) & 0xFF00FF
            for offset, width, piece in words:
                blocks = lanes.view(*piece.shape[:3], -1, 32)
                for b in range(blocks.shape[3]):
                    piece |= moved(blocks[:, :, :, b], offset, _lowest_bit(b, h, c, width), width, every=16)


def _read(packed: Tensor, bits: int, codes: Tensor) -> None:
    for threads, words in _parts(codes, bits, packed):
        pairs = torch.empty(threads.shape, dtype=threads.dtype, device=threads.device).view(torch.int16)
        for h, c in product(range(2), range(2)):
            lanes = torch.zeros(pairs[h, c].shape, dtype=torch.int32, device=codes.device)
            for offset, width, piece in words:
                blocks = lanes.view(*piece.shape[:3], -1, 32)
                for b in range(blocks.shape[3]):
                    blocks[:, :, :, b] |= moved(piece, _lowest_bit(b, h, c, width), offset, width, every=16)
            pairs[h, c] = lanes | (lanes >> 8)      # the lower sixteen bits of it
        threads.copy_(pairs.view(torch.int64))


def _parts(codes: Tensor, bits: int, packed: Tensor) -> Iterator[tuple[Tensor, list[tuple[int, int, Tensor]]]]:
    """Yield a few tiles at a time: the codes as `_by_thread` orders them, and the words of each piece, (offset, width,
    int32 [row tiles, column tiles, words of a tile, 32])."""
    n, k = codes.shape
    threads, flat, start, pieces_words = _by_thread(codes), packed.view(-1), 0, []
    for offset, width in reversed(pieces(bits)):
        size = n * k * width // 8
        words = flat[start:start + size].view(torch.int32).view(n // TILE, k // 16, width, 32)
        pieces_words.append((offset, width, words))
        start += size
    tiles_at_once = layout.CPU_GRAIN // (4 * 32)        # a pass processes one pair of codes per thread and block
    for down in parts(n // TILE, tiles_at_once // (k // 16), codes.device):
        for along in parts(k // 16, tiles_at_once, codes.device):
            yield (
                threads[:, :, down, along],
                [(offset, width, words[down, along]) for offset, width, words in pieces_words],
            )


def _by_thread(codes: Tensor) -> Tensor:
    """Return codes [N, K], eight neighbours to an int64, as [2 halves of 16 rows, 2 of 16 columns, N/64, K/16, 4 blocks
    of 16 rows, 8 rows]."""
    n, k = codes.shape
    return codes.view(torch.int64).view(n // TILE, 4, 2, 8, k // 16, 2).permute(2, 5, 0, 4, 1, 3)


def _lowest_bit(b: int, h: int, c: int, width: int) -> int:
    """Return the lowest bit, in its word, of an even column's field in block `b`, row half `h` and column half `c`. The
    odd column's field is 16 bits higher."""
    quarter = 8 // width        # of the 32 / width fields of a word
    return width * ((1 - h) * quarter + quarter - 1 - (2 * b + c))


FP6_LLM = Layout(
    "fp6_llm",
    "the upper two bits of all codes, then the lower four, in 32-bit words in the order of a tensor core's threads",
    widths=tuple(range(1, 8)),
    row_bytes=lambda k, bits: k * bits // 8,
    write=_write,
    read=_read,
    tile=TILE,
    row_tile=None,
)

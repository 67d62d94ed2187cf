"""FP6-LLM's 2+4 split: the order in which a tensor core instruction's threads read a weight.

From "FP6-LLM: Efficiently Serving Large Language Models Through FP6-Centric Algorithm-System Co-Design", arXiv:2401.14112
(§5.2), and the prepacking of its authors' code (later Quant-LLM) and of torchao's `pack_tc_floatx`, which widen it to 1 + 2 + 4.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fpxbench.packing.layout import Layout, row_parts
from fpxbench.packing.planar import pieces

TILE = 64


def _write(codes: Tensor, bits: int, packed: Tensor) -> None:
    for rows, words in _parts(codes, bits, packed):
        pairs = _blocks(codes[rows]).contiguous().view(torch.int16)
        for _, _, _, piece in words:
            piece.zero_()
        for a, h, c in product(range(4), range(2), range(2)):
            pair = pairs[a, h, c].to(torch.int32)
            lanes = (pair & 0xFF) | ((pair & 0xFF00) << 8)      # the even column's code in the lower half, the odd one's in the upper
            for offset, width, blocks, piece in words:
                word, shift = _place(a, h, c, width, blocks)
                piece[:, :, word] |= ((lanes >> offset) & _in_both_halves(width)) << shift


def _read(packed: Tensor, bits: int, codes: Tensor) -> None:
    for rows, words in _parts(codes, bits, packed):
        target = _blocks(codes[rows])
        blocks64 = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        pairs = blocks64.view(torch.int16)
        for a, h, c in product(range(4), range(2), range(2)):
            lanes = 0
            for offset, width, blocks, piece in words:
                word, shift = _place(a, h, c, width, blocks)
                lanes = lanes | (((piece[:, :, word] >> shift) & _in_both_halves(width)) << offset)
            pairs[a, h, c] = (lanes | (lanes >> 8)).to(torch.int16)
        target.copy_(blocks64)


def _parts(codes: Tensor, bits: int, packed: Tensor):
    """A few tiles of rows at a time: the rows, and of each piece (offset, width, blocks a word, words [N/64, K/16, 4/blocks, 32])."""
    n, k = codes.shape
    flat, start, all_words = packed.view(-1), 0, []
    for offset, width in reversed(pieces(bits)):
        size = n * k * width // 8
        blocks = 4 // width
        words = flat[start:start + size].view(torch.int32).view(n // TILE, k // 16, 4 // blocks, 32)
        all_words.append((offset, width, blocks, words))
        start += size
    for rows in row_parts(codes, k, TILE):
        tiles = slice(rows.start // TILE, rows.stop // TILE)
        yield rows, [(offset, width, blocks, words[tiles]) for offset, width, blocks, words in all_words]


def _blocks(codes: Tensor) -> Tensor:
    """Codes [N, K], eight to an int64, as [4 blocks of 16 rows, 2 halves of those, 2 of 16 columns, N/64, K/16, 8 rows]."""
    n, k = codes.shape
    return codes.view(torch.int64).view(n // TILE, 4, 2, 8, k // 16, 2).permute(1, 2, 5, 0, 4, 3)


def _place(a: int, h: int, c: int, width: int, blocks: int) -> tuple[int, int]:
    """Of the even column's field from 16-row block `a`, row half `h`, column half `c`: which word, and its lowest bit there.
    The odd column's lies 16 bits higher."""
    word, within = divmod(a, blocks)
    return word, width * ((1 - h) * 2 * blocks + 2 * blocks - 1 - (2 * within + c))


def _in_both_halves(width: int) -> int:
    return ((1 << width) - 1) * 0x10001


FP6_LLM = Layout(
    "fp6_llm",
    "the upper two bits of all codes, then the lower four, in 32-bit words as the threads of a tensor core instruction take them",
    widths=tuple(range(1, 8)),
    row_bytes=lambda k, bits: k * bits // 8,
    write=_write,
    read=_read,
    tile=TILE,
)

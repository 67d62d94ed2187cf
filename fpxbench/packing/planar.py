"""Planar rows: the layout of this suite's own kernels, for every width."""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.packing.layout import Layout, by_rows, padded, repeated, with_padding

# Rows of every piece then start on a 4-byte boundary, so that kernels may read int32 words.
K_MULTIPLE = 32


def pieces(bits: int) -> list[tuple[int, int]]:
    """``(offset, width)`` of the pieces a code is cut into: 6 bits -> ``[(0, 4), (4, 2)]``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    cut, offset = [], 0
    for width in (8, 4, 2, 1):
        if bits - offset >= width:
            cut.append((offset, width))
            offset += width
    return cut


def padded_k(k: int) -> int:
    """K as planar rows hold it: up to the next multiple of 32."""
    return -(-k // K_MULTIPLE) * K_MULTIPLE


# Four bytes are shifted at once: no bit leaves its byte, since it is masked before it goes up and after it comes down.


def _write(codes: Tensor, bits: int, packed: Tensor) -> None:
    words, packed = padded(codes, padded_k(codes.shape[1])).view(torch.int32), packed.view(torch.int32)
    start = 0
    for offset, width in pieces(bits):
        planes, size = 8 // width, words.shape[1] * width // 8
        target = packed[:, start:start + size]
        for plane in range(planes):
            field = words[:, plane * size:(plane + 1) * size]
            if bits != width:
                field = (field >> offset if offset else field) & repeated((1 << width) - 1, 4)
            if plane == 0:
                target.copy_(field)
            else:
                target |= field << (plane * width)
        start += size


def _read(packed: Tensor, bits: int, codes: Tensor) -> None:
    whole = with_padding(codes, padded_k(codes.shape[1]))
    words, packed = whole.view(torch.int32), packed.view(torch.int32)
    start = 0
    for offset, width in pieces(bits):
        planes, size = 8 // width, words.shape[1] * width // 8
        piece = packed[:, start:start + size]
        for plane in range(planes):
            target = words[:, plane * size:(plane + 1) * size]
            field = piece
            if width < 8:
                field = (piece >> (plane * width) if plane else piece) & repeated((1 << width) - 1, 4)
            if offset == 0:
                target.copy_(field)
            else:
                target |= field << offset
        start += size
    if whole is not codes:
        codes.copy_(whole[:, :codes.shape[1]])


PLANAR = Layout(
    "planar",
    "each code cut into pieces of 8, 4, 2 or 1 bits, low bits first; of a piece, byte i holds the weights i, i + size, i + 2 size, …",
    widths=tuple(range(1, 9)),
    row_bytes=lambda k, bits: padded_k(k) * bits // 8,
    write=by_rows(_write),
    read=by_rows(_read),
)

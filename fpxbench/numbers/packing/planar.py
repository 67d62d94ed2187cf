"""Planar rows: the layout of this suite's own kernels, for every width."""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.numbers.packing import layout
from fpxbench.numbers.packing.layout import Layout, by_rows, moved, padded, with_padding

# Rows of every piece then start on a 4-byte boundary, so that kernels may read int32 words.
K_MULTIPLE = 32


def pieces(bits: int) -> list[tuple[int, int]]:
    """Return ``(offset, width)`` of the pieces of a code: 6 bits -> ``[(0, 4), (4, 2)]``."""
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    cut, offset = [], 0
    for width in (8, 4, 2, 1):
        if bits - offset >= width:
            cut.append((offset, width))
            offset += width
    return cut


def padded_k(k: int) -> int:
    """Return K rounded up to the next multiple of 32, as planar rows store it."""
    return -(-k // K_MULTIPLE) * K_MULTIPLE


# Four bytes are processed at once, as an int32.


def _write(codes: Tensor, bits: int, packed: Tensor) -> None:
    words, packed = padded(codes, padded_k(codes.shape[1])).view(torch.int32), packed.view(torch.int32)
    start = 0
    for offset, width in pieces(bits):
        size = words.shape[1] * width // 8
        piece = packed[:, start:start + size].zero_()
        for plane in range(8 // width):
            piece |= moved(words[:, plane * size:(plane + 1) * size], offset, plane * width, width, every=8)
        start += size


def _read(packed: Tensor, bits: int, codes: Tensor) -> None:
    whole = with_padding(codes, padded_k(codes.shape[1]))
    words, packed = whole.view(torch.int32), packed.view(torch.int32)
    start = 0
    for offset, width in pieces(bits):
        size = words.shape[1] * width // 8
        piece = packed[:, start:start + size]
        for plane in range(8 // width):
            field, target = (
                moved(piece, plane * width, offset, width, every=8),
                words[:, plane * size : (plane + 1) * size],
            )
            if offset == 0:
                target.copy_(field)
            else:
                target |= field
        start += size
    if whole is not codes:
        codes.copy_(whole[:, :codes.shape[1]])


def _codes_at_once(bits: int) -> int:
    """Return how many codes a pass processes: a plane of the widest piece, in words."""
    return layout.CPU_GRAIN * 4 * 8 // pieces(bits)[0][1]


PLANAR = Layout(
    "planar",
    "each code split into pieces of 8, 4, 2 or 1 bits, low bits first; byte i of a piece holds weights i, i + size, …",
    widths=tuple(range(1, 9)),
    row_bytes=lambda k, bits: padded_k(k) * bits // 8,
    write=by_rows(_write, _codes_at_once),
    read=by_rows(_read, _codes_at_once),
)

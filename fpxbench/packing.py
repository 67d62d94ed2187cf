"""Codes to bytes and back.

Two layouts, by name:

``planar``
    K is padded to a multiple of 32 with zero codes. A b-bit code is cut into pieces whose widths are powers of two,
    from the low bits up and the widest first (8; 4+2+1; 4+2; 4+1; 4; 2+1; 2; 1). A piece of width w takes
    ``K_pad * w / 8`` bytes of a row, the pieces one after the other. Within a piece there are ``p = 8 / w`` planes:
    byte i holds, in its bits ``[j*w, (j+1)*w)``, the weight ``k = j * K_pad / p + i``.
    A kernel's tile thus decodes p weights from the same bytes, and they meet p contiguous slices of the activation:
    no shuffles, no three-byte loads, and a 6-bit weight takes 6 bits.

``bytes``
    One code a byte, nothing padded: what torch's float8 dtypes are viewed from.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("planar", "bytes")

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
    return -(-k // K_MULTIPLE) * K_MULTIPLE


def row_bytes(k: int, bits: int, layout: str) -> int:
    """Bytes that a row of `k` codes takes."""
    return k if _known(layout) == "bytes" else padded_k(k) * bits // 8


def pack(codes: Tensor, bits: int, layout: str = "planar") -> Tensor:
    """uint8 ``[N, row_bytes]`` from uint8 codes ``[N, K]``. Raises ValueError for a code wider than `bits`."""
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise TypeError(f"pack takes uint8 codes [N, K], not {codes.dtype} {list(codes.shape)}")
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    if _known(layout) == "bytes":
        return codes.contiguous()
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes, (0, padded_k(k) - k))
    packed_pieces = []
    for offset, width in pieces(bits):
        planes = 8 // width
        field = (padded >> offset) & ((1 << width) - 1)
        field = field.reshape(n, planes, -1)
        packed_piece = field[:, 0].clone()
        for plane in range(1, planes):
            packed_piece |= field[:, plane] << (plane * width)
        packed_pieces.append(packed_piece)
    return torch.cat(packed_pieces, dim=1)


def unpack(packed: Tensor, bits: int, k: int, layout: str = "planar") -> Tensor:
    """uint8 codes ``[N, K]`` from what `pack` made. Raises ValueError where the bytes are not a row of k codes."""
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes(k, bits, layout):
        raise ValueError(
            f"{k} codes of {bits} bits take uint8 [N, {row_bytes(k, bits, layout)}] in layout {layout!r},"
            f" not {packed.dtype} {list(packed.shape)}"
        )
    if layout == "bytes":
        return packed
    n = packed.shape[0]
    codes = torch.zeros(n, padded_k(k), dtype=torch.uint8, device=packed.device)
    start = 0
    for offset, width in pieces(bits):
        planes, size = 8 // width, padded_k(k) * width // 8
        packed_piece = packed[:, start:start + size]
        for plane in range(planes):
            field = (packed_piece >> (plane * width)) & ((1 << width) - 1)
            codes[:, plane * size:(plane + 1) * size] |= field << offset
        start += size
    return codes[:, :k].contiguous()


def _known(layout: str) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}: one of {', '.join(LAYOUTS)}")
    return layout

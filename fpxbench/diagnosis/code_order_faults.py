"""Known faults in the order of codes, as data: bits read from the wrong position in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations

import torch
from torch import Tensor

from fpxbench.diagnosis.decode_fault import DecodeFault
from fpxbench.numbers import packing
from fpxbench.numbers.codebook import NumberFormat
from fpxbench.records.kinds import Kind

# For 4-bit codes: their bitstream is nibbles, low first.
_NEIGHBOURS_IN_A_BYTE = {"nibbles_low_first", "nibbles_high_first", "bitstream"}


def code_order_faults(fmt: NumberFormat, layout: str, k: int) -> Iterator[DecodeFault]:
    """Yield the faults that read bits from the wrong position in a row of `k` codes stored in `layout`."""
    k_pad = packing.padded_k(k)
    column = torch.arange(k_pad)

    def moved(kind: Kind, message: str, **sources: Tensor) -> DecodeFault:
        return DecodeFault("codes", kind, message, _piecewise(fmt.bits, {int(s[1:]): m for s, m in sources.items()}))

    cut = packing.pieces(fmt.bits)
    if layout == "planar":
        for offset, width in cut:
            planes = 8 // width
            for order in _plane_orders(planes):
                source = _from_planes(column, k_pad, order)
                if planes == 2:
                    message = f"the two nibbles of each byte are exchanged: weight k reads the code of k ± {k_pad // 2}"
                    yield moved(Kind.NIBBLE_SWAP, message, **{f"p{offset}": source})
                else:
                    message = (
                        f"the planes of the {width}-bit piece are read in the order {', '.join(map(str, order))},"
                        f" not 0 to {planes - 1}"
                    )
                    yield moved(Kind.PLANE_SWAP, message, **{f"p{offset}": source})
        for backwards in (False, True):
            sources = {f"p{offset}": _as_neighbours(column, k_pad, 8 // width, backwards)
                       for offset, width in cut if width < 8}
            if sources:
                yield moved(
                    Kind.PLANE_SWAP,
                    "the planes are read as neighbours: the fields of one byte are read as weights next to each"
                    f" other{', the high field first' if backwards else ''}",
                    **sources,
                )
        if len(cut) > 1:
            yield DecodeFault(
                "codes",
                Kind.PLANE_SWAP,
                f"the pieces of {' and '.join(str(width) for _, width in cut)} bits are put together in the wrong "
                f"order",
                lambda codes, columns: _pieces_reversed(codes[:, columns.to(codes.device)], fmt.bits),
            )
    for other in packing.LAYOUTS.values():
        if other.name != layout and fmt.bits < 8 and _could_hold(other, layout, fmt.bits, k):
            kind = (
                Kind.NIBBLE_SWAP if fmt.bits == 4 and {layout, other.name} <= _NEIGHBOURS_IN_A_BYTE else Kind.PLANE_SWAP
            )
            yield DecodeFault("codes", kind, f"the bytes are read in the layout {other.name}, theirs is {layout}",
                             _read_as(other.name, layout, fmt.bits, k))
    neighbours = Kind.NIBBLE_SWAP if fmt.bits == 4 else Kind.PLANE_SWAP
    yield moved(neighbours, "each two neighbours along K are exchanged: weight k reads the code of k ^ 1",
                **{f"p{offset}": column ^ 1 for offset, _ in cut})
    if fmt.bits == 8:
        yield DecodeFault("codes", Kind.NIBBLE_SWAP, "the two nibbles of each 8-bit code are exchanged",
                         lambda codes, columns: nibbles_exchanged(codes[:, columns.to(codes.device)]))


def _could_hold(other: packing.Layout, layout: str, bits: int, k: int) -> bool:
    """Return whether rows of `layout` have as many bytes as rows of `other`, which must not mix rows."""
    if bits not in other.widths or max(other.tile, packing.layout_named(layout).tile) > 1:
        return False
    return other.row_bytes(k, bits) == packing.row_bytes(k, bits, layout)


def _read_as(other: str, layout: str, bits: int, k: int) -> Callable[[Tensor, Tensor], Tensor]:
    def read(codes: Tensor, columns: Tensor) -> Tensor:
        wrong = packing.unpack(packing.pack(codes[:, :k].contiguous(), bits, layout), bits, k, other)
        return torch.nn.functional.pad(wrong, (0, codes.shape[1] - k))[:, columns.to(codes.device)]

    return read


def _plane_orders(planes: int) -> list[tuple[int, ...]]:
    """Return the wrong orders of planes to try: all for 2 or 4 planes; reversed, rotated and pairwise for 8."""
    right = tuple(range(planes))
    if planes <= 4:
        return [order for order in permutations(right) if order != right]
    return [right[::-1], right[1:] + right[:1], right[-1:] + right[:-1], tuple(plane ^ 1 for plane in right)]


def _from_planes(column: Tensor, k_pad: int, order: tuple[int, ...]) -> Tensor:
    size = k_pad // len(order)
    return torch.tensor(order)[column // size] * size + column % size


def _as_neighbours(column: Tensor, k_pad: int, planes: int, backwards: bool) -> Tensor:
    plane = planes - 1 - column % planes if backwards else column % planes
    return plane * (k_pad // planes) + column // planes


def _piecewise(bits: int, sources: dict[int, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def read(codes: Tensor, columns: Tensor) -> Tensor:
        taken = torch.zeros(codes.shape[0], len(columns), dtype=torch.uint8, device=codes.device)
        for offset, width in packing.pieces(bits):
            at = sources[offset][columns.cpu()] if offset in sources else columns
            taken |= codes[:, at.to(codes.device)] & (((1 << width) - 1) << offset)
        return taken

    return read


def _pieces_reversed(codes: Tensor, bits: int) -> Tensor:
    mixed, start = torch.zeros_like(codes), 0
    for offset, width in reversed(packing.pieces(bits)):
        mixed |= ((codes >> offset) & ((1 << width) - 1)) << start
        start += width
    return mixed


def nibbles_exchanged(codes: Tensor) -> Tensor:
    """Return 8-bit codes with their upper and lower four bits exchanged."""
    return ((codes & 0xF) << 4) | (codes >> 4)

"""Known faults in which scale multiplies a block, as data: maps from a block's position to that of the scale read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.scaling import Scaling
from fpxbench.records.kinds import Kind

SHARED = (2, 4, 8, 16)
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class ScalePlace:
    """One fault in placing scales [R, G].

    source : int64 [R, G], the flat position of the scale read for each block; -1 for padding
    """

    kind: Kind
    message: str
    source: Tensor

    def apply(self, grid: Tensor) -> Tensor:
        """Return the grid [R, G] as read; 0 for padding."""
        source = self.source.to(grid.device)
        return torch.where(source >= 0, grid.reshape(-1)[source.clamp(min=0)], 0)


def tiled_position(row: Tensor, block: Tensor, blocks: int) -> Tensor:
    """Return the position of scale [row, block] in tensor cores' layout: tiles of 128 x 4, each stored as 32 x 4 x 4.

    Source: cuBLAS documentation, "1D block scaling factors layout".
    """
    tile = row // 128 * -(-blocks // 4) + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


def scale_places(scaling: Scaling, n: int, k: int) -> Iterator[ScalePlace]:
    """Yield every known fault in placing the grid of scales of an [n, k] weight."""
    if scaling.block_rows is None:      # one scale for all
        return
    n, blocks = scaling.grid_shape(n, k)
    row, block = torch.arange(n)[:, None].expand(n, blocks), torch.arange(blocks)[None, :].expand(n, blocks)
    count = n * blocks

    def flat(kind: Kind, message: str, rows: Tensor, columns: Tensor) -> ScalePlace:
        """Return the fault from rows and columns; columns past an end continue in the next row, as in memory."""
        return ScalePlace(kind, message, (rows * blocks + columns) % count)

    if scaling.block is not None:
        yield ScalePlace(Kind.SCALE_TRANSPOSED,
                         f"the scales [{n}, {blocks}] are read column by column, as if they were [{blocks}, {n}]",
                         torch.arange(count).reshape(blocks, n).T)
    for step, which in ((1, "next"), (-1, "previous")):
        of_row = (f"each row's blocks meet the scales of the {which} row" if scaling.block
                  else f"each row is multiplied by the scale of the {which} row")
        if scaling.block:
            message = f"each block is multiplied by the scale of the {which} block"
            yield flat(Kind.BLOCK_OFF_BY_ONE, message, row, block + step)
            yield flat(Kind.BLOCK_OFF_BY_ONE, f"{message} of its row, the {'last' if step > 0 else 'first'} by its own",
                       row, (block + step).clamp(0, blocks - 1))
            yield flat(Kind.BLOCK_OFF_BY_ONE, f"{message} of its row, cyclically", row, (block + step) % blocks)
        yield flat(Kind.BLOCK_OFF_BY_ONE, of_row, row + step, block)
        yield flat(Kind.BLOCK_OFF_BY_ONE, of_row, (row + step).clamp(0, n - 1), block)
    if scaling.block is None:
        return
    if scaling.block_rows == 1:     # tensor cores tile only the scales of blocks along K
        yield from _swizzled(row, block, n, blocks)
    for shared in SHARED:
        for at, which in ((0, "first"), (shared - 1, "last")):
            if shared < 2 * blocks:
                yield flat(Kind.SCALE_SHARED, f"{shared} neighbouring blocks share the scale of the {which}", row,
                           (block // shared * shared + at).clamp(max=blocks - 1))
            if shared < 2 * n:
                yield flat(Kind.SCALE_SHARED, f"{shared} neighbouring rows share the scales of the {which}",
                           (row // shared * shared + at).clamp(max=n - 1), block)


def _swizzled(row: Tensor, block: Tensor, n: int, blocks: int) -> Iterator[ScalePlace]:
    """Yield confusions of row-major scales with tiles of 128 x 4, in both directions, with and without padding."""
    tiled = tiled_position(row, block, blocks)
    padded_rows, padded_blocks = -(-n // 128) * 128, -(-blocks // 4) * 4
    own = row * blocks + block
    for padded, width in ((False, blocks), (True, padded_blocks)):
        if padded and width == blocks and n == padded_rows:
            continue
        suffix = ", after both dimensions are padded to tiles" if padded else ""
        source_row, source_block = tiled // width, tiled % width
        outside = (source_row >= n) | (source_block >= blocks)
        yield ScalePlace(
            Kind.SCALE_SWIZZLED,
            "block scales are stored row by row and read in the 128 x 4 tiled order of tensor cores" + suffix,
            torch.where(outside, -1, source_row * blocks + source_block),
        )
        at = torch.full((padded_rows * padded_blocks,), -1)
        at[tiled] = own
        yield ScalePlace(
            Kind.SCALE_SWIZZLED,
            "block scales are stored in the 128 x 4 tiled order of tensor cores and read row by row" + suffix,
            at[row * width + block],
        )


def block_size_faults(scaling: Scaling, n: int, k: int) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Yield faults in the block size: a message, and (columns [C], rows [R]) -> flat positions [R, C] of the scales
    read."""
    if scaling.block is None:
        return
    grid_rows, blocks = scaling.grid_shape(n, k)
    height = scaling.block_shape(n, k)[0]
    for rows_each in dict.fromkeys((n // grid_rows, *BLOCK_SIZES)) if 1 < height < n else ():
        if rows_each != height and rows_each:
            yield (f"blocks are taken to be {rows_each} rows high, they are {height}",
                   lambda columns, rows, rows_each=rows_each:
                   (rows // rows_each).clamp(max=grid_rows - 1)[:, None] * blocks + (columns // scaling.block)[None, :])
    for size in BLOCK_SIZES:
        if size == scaling.block or size > 2 * k:
            continue
        message = f"blocks are taken to be {size} weights long, they are {scaling.block}"
        yield message, lambda columns, rows, size=size: (
            (rows // height)[:, None] * blocks + (columns // size).clamp(max=blocks - 1)[None, :])
        width = -(-k // size)
        yield (f"{message}; the scales are read as [{grid_rows}, {width}]",
               lambda columns, rows, size=size, width=width:
               ((rows // height)[:, None] * width + columns[None, :] // size) % (grid_rows * blocks))

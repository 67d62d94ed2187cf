"""x @ weight.T from fragments: which tile, and the launch.

Tiles come from `_fragment_tiles.json`, measured on an H200: by architecture, code width, N and M. Nothing is tuned at
the first call, and K, M and the numbers of tiles are no compile-time constants, so that shapes share compiled kernels.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpxbench.impls import _triton_modules
from fpxbench.impls._fragment_weight import INT32, Operands, constants
from fpxbench.numbers.packing.fragment import TILE_K

MOST_ROWS = 1 << 18
"""Of x in one launch: a grid's second dimension is at most 65,535 blocks."""


@dataclass(frozen=True)
class Tile:
    """A program makes `block_m` x 8 `groups` `warps_n` of the result; `warps_k` warps divide K among them.

    depth : loads of the weight that are on their way
    ordered : x is first put in the threads' order, by a kernel of its own
    """

    block_m: int
    groups: int
    warps_n: int
    warps_k: int
    depth: int = 1
    ordered: bool = False

    @property
    def shared_bytes(self) -> int:
        """What the warps' sums take where they meet."""
        return 0 if self.warps_k == 1 else 4 * self.warps_n * self.warps_k * max(16, self.block_m) * 8 * self.groups


@dataclass(frozen=True)
class WideTile:
    """A program makes `block_m` x `block_n` of the result by wgmma; x waits in `stages` places in shared memory.

    chunk : how many times 32 columns are decoded, then multiplied, at once: 1, 2 or 4
    split : how many programs divide K among them; a second kernel adds up their sums, in order
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    chunk: int = 1
    split: int = 1


@dataclass(frozen=True)
class Device:
    """arch : 90 for sm_90; 0 for Triton's interpreter. wide : whether `_wide_kernel` runs there."""

    arch: int
    wide: bool = False

    @property
    def ptx(self) -> bool:
        return self.arch > 0


# fp32 block scales are not in the wide kernel; these are the best of a few tries on an H200.
GROUP_TILES = {8: Tile(8, 2, 1, 4, 2), 16: Tile(16, 2, 2, 2, 1, True), None: Tile(64, 2, 4, 2, 1, True)}
NARROW_GROUP_TILES = {8: Tile(8, 1, 1, 4, 2), 16: Tile(16, 1, 4, 4, 1, True), None: Tile(64, 2, 2, 4, 1, True)}
NARROW_N = 8192


@cache
def table() -> tuple[dict[str, Any], ...]:
    """Return the measured tiles, each for its architecture and code width, up to its largest N and M (None: any)."""
    return tuple(json.loads(Path(__file__).with_name("_fragment_tiles.json").read_text()))


@cache
def pick(m: int, n: int, bits: int, scaling: str, device: Device) -> Tile | WideTile:
    """Return the tile for M rows of x, a weight of `n` rows and `bits` a code, and scales applied as `scaling`.

    Widths between those measured have the next wider one's tile; architectures that were not measured, sm_90's.
    """
    if not device.ptx:      # the interpreter's time goes by operations, not by elements
        return Tile(8, 4, 4, 2) if m <= 8 else Tile(64, 4, 4, 2, ordered=True)
    if scaling == "fp32":
        return (GROUP_TILES if n > NARROW_N else NARROW_GROUP_TILES)[8 if m <= 8 else 16 if m <= 16 else None]
    width = next(width for width in (4, 6, 8) if bits <= width)
    archs = {entry["arch"] for entry in table()}
    arch = device.arch if device.arch in archs else 90
    entry = next(
        entry for entry in table()
        if entry["arch"] == arch and entry["bits"] == width
        and (entry["n_max"] is None or n <= entry["n_max"]) and (entry["m_max"] is None or m <= entry["m_max"])
    )
    if "tile" in entry:
        return Tile(**entry["tile"])
    if device.wide:
        return WideTile(**entry["wide"])
    return Tile(min(64, max(16, 1 << (m - 1).bit_length())), 2, 4, 2, 1, True)


@cache
def has_wide(arch: int) -> bool:
    """Return whether `_wide_kernel` can run: on sm_90, whose wgmma it is, with Triton's Gluon from 3.6 on."""
    if arch != 90 or importlib.util.find_spec("triton.experimental.gluon") is None:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def matmul(x: Tensor, weight: Operands, tile: Tile | WideTile, out: Tensor, device: Device) -> None:
    """Write x [M, K] @ weight.T to `out` [M, N]. x is bf16 or fp16 with contiguous rows, which may lie anywhere."""
    k_pad = -(-x.shape[1] // (TILE_K * 32)) * (TILE_K * 32)
    most = min(MOST_ROWS, max(1, INT32 // max(k_pad, x.stride(0)) - 256))     # offsets into x are 32 bits
    for rows, made in zip(x.split(most), out.split(most), strict=True):
        if isinstance(tile, WideTile):
            _launch_wide(rows, weight, tile, made)
        else:
            _launch(rows, weight, fitting(tile, rows), made, device)


def fitting(tile: Tile, x: Tensor) -> Tile:
    """Return the tile, with x put in order first where the kernel cannot read its rows as they are."""
    whole = x.shape[1] % (TILE_K * tile.warps_k * tile.depth) == 0
    if tile.ordered or (whole and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0):
        return tile
    return replace(tile, block_m=max(16, tile.block_m), ordered=True)


_constants = cache(constants)


def _launch(x: Tensor, weight: Operands, tile: Tile, out: Tensor, device: Device) -> None:
    kernels = _triton_modules.kernels("_fragment_kernel", not device.ptx)
    (m, k), (n, _) = x.shape, weight.shape
    n_tiles, k_tiles, _ = weight.packed.shape
    grid = (-(-n_tiles // (tile.groups * tile.warps_n)), -(-m // tile.block_m))
    stride = x.stride(0)
    if tile.ordered:
        stride = grid[1] * tile.block_m // 16
        at_once = tile.warps_k * tile.depth
        padded_tiles = -(-k_tiles // at_once) * at_once
        ordered = x.new_empty(padded_tiles * stride * 16 * TILE_K)
        kernels.order_kernel[(padded_tiles, stride)](x, ordered, m, k, x.stride(0), stride, num_warps=4)
        x = ordered
    scales = weight.packed if weight.scales is None else weight.scales
    kernels.fragment_kernel[grid](
        x, weight.packed, scales, weight.row_scale, out, m, n, k_tiles, n_tiles, stride,
        int(weight.row_scale.numel() > 1), scales.shape[1] if weight.scaling == "fp32" else 0,
        **_constants(weight.fmt, weight.scaling, weight.block, x.dtype == torch.bfloat16), **tile_constants(tile),
        PTX=device.ptx, num_warps=tile.warps_n * tile.warps_k, num_stages=1,
    )


def tile_constants(tile: Tile) -> dict[str, Any]:
    """Return what `fragment_kernel` is compiled for, of a tile."""
    return {"BLOCK_M": tile.block_m, "G": tile.groups, "WN": tile.warps_n, "WK": tile.warps_k, "DEPTH": tile.depth,
            "ORDERED": tile.ordered}


def wide_constants(tile: WideTile, split: int) -> dict[str, Any]:
    """Return what `wide_kernel` is compiled for, of a tile."""
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.stages, "WARPS": tile.warps,
            "SPLIT": split, "CHUNK": tile.chunk}


def _launch_wide(x: Tensor, weight: Operands, tile: WideTile, out: Tensor) -> None:
    wide = _triton_modules.kernels("_wide_kernel", False)
    (m, k), (n, _) = x.shape, weight.shape
    n_tiles, k_tiles, _ = weight.packed.shape
    m_blocks = -(-m // tile.block_m)
    ordered = x.new_empty(m_blocks * tile.block_m, k_tiles * TILE_K)
    wide.permute_kernel[(k_tiles, ordered.shape[0] // 16)](
        x, ordered, m, k, x.stride(0), k_tiles * TILE_K, BLOCK_M=16, num_warps=4)
    scales = weight.packed if weight.scales is None else weight.scales
    split, per_row = min(tile.split, k_tiles), int(weight.row_scale.numel() > 1)
    sums = out if split == 1 else torch.empty(split, m, n, dtype=torch.float32, device=x.device)
    wide.wide_kernel[(m_blocks * -(-n // tile.block_n) * split,)](
        ordered, weight.packed, scales, weight.row_scale, sums, m, n, k_tiles, n_tiles, per_row, m_blocks,
        **_constants(weight.fmt, weight.scaling, weight.block, x.dtype == torch.bfloat16),
        **wide_constants(tile, split), num_warps=tile.warps,
    )
    if split > 1:
        wide.reduce_kernel[(-(-n // 1024), m)](sums, weight.row_scale, out, m, n, per_row, SPLIT=split, BLOCK=1024,
                                               num_warps=4)

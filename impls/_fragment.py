"""x @ weight.T from fragments: the launch of each kernel."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fpxbench.impls import _triton_modules
from fpxbench.impls._fragment_weight import INT32, FragmentOperands, constants
from fpxbench.impls._tiles import AnyTile, StreamTile, Tile, TileDevice
from fpxbench.numbers.packing.fragment import TILE_K, TILE_N

LEAST_DEPENDENT = 90
"""First architecture with programmatic dependent launch: a kernel may begin before the one that it depends on has
ended."""
MOST_ROWS = 1 << 18
"""Rows of x per launch, at most: a grid's second dimension is limited to 65,535 blocks."""
HALF_REGISTERS = 128
"""Registers per thread with which two programs of 256 threads fit on a multiprocessor."""
THIRD_REGISTERS = 168
"""Registers per thread with which one program of 384 threads fits."""
EVEN_COST = 1.04
"""Accepted increase in the time of the longest program, so that no program has parts of two tiles. At 1.03 that was 2
to 25% faster on an H200, at 1.10 up to 6% slower."""


@cache
def has_stream(arch: int) -> bool:
    """Return whether `_stream_kernel` can run: on sm_90, whose wgmma it is, with Triton's Gluon from 3.6 on."""
    if arch != 90 or importlib.util.find_spec("triton.experimental.gluon") is None:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)


def matmul(x: Tensor, weight: FragmentOperands, tile: AnyTile, out: Tensor, device: TileDevice) -> None:
    """Write x [M, K] @ weight.T to `out` [M, N]. x is bf16 or fp16 with contiguous rows, which may lie anywhere."""
    k_pad = -(-x.shape[1] // (TILE_K * 32)) * (TILE_K * 32)
    most = min(MOST_ROWS, max(1, INT32 // max(k_pad, x.stride(0)) - 256))     # offsets into x are 32 bits
    for rows, made in zip(x.split(most), out.split(most), strict=True):
        if isinstance(tile, StreamTile):
            _launch_stream(rows, weight, tile, made)
        else:
            _launch(rows, weight, fitting(tile, rows), made, device)


def fitting(tile: Tile, x: Tensor) -> Tile:
    """Return the tile, changed to one that reorders x first if the kernel cannot read its rows directly."""
    if tile.ordered or (x.shape[1] % TILE_K == 0 and x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0):
        return tile
    return replace(tile, block_m=max(16, tile.block_m), ordered=True)


_constants = cache(constants)


def _launch(x: Tensor, weight: FragmentOperands, tile: Tile, out: Tensor, device: TileDevice) -> None:
    kernels = _triton_modules.kernels("_fragment_kernel", not device.ptx)
    (m, k), (n, _) = x.shape, weight.shape
    n_tiles, k_tiles, _ = weight.packed.shape
    grid = (-(-n_tiles // (tile.groups * tile.warps_n)), -(-m // tile.block_m))
    stride = x.stride(0)
    overlap = overlap_of(tile, device.arch)
    before = {} if overlap in ("none", "x") else {"launch_pdl": True}
    if tile.ordered:
        stride = grid[1] * tile.block_m // 16
        at_once = tile.warps_k * tile.depth
        padded_tiles = -(-k_tiles // at_once) * at_once
        ordered = x.new_empty(padded_tiles * stride * 16 * TILE_K)
        kernels.order_kernel[(padded_tiles, stride)](x, ordered, m, k, x.stride(0), stride,
                                                      DEPENDENT=overlap != "none", num_warps=4, **before)
        x = ordered
    scales = weight.packed if weight.scales is None else weight.scales
    kernels.fragment_kernel[grid](
        x, weight.zeros.view(x.dtype), weight.packed, scales, weight.row_scale, out, m, n, k_tiles, n_tiles, stride,
        int(weight.row_scale.numel() > 1), scales.shape[1] if weight.scaling == "fp32" else 0,
        **_constants(weight.fmt, weight.scaling, weight.block, x.dtype == torch.bfloat16), **tile_constants(tile),
        PTX=device.ptx, TAIL=not tile.ordered and k_tiles % (tile.warps_k * tile.depth) > 0, OVERLAP=overlap,
        num_warps=tile.warps_n * tile.warps_k, num_stages=1,
        **({} if overlap == "none" else {"launch_pdl": True}),
    )


def overlap_of(tile: Tile, arch: int) -> str:
    """Return how `fragment_kernel` overlaps with other kernels: as the tile says, but at least with `order_kernel`."""
    if arch < LEAST_DEPENDENT:
        return "none"
    return "x" if tile.ordered and tile.overlap == "none" else tile.overlap


def tile_constants(tile: Tile) -> dict[str, Any]:
    """Return the compile-time constants of `fragment_kernel` for a tile."""
    return {"BLOCK_M": tile.block_m, "G": tile.groups, "WN": tile.warps_n, "WK": tile.warps_k, "DEPTH": tile.depth,
            "ORDERED": tile.ordered}


def stream_constants(tile: StreamTile) -> dict[str, Any]:
    """Return the compile-time constants of `stream_kernel` for a tile."""
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.stages, "WARPS": tile.warps,
            "CHUNK": tile.chunk, "GROUP": tile.group, "TEAMS": tile.teams, "SLICES": tile.slices,
            "OVERLAP": tile.overlap}


def stream_options(tile: StreamTile) -> dict[str, Any]:
    """Return the options that `stream_kernel` is compiled with, with registers for all its groups of warps."""
    if tile.teams * tile.slices == 1:
        most = None if tile.at_once == 1 else HALF_REGISTERS
    else:
        most = THIRD_REGISTERS if tile.slices < 3 else HALF_REGISTERS
    return {"num_warps": tile.warps, "maxnreg": most}


@cache
def descriptor_layouts(tile: StreamTile, bits: int, halves: int) -> dict[str, tuple[list[int], Any]]:
    """Return the blocks that `stream_kernel`'s descriptors copy, by name, and how they lie in shared memory.

    `halves` is that of the scales: words of codes for 128 columns of a row.
    """
    from triton.experimental.gluon.language import NVMMASharedLayout

    rows, words = tile.block_n // tile.slices // TILE_N, NVMMASharedLayout(128, 32, 3)
    return {"x_desc": ([tile.block_m, TILE_K], NVMMASharedLayout(128, 16, 2)),
            "four_desc": ([rows, bits & 12 or 4, 32], words), "two_desc": ([rows, 2, 32], words),
            "one_desc": ([rows, 1, 32], words),
            "scales_desc": ([rows, 8 * halves], NVMMASharedLayout(32 * halves, 32, 2))}


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def divided(tiles: int, k_tiles: int, programs: int) -> tuple[int, int]:
    """Return how many tiles, those that remain after every program has computed equally many, are divided along K (0:
    none), and how many programs share them.

    The steps of all divided tiles are shared evenly. Sharing among all programs is the most even, but a program with
    steps of two tiles has two sums to store. Fewer programs, each with steps of one tile, share them if that takes at
    most `EVEN_COST` times as long.
    """
    rest = tiles % programs
    if not rest:
        return 0, 1
    sharing = min(programs, rest * k_tiles)
    even = rest * min(programs // rest, k_tiles)
    whole = tiles // programs
    if whole + rest / even <= EVEN_COST * (whole + rest / sharing):
        sharing = even
    return (0, 1) if sharing == rest else (rest, sharing)


def _launch_stream(x: Tensor, weight: FragmentOperands, tile: StreamTile, out: Tensor) -> None:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    stream = _triton_modules.kernels("_stream_kernel", False)
    (m, k), (n, _) = x.shape, weight.shape
    n_tiles, k_tiles, _ = weight.packed.shape
    if x.data_ptr() % 16 or x.stride(0) % 8 or x.stride(0) < k:
        x = x.clone(memory_format=torch.contiguous_format)
    m_blocks, n_blocks = -(-m // tile.block_m), -(-n // tile.block_n)
    tiles = m_blocks * n_blocks
    programs = min(_multiprocessors(x.device) * tile.at_once, tiles * (k_tiles if tile.split else 1))
    rest, sharing = divided(tiles, k_tiles, programs) if tile.split else (0, 1)
    parts = torch.empty((programs + rest) * tile.block_m * tile.block_n if rest else 1, dtype=torch.float32,
                        device=x.device)
    fixed = _constants(weight.fmt, weight.scaling, weight.block, x.dtype == torch.bfloat16, own=True)
    packed = weight.packed.view(n_tiles, k_tiles * weight.fmt.bits, 32)
    scales = packed.view(n_tiles, -1) if weight.scales is None else weight.scales.view(n_tiles, -1)
    operands = {"x_desc": x, "scales_desc": scales}
    descriptors = [TensorDescriptor.from_tensor(operands.get(name, packed), block, layout)
                   for name, (block, layout) in descriptor_layouts(tile, weight.fmt.bits, fixed["HALVES"]).items()]
    full = -(-(tiles - rest) // programs) * programs
    counts = (m, n, int(weight.row_scale.numel() > 1), programs, sharing, full, rest, k_tiles, m_blocks, n_blocks)
    stream.stream_kernel[(programs,)](
        *descriptors, weight.row_scale, out, parts, *counts, **fixed, **stream_constants(tile), **stream_options(tile),
        **({} if tile.overlap == "none" else {"launch_pdl": True}))
    if rest:
        rows, columns = min(32, tile.block_m), 64
        stream.reduce_kernel[(rest, tile.block_n // columns, tile.block_m // rows)](
            parts, weight.row_scale, out, *counts, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUP=tile.group,
            ROWS=rows, COLUMNS=columns, num_warps=4, launch_pdl=True)

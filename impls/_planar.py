"""x @ weight.T from planar rows: which tiles, and the launch.

For what fragments cannot hold, and for GPUs without their instructions (AMD's, NVIDIA's before sm_80). Up to 16 rows of
x can go through a matrix-vector kernel, which is bound by reading the packed weight; from 2 rows on there is a kernel
on matrix instructions. The kernels are in `_triton_kernels`, what makes their decode exact in `_triton_codes`. No
weight is rounded to 16 bits anywhere: block scales multiply fp32 sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fpxbench.impls import _triton_codes as codes
from fpxbench.impls._triton_modules import kernels
from fpxbench.numbers.formats import Format
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.weight import QuantizedWeight

MATVEC_MAX_M = 16
ACTIVATIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Matvec:
    """`rows` rows of the weight per program, `words` 32-bit words of each at a time."""

    rows: int
    words: int
    num_warps: int


@dataclass(frozen=True)
class Dot:
    """A tile of `block_n` rows of the weight and `block_m` of x per program, `block_k` bytes of a row at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


Config = Matvec | Dot


@dataclass(frozen=True)
class Target:
    """What the kernels are compiled for: ``cuda`` and its capability (90 for sm_90), ``hip``, or ``interpreter``."""

    backend: str
    capability: int = 0

    @property
    def interpreted(self) -> bool:
        return self.backend == "interpreter"

    @property
    def warp_size(self) -> int:
        return 64 if self.backend == "hip" else 32      # CDNA; on RDNA's 32 the loads are split in two

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory for tiles that wait for the matrix instructions; the compiler needs some of the
        rest."""
        return {"cuda": 80, "hip": 48, "interpreter": 80}[self.backend] * 1024    # of 99 KiB on sm_89, 64 on gfx942

    def decodes(self, fmt: Format) -> bool:
        """Return whether one instruction decodes `fmt` to fp16: E4M3FN from sm_89 on."""
        return self.backend == "cuda" and self.capability >= 89 and fmt.name == "e4m3fn"


@cache
def target_of(device: torch.device) -> Target:
    if device.type == "cpu":
        return Target("interpreter")
    if torch.version.hip is not None:
        return Target("hip")
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor)


def matvec_configs(m: int, steps: int, target: Target) -> list[Matvec]:
    """Return tiles worth trying for `m` rows of x and `steps` words along a plane; 4 words (16 bytes) per thread.

    On an H100 each was the fastest somewhere; more words or rows never were.
    """
    words_of_warp = 4 * target.warp_size
    widest = max(words_of_warp, 1 << (steps - 1).bit_length())
    return [
        Matvec(rows, warps * words_of_warp, warps)
        for warps in (1, 2, 4) if warps * words_of_warp <= widest
        for rows in (1, 2, 4) if rows * m <= 16
    ]


def default_config(m: int, scheme: Scheme, n: int, k: int, target: Target) -> Config:
    """Return the config that is taken without tuning: one that was never far from the fastest on an H100."""
    if target.interpreted:
        return interpreted_configs(m, scheme, n, k)[0 if m <= 4 else -1]
    if m > 4:
        return dot_configs(m, scheme, k, target)[0]
    known = matvec_configs(m, codes.bytes_of_plane(scheme.element_format, k) // 4, target)
    return next((config for config in known if (config.rows, config.num_warps) == (2, 2)), known[-1])


def worth_trying(m: int, scheme: Scheme, k: int, target: Target) -> list[Config]:
    """Return what the autotuner chooses from, for `m` rows of x."""
    chosen: list[Config] = []
    if m <= MATVEC_MAX_M:
        chosen += matvec_configs(m, codes.bytes_of_plane(scheme.element_format, k) // 4, target)
    if m > 1:
        chosen += dot_configs(m, scheme, k, target)
    return chosen


def interpreted_configs(m: int, scheme: Scheme, n: int, k: int) -> list[Config]:
    """Return one tile per path, as large as these shapes allow: the interpreter's time depends on operations, not on
    elements. Each row of the matrix-vector kernel is an operation, so the rows are divided evenly among the
    programs."""
    dot = fitted(64, 128, 256, 4, scheme, k, Target("interpreter"))
    both: list[Config] = [Matvec(-(-n // -(-n // 64)), 128, 1), dot]
    return both[m > MATVEC_MAX_M:1 + (m > 1)]


def dot_configs(m: int, scheme: Scheme, k: int, target: Target) -> list[Dot]:
    """Return tiles worth trying for `m` rows of x: on an H100 each was the fastest somewhere."""
    if m <= 32:
        block_m = 16 if m <= 16 else 32
        tiles = [(block_m, 64, 128, 4), (block_m, 64, 64, 4), (block_m, 32, 128, 4)]
    else:
        tiles = [(64, 64, 128, 4), (64, 64, 64, 4), (128, 64, 64, 4), (128, 128, 64, 8)]
    return list(dict.fromkeys(fitted(*tile, scheme, k, target) for tile in tiles))    # short blocks make some equal


def fitted(block_m: int, block_n: int, block_k: int, num_warps: int, scheme: Scheme, k: int, target: Target) -> Dot:
    """Return that tile, along K no longer than `longest_tile` and than leaves room for two; staged as deep as there is
    room."""
    block_k = min(block_k, longest_tile(scheme, k))
    fmt = scheme.element_format
    column = 2 * block_m * codes.planes_of(fmt) + block_n * len(codes.loads_of(fmt, k))
    while block_k > 16 and 2 * column * block_k > target.shared_bytes:
        block_k //= 2
    num_stages = min(4, 1 + max(1, target.shared_bytes // (column * block_k)))
    return Dot(block_m, block_n, block_k, num_warps, num_stages)


def longest_tile(scheme: Scheme, k: int) -> int:
    """Return the longest tile along K, a power of two from 16 to 256, that straddles no blocks of scales if
    possible."""
    if scheme.scaling.block is None:
        return 256
    common = math.gcd(scheme.scaling.block, codes.bytes_of_plane(scheme.element_format, k))
    return min(max(common & -common, 16), 256)


def matvec_constants(scheme: Scheme, k: int, m: int, activation: str, target: Target, config: Matvec) -> dict[str, Any]:
    """Return the compile-time constants of `matvec_kernel`."""
    block = scheme.scaling.block
    # Four words of a thread, 16 weights of a plane, then share their scale.
    sharing = 4 if block and block % 16 == 0 and codes.bytes_of_plane(scheme.element_format, k) % 16 == 0 else 1
    return codes.constants(scheme, k, target.decodes(scheme.element_format)) | {
        "PTX": target.backend == "cuda", "SHARING": sharing, "BF16": activation == "bf16",
        "M": m, "ROWS": config.rows, "WORDS": config.words,
    }


def dot_constants(scheme: Scheme, k: int, activation: str, target: Target, config: Dot) -> dict[str, Any]:
    """Return the compile-time constants of `dot_kernel`."""
    import triton.language as tl

    plane = codes.bytes_of_plane(scheme.element_format, k)
    planes_apart = plane % config.block_k == 0 or plane == codes.padded_k(k)
    operand = codes.dot_operand(scheme.element_format, activation, target.interpreted)
    return codes.constants(scheme, k, target.decodes(scheme.element_format)) | {
        "ALIGNED": scheme.scaling.block is None or (scheme.scaling.block % config.block_k == 0 and planes_apart),
        "OPERAND": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[operand],
        "PRECISION": "tf32" if target.backend == "cuda" else "ieee",     # only looked at where OPERAND is fp32
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }


def matmul(x: Tensor, weight: QuantizedWeight, scales: tuple[Tensor, Tensor], config: Config, out: Tensor) -> None:
    """Write x [M, K] @ weight.T to `out` [M, N], with the weight's `scale_tensors`."""
    if x.shape[1] % 32:     # pad copies even where there is nothing to add, which would be a second kernel
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % 32))
    if isinstance(config, Matvec):
        launch_matvec(aligned(x), weight, scales, out, config)
    else:
        launch_dot(aligned(x), weight, scales, out, config)


def launch_matvec(
    x: Tensor, weight: QuantizedWeight, scales: tuple[Tensor, Tensor], out: Tensor, config: Matvec
) -> None:
    """Compute `x` [M, K_pad] @ weight.T into `out` [M, N]."""
    (n, k), target = weight.shape, target_of(x.device)
    constants = matvec_constants(weight.scheme, k, x.shape[0], ACTIVATIONS[x.dtype], target, config)
    kernels("_triton_kernels", target.interpreted).matvec_kernel[(-(-n // config.rows),)](
        x.view(torch.int64), aligned(weight.packed).view(torch.int32), *scales, out, n,
        **constants, num_warps=config.num_warps,
    )


def launch_dot(x: Tensor, weight: QuantizedWeight, scales: tuple[Tensor, Tensor], out: Tensor, config: Dot) -> None:
    """Compute `x` [M, K_pad] @ weight.T into `out` [M, N]."""
    (n, k), m, target = weight.shape, x.shape[0], target_of(x.device)
    constants = dot_constants(weight.scheme, k, ACTIVATIONS[x.dtype], target, config)
    kernels("_triton_kernels", target.interpreted).dot_kernel[(-(-n // config.block_n), -(-m // config.block_m))](
        x, aligned(weight.packed), *scales, out, m, n,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )


def aligned(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a contiguous copy that 16-byte loads may read; views into other tensors can begin
    anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def scale_tensors(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return the scales as the kernels read them, and nv's second level, or the scales again if there is none.

    Scales are passed as stored, except those that no kernel decodes: these become fp32, one per row and block.
    """
    scaling, kind = weight.scheme.scaling, codes.scales_kind(weight.scheme.scaling)
    if kind in ("mx", "nv"):
        scales = weight.scales.contiguous()
        return scales, scales if kind == "mx" else scaling.levels(weight.stored_scales)[1]
    grid = weight.scale_grid() if scaling.block is None else weight.row_scales()
    return grid.contiguous(), grid

"""Decode, product and scale in one Triton kernel, for any scheme up to 8 bits, from planar packed codes.

Up to 16 rows of x go through a matrix-vector kernel, which is bound by reading the packed weight; from 2 rows on a
kernel on matrix instructions is tried as well, and above 16 it is the only one. The kernels are in `_triton_kernels`,
what makes their decode exact in `_triton_codes`. Against float64 their result differs by fp32 accumulation and the
rounding of the output: no weight is rounded to 16 bits anywhere.

Without a GPU the same kernels run in Triton's interpreter, for correctness only.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fpxbench.implementation import Implementation, Support, implementation
from fpxbench.impls import _triton_codes as codes
from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.formats import Format
from fpxbench.numbers.scaling import scaling_named
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.weight import QuantizedWeight

MATVEC_MAX_M = 16
ACTIVATIONS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Matvec:
    """`rows` rows of the weight a program, `words` 32-bit words of each at a time."""

    rows: int
    words: int
    num_warps: int


@dataclass(frozen=True)
class Dot:
    """A tile of `block_n` rows of the weight and `block_m` of x a program, `block_k` bytes of a row at a time."""

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
        """What tiles waiting for the matrix instructions may take; the compiler wants some for itself."""
        return {"cuda": 80, "hip": 48, "interpreter": 80}[self.backend] * 1024    # of 99 KiB on sm_89, 64 on gfx942

    def decodes(self, fmt: Format) -> bool:
        """Whether one instruction decodes `fmt` to fp16: E4M3FN from sm_89 on."""
        return self.backend == "cuda" and self.capability >= 89 and fmt.name == "e4m3fn"


@cache
def target_of(device: torch.device) -> Target:
    if device.type == "cpu":
        return Target("interpreter")
    if torch.version.hip is not None:
        return Target("hip")
    major, minor = torch.cuda.get_device_capability(device)
    return Target("cuda", 10 * major + minor)


@cache
def kernels(interpreted: bool) -> ModuleType:
    """The kernels' module: compiled, or a second copy of it whose functions Triton's interpreter runs.

    Triton decides at the decorator, and a process that interprets everything could not run torch.compile's kernels:
    so the choice is made around this one import.
    """
    from triton import knobs

    name = "_triton_kernels_interpreted" if interpreted else "_triton_kernels"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("_triton_kernels.py"))
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = interpreted
        spec.loader.exec_module(module)
    return module


@implementation("triton_fused")
class TritonFused(Implementation):
    """One Triton kernel decodes, multiplies and scales; matrix-vector for few tokens, matrix instructions for many."""

    def __init__(self) -> None:
        self._fastest: dict[tuple, Config] = {}

    def supports(self, scheme: Scheme, device: str) -> Support:
        if importlib.util.find_spec("triton") is None:
            return Support.no("needs Triton: pip install triton", missing=True)
        if not scheme.quantized:
            return Support.no(f"{scheme.name} has no codes to decode")
        why_not = unread(scheme) or codes.why_not(scheme.format)
        return Support.no(why_not) if why_not else Support.yes()

    def no_timing(self, device: str) -> str | None:
        return "runs in Triton's interpreter: correctness only" if device == "cpu" else None

    def max_elements(self, device: str) -> int | None:
        return 1 << 20 if device == "cpu" else None

    def matmul(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        return self.matmul_with(x, weight, self._pick(x, weight))

    def configs(self, x: Tensor, weight: QuantizedWeight) -> Sequence[Config]:
        m, (_, k), target = x.numel() // x.shape[-1], weight.shape, target_of(x.device)
        return (
            interpreted_configs(m, weight.scheme, k)
            if target.interpreted
            else worth_trying(m, weight.scheme, k, target)
        )

    def matmul_with(self, x: Tensor, weight: QuantizedWeight, config: Config) -> Tensor:
        """Raises ValueError for operands that do not fit together or are not what the kernels take."""
        n, k = weight.shape
        if x.dtype not in ACTIVATIONS or x.shape[-1] != k or x.device != weight.device:
            raise ValueError(
                f"x must be bfloat16 or float16 [..., {k}] on {weight.device}, not {x.dtype} {list(x.shape)} on "
                f"{x.device}"
            )
        rows = x.reshape(-1, k)
        if k % 32:      # pad copies even where there is nothing to add, which would be a second kernel
            rows = torch.nn.functional.pad(rows, (0, -k % 32))
        rows = aligned(rows)
        # The interpreter cuts bf16 results off instead of rounding them.
        out = x.new_empty(rows.shape[0], n, dtype=torch.float32 if x.device.type == "cpu" else x.dtype)
        if rows.shape[0]:
            launch = launch_matvec if isinstance(config, Matvec) else launch_dot
            with torch.cuda.device_of(x):
                launch(rows, weight, out, config)
        return out.to(x.dtype).reshape(*x.shape[:-1], n)

    def _pick(self, x: Tensor, weight: QuantizedWeight) -> Config:
        """The fastest config on this device for such operands, timed with a cold L2 at the first call."""
        candidates = self.configs(x, weight)
        if x.numel() == 0 or x.device.type == "cpu" or torch.cuda.is_current_stream_capturing():
            return candidates[0]
        key = (weight.scheme, weight.shape, x.numel(), x.dtype, x.device)
        if key not in self._fastest:
            from triton.testing import do_bench

            def milliseconds(config: Config) -> float:
                return do_bench(lambda: self.matmul_with(x, weight, config), warmup=3, rep=15, return_mode="median")

            self._fastest[key] = min(candidates, key=milliseconds)
        return self._fastest[key]


def matvec_configs(m: int, steps: int, target: Target) -> list[Matvec]:
    """Tiles worth trying for `m` rows of x and `steps` words along a plane; 4 words (16 bytes) a thread.

    On an H100 each was the fastest somewhere; more words or rows never were.
    """
    words_of_warp = 4 * target.warp_size
    widest = max(words_of_warp, 1 << (steps - 1).bit_length())
    return [
        Matvec(rows, warps * words_of_warp, warps)
        for warps in (1, 2, 4) if warps * words_of_warp <= widest
        for rows in (1, 2, 4) if rows * m <= 16
    ]


def worth_trying(m: int, scheme: Scheme, k: int, target: Target) -> list[Config]:
    """What the autotuner chooses from, for `m` rows of x."""
    chosen: list[Config] = []
    if m <= MATVEC_MAX_M:
        chosen += matvec_configs(m, codes.bytes_of_plane(scheme.format, k) // 4, target)
    if m > 1:
        chosen += dot_configs(m, scheme, k, target)
    return chosen


def interpreted_configs(m: int, scheme: Scheme, k: int) -> list[Config]:
    """One tile a path, as large as these shapes get: the interpreter's time goes by operations, not by elements."""
    dot = fitted(64, 128, 256, 4, scheme, k, Target("interpreter"))
    return [Matvec(64, 128, 1), dot][m > MATVEC_MAX_M:1 + (m > 1)]


def dot_configs(m: int, scheme: Scheme, k: int, target: Target) -> list[Dot]:
    """Tiles worth trying for `m` rows of x: on an H100 each was the fastest somewhere."""
    if m <= 32:
        block_m = 16 if m <= 16 else 32
        tiles = [(block_m, 64, 128, 4), (block_m, 64, 64, 4), (block_m, 32, 128, 4)]
    else:
        tiles = [(64, 64, 128, 4), (64, 64, 64, 4), (128, 64, 64, 4), (128, 128, 64, 8)]
    return list(dict.fromkeys(fitted(*tile, scheme, k, target) for tile in tiles))    # short blocks make some alike


def fitted(block_m: int, block_n: int, block_k: int, num_warps: int, scheme: Scheme, k: int, target: Target) -> Dot:
    """That tile, along K no longer than `longest_tile` and than leaves room for two; staged as deep as there is
    room."""
    block_k = min(block_k, longest_tile(scheme, k))
    column = 2 * block_m * codes.planes_of(scheme.format) + block_n * len(codes.loads_of(scheme.format, k))
    while block_k > 16 and 2 * column * block_k > target.shared_bytes:
        block_k //= 2
    num_stages = min(4, 1 + max(1, target.shared_bytes // (column * block_k)))
    return Dot(block_m, block_n, block_k, num_warps, num_stages)


def longest_tile(scheme: Scheme, k: int) -> int:
    """The longest tile along K, a power of two from 16 to 256, that straddles no blocks of scales if that can be."""
    if scheme.scaling.block is None:
        return 256
    common = math.gcd(scheme.scaling.block, codes.bytes_of_plane(scheme.format, k))
    return min(max(common & -common, 16), 256)


def matvec_constants(scheme: Scheme, k: int, m: int, activation: str, target: Target, config: Matvec) -> dict[str, Any]:
    """Everything that `matvec_kernel` is compiled for."""
    block = scheme.scaling.block
    # Four words of a thread, 16 weights of a plane, then share their scale.
    sharing = 4 if block and block % 16 == 0 and codes.bytes_of_plane(scheme.format, k) % 16 == 0 else 1
    return codes.constants(scheme, k, target.decodes(scheme.format)) | {
        "PTX": target.backend == "cuda", "SHARING": sharing, "BF16": activation == "bf16",
        "M": m, "ROWS": config.rows, "WORDS": config.words,
    }


def dot_constants(scheme: Scheme, k: int, activation: str, target: Target, config: Dot) -> dict[str, Any]:
    """Everything that `dot_kernel` is compiled for."""
    import triton.language as tl

    plane = codes.bytes_of_plane(scheme.format, k)
    planes_apart = plane % config.block_k == 0 or plane == codes.padded_k(k)
    operand = codes.dot_operand(scheme.format, activation, target.interpreted)
    return codes.constants(scheme, k, target.decodes(scheme.format)) | {
        "ALIGNED": scheme.scaling.block is None or (scheme.scaling.block % config.block_k == 0 and planes_apart),
        "OPERAND": {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[operand],
        "PRECISION": "tf32" if target.backend == "cuda" else "ieee",     # only looked at where OPERAND is fp32
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
    }


def launch_matvec(x: Tensor, weight: QuantizedWeight, out: Tensor, config: Matvec) -> None:
    """`x` [M, K_pad] @ weight.T into `out` [M, N]."""
    (n, k), target = weight.shape, target_of(x.device)
    constants = matvec_constants(weight.scheme, k, x.shape[0], ACTIVATIONS[x.dtype], target, config)
    kernels(target.interpreted).matvec_kernel[(-(-n // config.rows),)](
        x.view(torch.int64), aligned(weight.packed).view(torch.int32), *scale_tensors(weight), out, n,
        **constants, num_warps=config.num_warps,
    )


def launch_dot(x: Tensor, weight: QuantizedWeight, out: Tensor, config: Dot) -> None:
    """`x` [M, K_pad] @ weight.T into `out` [M, N]."""
    (n, k), m, target = weight.shape, x.shape[0], target_of(x.device)
    constants = dot_constants(weight.scheme, k, ACTIVATIONS[x.dtype], target, config)
    kernels(target.interpreted).dot_kernel[(-(-n // config.block_n), -(-m // config.block_m))](
        x, aligned(weight.packed), *scale_tensors(weight), out, m, n,
        **constants, num_warps=config.num_warps, num_stages=config.num_stages,
    )


def unread(scheme: Scheme) -> str | None:
    """Why the kernels cannot read what `scheme` stores; None if they can."""
    scaling = scheme.scaling
    if isinstance(scheme.format, Codebook):
        return f"decodes by arithmetic, and {scheme.format.name} is a list of values"
    base = scaling_named(scaling.base_name)
    if (
        scaling.block_rows not in (1, None)
        or scaling.scale_format.format != base.scale_format.format
        or getattr(scaling, "divides", False)
    ):
        return f"has no kernel for scales stored as {scaling.name}'s"
    return None


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a contiguous copy that 16-byte loads may read; views into other tensors can begin anywhere."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def scale_tensors(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Stored scales and nv's second level; in its place, where there is none, a tensor that the kernels do not read."""
    scales = weight.scales.contiguous()
    return scales, scales if weight.tensor_scale is None else weight.tensor_scale

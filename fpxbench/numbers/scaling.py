"""Scales: which weights share one, how it is chosen, and how it is stored.

Sources: OCP Microscaling Formats (MX) v1.0 §5.1 and §6.3 (block 32, E8M0); NVIDIA's NVFP4 (block 16, E4M3 block scale
under one fp32 tensor scale).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.codec import decode, encode
from fpxbench.numbers.formats import FORMATS, Format

E8M0 = FORMATS["e8m0"]
NV_SCALE_FORMAT = FORMATS["e4m3fn"]
KINDS = ("tensor", "row", "group", "mx", "nv")


@dataclass(frozen=True)
class Scaling:
    """A scale rule.

    `kind` is one of ``tensor``, ``row``, ``group``, ``mx``, ``nv``; `block` is the number of neighbours along K that
    share a scale (None for ``tensor`` and ``row``). The last block of a row may be shorter than `block`.
    """

    kind: str
    block: int | None = None

    @property
    def name(self) -> str:
        return f"g{self.block}" if self.kind == "group" else self.kind

    def blocks(self, k: int) -> int:
        """How many scales a row of `k` weights has."""
        return 1 if self.block is None else -(-k // self.block)

    def bits_per_weight(self, n: int, k: int) -> float:
        """What the scales add to each weight of an [n, k] weight, in bits."""
        if self.kind == "tensor":
            return 32 / (n * k)
        stored_bits = 8 if self.kind in ("mx", "nv") else 32
        return stored_bits * self.blocks(k) / k + (32 / (n * k) if self.kind == "nv" else 0)


_FIXED = {
    "tensor": Scaling("tensor"),
    "row": Scaling("row"),
    "mx": Scaling("mx", 32),
    "nv": Scaling("nv", 16),
}


def scaling_named(name: str) -> Scaling:
    """``tensor``, ``row``, ``mx``, ``nv`` or ``gN`` with N from 2 to 65536. Raises ValueError for anything else."""
    if name in _FIXED:
        return _FIXED[name]
    match = re.fullmatch(r"g(\d{1,6})", name)
    if match and 2 <= int(match[1]) <= 65536:
        return Scaling("group", int(match[1]))
    raise ValueError(f"no scaling {name!r}: one of {', '.join(_FIXED)}, or gN for groups of N (2 to 65536) as in g128")


@dataclass(frozen=True)
class Scales:
    """Scales as stored.

    `stored` is fp32 ``[1, 1]`` (tensor), ``[N, 1]`` (row) or ``[N, G]`` (group), or uint8 codes ``[N, G]``: E8M0 for
    mx, E4M3FN for nv. `tensor_scale` is nv's second level, fp32 ``[1]``.
    """

    stored: Tensor
    tensor_scale: Tensor | None = None


def scale_values(scales: Scales, scaling: Scaling) -> Tensor:
    """The factor of each block, fp32, in the shape of ``scales.stored``; nv's tensor scale is folded in."""
    if scaling.kind == "mx":
        return decode(scales.stored, E8M0)
    if scaling.kind == "nv":
        return decode(scales.stored, NV_SCALE_FORMAT) * scales.tensor_scale
    return scales.stored


def spread(block_values: Tensor, scaling: Scaling, n: int, k: int) -> Tensor:
    """Block values ``[N or 1, G]`` repeated to one a weight, ``[N, K]`` (a view where that is possible)."""
    if scaling.block is None:
        return block_values.expand(n, k)
    if torch.compiler.is_compiling():
        # Inductor 2.13 on a CPU reads wrong factors for the last block of a repeat that is cut short and then divided by.
        return block_values.index_select(1, torch.arange(k, device=block_values.device) // scaling.block)
    return block_values.repeat_interleave(scaling.block, dim=1)[:, :k]


def block_amax(weight: Tensor, scaling: Scaling) -> Tensor:
    """Largest magnitude of each block of fp32 `weight` [N, K]: ``[1, 1]``, ``[N, 1]`` or ``[N, G]``."""
    if scaling.kind == "tensor":
        return weight.abs().amax().reshape(1, 1)
    if scaling.block is None:
        return weight.abs().amax(dim=1, keepdim=True)
    n, k = weight.shape
    blocks = scaling.blocks(k)
    padded = torch.nn.functional.pad(weight.abs(), (0, blocks * scaling.block - k))
    return padded.reshape(n, blocks, scaling.block).amax(dim=2)


def choose_scales(weight: Tensor, fmt: Format, scaling: Scaling) -> Scales:
    """The scales under which fp32 `weight` [N, K] is stored in `fmt`. A block of zeros gets the scale 1 (nv: 0)."""
    amax = block_amax(weight, scaling)
    if scaling.kind == "mx":
        return Scales(floor_power_of_two(amax, -fmt.emax))
    if scaling.kind == "nv":
        tensor_scale = (amax.amax() / (fmt.max * NV_SCALE_FORMAT.max)).reshape(1)
        tensor_scale = torch.where(tensor_scale > 0, tensor_scale, 1.0)
        return Scales(encode(amax / fmt.max / tensor_scale, NV_SCALE_FORMAT), tensor_scale)
    scale = amax / fmt.max
    return Scales(torch.where(scale > 0, scale, 1.0))


def floor_power_of_two(x: Tensor, exponent_offset: int = 0) -> Tensor:
    """uint8 E8M0 codes of ``2**(floor(log2(x)) + exponent_offset)`` for fp32 x >= 0, clamped to E8M0's range.

    Zero gives the code of 1.0: MX v1.0 leaves it open, and a scale of 2**-127 would be subnormal in fp32.
    """
    # frexp is exact for subnormals too, where reading the exponent field is not.
    exponent = torch.frexp(x).exponent - 1 + exponent_offset
    code = (exponent + E8M0.bias).clamp(0, E8M0.max_code)
    return torch.where(x > 0, code, E8M0.bias).to(torch.uint8)


def scale_down(weight: Tensor, scales: Scales, scaling: Scaling) -> Tensor:
    """fp32 `weight` [N, K] divided by its scales; a block whose stored scale is 0 (nv, tiny block) becomes 0."""
    values = scale_values(scales, scaling)
    divided = weight / spread(torch.where(values > 0, values, 1.0), scaling, *weight.shape)
    if scaling.kind == "nv":
        divided = torch.where(spread(values > 0, scaling, *weight.shape), divided, 0.0)
    return divided

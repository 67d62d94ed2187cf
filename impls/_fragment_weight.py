"""The operands of `_fragment_kernel` and `_stream_kernel` besides the codes: scales in the codes' order, and constants.

Every code decodes to a 16-bit float by moving its bits, times a power of two that corrects the difference of the
exponent biases: one exact multiplication of two numbers at once, subnormal ones included. The scales of MX and NVFP4
are multiplied into that factor, which is exact too: e2m1 times E4M3 needs 2 + 4 significant bits of bfloat16's 8. They
lie beside the codes as bytes that become the factor's exponent (and mantissa) field by one multiplication and one
addition. Other block scales are fp32 and multiply the sums of a block; a scale of a row multiplies its whole sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.formats import Format
from fpxbench.numbers.packing import layout_named
from fpxbench.numbers.packing.fragment import (
    TILE_K,
    TILE_N,
    Moves,
    moves_for,
    name_for,
    own_moves,
    placed_bits,
    quad_moves,
)
from fpxbench.numbers.scaling import Scaling
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.weight import QuantizedWeight

BF16_MANTISSA, BF16_BIAS = 7, 127
FP16_MANTISSA, FP16_BIAS, FP16_MAX, FP16_LEAST = 10, 15, 65504.0, -24
WIDEST_SPAN = 60
"""Most octaves between the block scales of a row; at twice that, products leave fp32's normal range."""
NV_TOP = 8
"""E4M3's largest exponent, which is taken out of the factors."""
NV_EXPONENT_OFFSET = NV_TOP + 10
"""Difference of the stored exponent, which is 1 for 2**-9, from the factor's."""
INT32 = 1 << 31


@dataclass(frozen=True)
class FragmentOperands:
    """A weight as the kernels take it.

    packed : int32 [N / 8, K / 128, 32 bits], the stored codes
    scales : int32 [N / 8, K / 128, 8, 1 or 2] for ``mx`` and ``nv``, a byte for each 32 columns (of nv, for the first
        and the second half of each 32); fp32 [N / 8, G, 8] for ``fp32``; None for ``none``
    row_scale : fp32 [N] or [1], multiplies whole sums
    scaling : ``none``, ``mx``, ``nv`` or ``fp32``
    block : columns that share an fp32 scale; 0 without
    span : octaves between the block scales of a row, at most (mx)
    """

    fmt: Format
    shape: tuple[int, int]
    packed: Tensor
    scales: Tensor | None
    row_scale: Tensor
    scaling: str
    block: int = 0
    span: int = 0
    zeros: Tensor = field(init=False)
    """int16 [128], read for columns of the activation past its end."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "zeros", self.packed.new_zeros(128, dtype=torch.int16))


def scaling_kind(scaling: Scaling) -> str:
    """Return how the kernels apply block scales: ``none`` (only whole sums are scaled), ``mx`` or ``nv`` codes,
    ``fp32``."""
    if scaling.block is None:
        return "none"
    if scaling.block_rows == 1 and scaling.kind in ("mx", "nv"):
        return scaling.kind
    return "fp32"


def why_not(scheme: Scheme) -> str | None:
    """Return why no weight of the scheme can be multiplied from fragments, in one sentence; None if it can."""
    fmt, kind, block = scheme.format, scaling_kind(scheme.scaling), scheme.scaling.block
    if isinstance(fmt, Codebook) or not fmt.signed:
        return f"{fmt.name} has no sign bit, exponent and mantissa to move into place"
    if not fmt.twos_complement and not -126 <= BF16_BIAS - fmt.bias <= 380:
        return f"{fmt.name}'s bias of {fmt.bias} is out of bfloat16's range"
    significant = fmt.bits if fmt.twos_complement else fmt.mantissa_bits + 1
    if kind == "nv" and significant + 4 > BF16_MANTISSA + 1:
        return f"the product of {fmt.name} and an E4M3 scale has more bits than bfloat16"
    if kind == "fp32" and not (block % TILE_K == 0 or block in (32, 64)):
        return f"blocks of {block} do not end where the instruction's columns do"
    return None


def layout_of(scheme: Scheme, n: int, k: int) -> str | None:
    """Return the layout in which a weight [n, k] of the scheme is multiplied by the kernels; None if it cannot be."""
    if why_not(scheme) or n % TILE_N or k % TILE_N:
        return None
    fmt = scheme.element_format
    name = name_for(_mantissa_bits(fmt))
    words = n * layout_named(name).row_bytes(k, fmt.bits) // 4
    return name if words < INT32 else None      # the kernels' offsets are 32 bits


def operands(weight: QuantizedWeight) -> FragmentOperands | None:
    """Return the kernels' operands for a weight in its `layout_of`, or None if they cannot multiply by its numbers.

    They cannot with codes of NaN or infinity, E8M0 or E4M3 scales that are NaN, negative scales, zero scales of nonzero
    codes, and E8M0 scales of a row that differ by too many octaves.
    """
    scheme, (n, k) = weight.scheme, weight.shape
    fmt, kind = scheme.element_format, scaling_kind(scheme.scaling)
    special = torch.tensor(_specials(fmt), dtype=torch.uint8, device=weight.device)
    codes = weight.codes() if kind == "nv" or len(special) else None
    if len(special) and bool(torch.isin(codes, special).any()):
        return None
    packed = weight.packed.contiguous()
    packed = packed if packed.data_ptr() % 16 == 0 else packed.clone()
    packed = packed.view(torch.int32).view(n // TILE_N, -(-k // TILE_K), 32 * fmt.bits)
    if kind == "none":
        return FragmentOperands(fmt, (n, k), packed, None, _scaled(weight.scale_grid().reshape(-1), _rest(fmt)), kind)
    if kind == "fp32":
        grid = _scaled(weight.row_scales().expand(n, -1), _rest(fmt))
        grid = grid.reshape(n // TILE_N, TILE_N, -1).transpose(1, 2).contiguous()
        return FragmentOperands(fmt, (n, k), packed, grid, grid.new_ones(1), kind, block=scheme.scaling.block)
    if kind == "mx":
        return _mx_operands(weight, packed)
    stored = _nv_scales(weight.scales, codes, fmt, k)
    if stored is None:
        return None
    _, tensor_scale = scheme.scaling.levels(weight.stored_scales)
    row_scale = tensor_scale.reshape(1).float() * (_rest(fmt) * 2.0**NV_TOP)
    return FragmentOperands(fmt, (n, k), packed, stored, row_scale, kind)


def why_not_activation(operands: FragmentOperands, bf16: bool) -> str | None:
    """Return why the weight cannot be multiplied exactly in fp16; None if it can. In bfloat16 it always can."""
    if bf16:
        return None
    fmt = operands.fmt
    smallest = (0 if fmt.twos_complement else 1 - fmt.bias - fmt.mantissa_bits) - operands.span
    if operands.scaling == "nv":
        smallest -= 9 + 3 + NV_TOP
    largest = 2.0 ** (fmt.bits - 1) if fmt.twos_complement else fmt.max
    if not fmt.twos_complement:
        if fmt.bias < 0 or base_field(fmt, False) < 1 or fmt.exponent_bits > 5:
            return f"{fmt.name} is out of fp16's range"
        if fmt.exponent_bits == 5 and fmt.specials != "ieee":
            return f"{fmt.name}'s top exponent is infinity in fp16"
    if smallest < FP16_LEAST or largest > FP16_MAX or base_field(fmt, False) - operands.span < 1:
        return f"{fmt.name} with these scales is out of fp16's range"
    return None


def base_field(fmt: Format, bf16: bool) -> int:
    """Return the exponent field of the 16-bit float 2**(field - bias) that makes a moved code its number."""
    bias = BF16_BIAS if bf16 else FP16_BIAS
    return bias if fmt.twos_complement else min(2 * bias - fmt.bias, 2 * bias)


def constants(fmt: Format, scaling: str, block: int, bf16: bool, own: bool = False) -> dict[str, Any]:
    """Return all compile-time constants of a kernel except the tile's.

    MOVES and FIRST are those of a lane's 16 pairs; with `own`, of the four that share words."""
    mantissa = BF16_MANTISSA if bf16 else FP16_MANTISSA
    stored = placed_bits(fmt.bits, _mantissa_bits(fmt))
    base = base_field(fmt, bf16)
    multiply, add = 0, 0
    if scaling == "mx":
        multiply, add = 1 << mantissa, (base - base_field(fmt, True)) << mantissa
    elif scaling == "nv":
        multiply, add = 1 << (mantissa - 3), (base - NV_EXPONENT_OFFSET) << mantissa
    return {
        "BITS": fmt.bits,
        **_move_constants(moves_for(placed_bits(fmt.bits, _mantissa_bits(fmt), mantissa), stored,
                                    (own_moves if own else quad_moves)(stored))),
        "INT": 1 << (fmt.bits - 1) if fmt.twos_complement else 0,
        "FACTOR": (base << mantissa) * 0x10001,
        "SCALES": scaling if scaling in ("none", "fp32") else "codes",
        "SCALE_MUL": multiply * 0x10001,
        "SCALE_ADD": (add * 0x10001) & 0xFFFFFFFF,
        "HALVES": 2 if scaling == "nv" else 1,
        "BLOCK": block,
        "BF16": bf16,
    }


def _move_constants(pairs: Moves) -> dict[str, Any]:
    """Return MOVES, the pieces of all pairs one after another, and FIRST, where each pair's begin."""
    firsts = [0]
    for pair in pairs:
        firsts.append(firsts[-1] + len(pair))
    return {"MOVES": tuple((move.word, move.shift, move.mask) for pair in pairs for move in pair),
            "FIRST": tuple(firsts)}


def _mantissa_bits(fmt: Format) -> int | None:
    """Return what `placed_bits` takes: None for integers."""
    return None if fmt.twos_complement else fmt.mantissa_bits


def _specials(fmt: Format) -> list[int]:
    """Return the codes of NaN and infinity."""
    return [code for code in range(1 << fmt.bits) if not abs(fmt.value(code)) <= 2.0**128]


def _rest(fmt: Format) -> float:
    """Return the power of two that the factor of 16 bits leaves to the sums."""
    if fmt.twos_complement:
        return 2.0 ** (1 - fmt.bias - fmt.mantissa_bits)
    return 2.0**-min(fmt.bias, 0)


def _scaled(scales: Tensor, power_of_two: float) -> Tensor:
    """Return contiguous fp32 scales, times a power of two; the same tensor if nothing changes."""
    return (scales if power_of_two == 1.0 else scales * power_of_two).contiguous()


def _mx_operands(weight: QuantizedWeight, packed: Tensor) -> FragmentOperands | None:
    """Return MX scales as bytes relative to the largest of each row, which multiplies the row's sum, so that the whole
    range of E8M0 is supported."""
    fmt, (_, k) = weight.scheme.element_format, weight.shape
    base = base_field(fmt, True)
    exponents = weight.scales.to(torch.int32)
    largest = exponents.amax(dim=1, keepdim=True)
    span = int((largest - exponents).amax())
    if bool((exponents == 255).any()) or span > min(WIDEST_SPAN, base - 1):
        return None
    row_scale = torch.exp2(largest.flatten().double() - 127).float() * _rest(fmt)
    fields = _by_tile(base - (largest - exponents), k, 1, base)
    return FragmentOperands(fmt, weight.shape, packed, fields, row_scale, "mx", span=span)


def _nv_scales(scales: Tensor, codes: Tensor, fmt: Format, k: int) -> Tensor | None:
    """Return E4M3 scales with an exponent of 5 bits in the sign's place and no subnormals: int32 [N / 8, K / 128, 8,
    2]."""
    code = scales.to(torch.int32)
    if bool(((code & 0x7F) == 0x7F).any()) or bool((code > 0x80).any()):
        return None
    magnitude = code & 0x7F
    zero = magnitude == 0
    if bool(zero.any()):
        magnitudes = codes if fmt.twos_complement else codes & fmt.magnitude_mask
        if bool(magnitudes[zero.repeat_interleave(16, dim=1)[:, :k]].any()):
            return None
    value = torch.where(magnitude >= 8, (8 + (magnitude & 7)) * torch.exp2((magnitude >> 3).float() - 10),
                        magnitude * 2.0**-9)
    mantissa, exponent = torch.frexp(value)     # in [0.5, 1)
    stored = ((exponent - 1 + 10) << 3) | ((mantissa * 16).to(torch.int32) & 7)
    return _by_tile(torch.where(zero, 8, stored), k, 2, 8)


def _by_tile(values: Tensor, k: int, halves: int, fill: int) -> Tensor:
    """Return bytes [N, blocks] as int32 [N / 8, K / 128, 8, halves]: a byte for each 32 columns; `fill` in the
    padding."""
    n, blocks = values.shape
    k_tiles = -(-k // TILE_K)
    values = torch.nn.functional.pad(values, (0, k_tiles * 4 * halves - blocks), value=fill)
    values = values.view(n // TILE_N, TILE_N, k_tiles, 4, halves).permute(0, 2, 1, 4, 3)
    return values.to(torch.uint8).contiguous().view(-1).view(torch.int32).view(-1, k_tiles, TILE_N, halves)

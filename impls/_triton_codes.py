"""How codes become numbers inside the kernels of `_triton_kernels`: a format, as compile-time constants.

A code is never looked up. Its bits are moved to where a 16-bit float keeps its sign, exponent and mantissa (a *lane*; a
32-bit word carries two), and the difference of the two exponent biases is corrected by a power of two.

``fp16`` lanes
    hold every format of up to 4 exponent bits, and E5 with IEEE specials, whose top exponent is fp16's own infinity
    and NaN. The raw number is ``value * 2**(bias - 15)``; it is never smaller than 2**-24 (codes have at most 10
    mantissa bits), so it is an exact fp16, subnormal codes included, and its product with an activation stays in
    fp32's normal range unless the activation is below 2**-102. The power of two can therefore wait for the sum.
``bf16`` lanes
    hold the others (E5M2FNUZ, whose top exponent is a number; E6, E7). The raw number lies near 2**-127, where products
    would be subnormal, so each weight is multiplied back, in fp32: a power of two, exact.
``int`` lanes
    are the fp16 number 1024 + (code with its sign bit flipped), minus the offset: exact up to 11 bits.

NaN and infinity codes, which the bit move alone turns into numbers, are restored by comparing the raw number.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from fpxbench.numbers.formats import Format
from fpxbench.numbers.packing import padded_k, pieces, row_bytes
from fpxbench.numbers.scaling import Scaling
from fpxbench.numbers.scheme import Scheme

FP16_MAX, FP16_MIN = 65504.0, 2.0**-24
SIGN = 15           # the sign's place in a lane
INTEGER_ONE = 0x6400   # fp16 1024.0: its unit in the last place is 1


@dataclass(frozen=True)
class Lanes:
    """The lanes that a code's bits are moved to. `exponent` is that of the power of two that corrects the bias."""

    kind: str
    mantissa_shift: int
    exponent: int
    specials: str


def lanes_of(fmt: Format) -> Lanes:
    if fmt.twos_complement:
        return Lanes("int", 0, 1 - fmt.bias - fmt.mantissa_bits, "none")
    if fmt.exponent_bits == 5 and fmt.specials == "ieee":
        return Lanes("fp16", 10 - fmt.mantissa_bits, 15 - fmt.bias, "none")   # fp16's own specials
    if fmt.exponent_bits <= 4:
        return Lanes("fp16", 10 - fmt.mantissa_bits, 15 - fmt.bias, fmt.specials)
    return Lanes("bf16", 7 - fmt.mantissa_bits, 127 - fmt.bias, fmt.specials)


def why_not(fmt: Format) -> str | None:
    """Return why the kernels cannot decode `fmt`, in one sentence; None if they can."""
    if not fmt.signed:
        return f"{fmt.name} has no sign bit, which the decode moves into place"
    exponent = lanes_of(fmt).exponent
    if not -126 <= exponent <= 127:
        return f"{fmt.name}'s bias of {fmt.bias} needs a factor of 2**{exponent}, which fp32 does not hold"
    return None


def fits_fp16(fmt: Format) -> bool:
    """Return whether every number of `fmt` is an fp16 (its mantissa is always narrow enough)."""
    return fmt.max <= FP16_MAX and fmt.min_subnormal >= FP16_MIN


def dot_operand(fmt: Format, activation: str, interpreted: bool) -> str:
    """Return the dtype in which ``tl.dot`` multiplies ``bf16`` or ``fp16`` activations by decoded weights, both exact
    in it.

    fp32 stands for TF32 on NVIDIA GPUs, which holds fp16 activations (11 significant bits) and codes (8 at most)
    exactly, over fp32's range.
    """
    if activation == "bf16":
        return "fp32" if interpreted else "bf16"    # the interpreter's bf16 dot multiplies the raw bits
    return "fp16" if lanes_of(fmt).kind != "bf16" or fits_fp16(fmt) else "fp32"


def moves_of(fmt: Format) -> tuple[tuple[int, int, int, int, int, int], ...]:
    """Return each run of bits that moves as one: ``(word, stretches, piece width, bit of the piece, run width, bit of
    the lane)``.

    A step along K decodes as many planes as the narrowest piece has. Those planes fall into `stretches` stretches of a
    piece; the words (or bytes) that a step loads are numbered piece by piece, and `word` is the piece's first.
    """
    lanes = lanes_of(fmt)
    magnitude_bits = fmt.bits if lanes.kind == "int" else fmt.bits - 1
    moves, word = [], 0
    for offset, width in pieces(fmt.bits):
        stretches = planes_of(fmt) * width // 8
        low = min(width, magnitude_bits - offset)
        if low > 0:
            moves.append((word, stretches, width, 0, low, offset + lanes.mantissa_shift))
        if low < width:
            moves.append((word, stretches, width, low, 1, SIGN))
        word += stretches
    return tuple(moves)


def planes_of(fmt: Format) -> int:
    """Return the planes of the narrowest piece: the weights that one step along K decodes from each byte column."""
    return 8 // pieces(fmt.bits)[-1][1]


def loads_of(fmt: Format, k: int) -> tuple[int, ...]:
    """Return the byte offset in a row of each word that a step loads, for the first step of the row."""
    k_pad = padded_k(k)
    offsets, start = [], 0
    for _, width in pieces(fmt.bits):
        stretches = planes_of(fmt) * width // 8
        offsets += [start + stretch * (k_pad // planes_of(fmt)) for stretch in range(stretches)]
        start += k_pad * width // 8
    return tuple(offsets)


def bytes_of_plane(fmt: Format, k: int) -> int:
    """Return the bytes of one plane of a row of `k` codes: the steps along K cover these."""
    return padded_k(k) // planes_of(fmt)


def raw_special(fmt: Format) -> float:
    """Return the magnitude that the bit move gives the code of infinity (ieee) or of NaN (fn); 0 where none is looked
    for."""
    lanes = lanes_of(fmt)
    code = {"ieee": fmt.infinity_code, "fn": fmt.nan_code}.get(lanes.specials, 0)
    lane = code << lanes.mantissa_shift
    if lanes.kind == "bf16":
        return struct.unpack("<f", struct.pack("<I", lane << 16))[0]
    return struct.unpack("<e", struct.pack("<H", lane))[0]


def scales_kind(scaling: Scaling) -> str:
    """Return how the kernels read scales: ``mx`` and ``nv`` as codes; as fp32 one for all (``tensor``), one a ``row``,
    or one for each row and block (``group``)."""
    if scaling.block is None:
        return "tensor" if scaling.block_rows is None else "row"
    return scaling.kind if scaling.block_rows == 1 and scaling.kind in ("mx", "nv") else "group"


def constants(scheme: Scheme, k: int, native: bool) -> dict[str, Any]:
    """Return the constants by which both kernels read rows of `k` planar codes and their scales.

    `native`: the codes are decoded by an instruction of the device's.
    """
    fmt, scaling = scheme.element_format, scheme.scaling
    lanes = lanes_of(fmt)
    factor = 1.0 if native else 2.0**lanes.exponent
    per_weight = lanes.kind == "bf16"
    return {
        "K_PAD": padded_k(k),
        "ROW_BYTES": row_bytes(k, fmt.bits, "planar"),
        "PLANES": planes_of(fmt),
        "LOADS": loads_of(fmt, k),
        "MOVES": moves_of(fmt),
        "LANES": lanes.kind,
        "FLIP": INTEGER_ONE | 1 << (fmt.bits - 1) if lanes.kind == "int" else 0,
        "SPECIALS": lanes.specials,
        "SPECIAL": raw_special(fmt),
        "WEIGHT_FACTOR": factor if per_weight else 1.0,
        "SUM_FACTOR": 1.0 if per_weight else factor,
        "NATIVE": native,
        "SCALES": scales_kind(scaling),
        "BLOCK": scaling.block or 0,
        "GROUPS": scaling.blocks(k),
    }

"""Every fault that `fault_injection` can make in a weight of a scheme, with the kind that a diagnosis should name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.formats import FP32
from fpxbench.records.kinds import Kind


@dataclass(frozen=True)
class Injection:
    """One fault: its kind, the keywords that make it, and whether it is made in storing."""

    kind: Kind
    about: str
    how: dict
    storing: bool = False
    alone: bool = False
    """Shown only where all else is right: by many outputs together, and by none of them."""

    def made_with(self, other: Injection) -> bool:
        return self.storing == other.storing and not set(self.how) & set(other.how) and not (self.alone or other.alone)


def reading(kind, about, *, alone=False, **how):
    return Injection(kind, about, how, alone=alone)


def storing(kind, about, **how):
    return Injection(kind, about, how, storing=True)


def injections(scheme, layout="planar") -> list[Injection]:
    """Return every fault that can be injected in reading or storing a weight of `scheme`."""
    faults = [*_decoding(scheme.format), *_order(scheme.format, layout), *_scales(scheme), *_blocks(scheme.scaling)]
    return faults if isinstance(scheme.format, Codebook) else [*faults, *_rounding(scheme)]


SIBLINGS = {
    "e4m3fn": ("e4m3fnuz", "fnuz"), "e5m2": ("e5m2fnuz", "fnuz"),
    "e4m3fnuz": ("e4m3fn", "fn"), "e5m2fnuz": ("e5m2", "ieee"),
}
MISTAKEN_FOR = {"e3m2": "e2m3", "e2m3": "e3m2", "e4m3fn": "e5m2", "e5m2": "e4m3fn"}


def _decoding(fmt) -> Iterator[Injection]:
    if fmt.name in SIBLINGS:
        other, specials = SIBLINGS[fmt.name]
        step = 1 if specials == "fnuz" else -1
        read_as, stored_as = (Kind.FN_AS_FNUZ, Kind.FNUZ_AS_FN)[::step]
        yield reading(read_as, "read as the sibling", bias=step, specials=specials)
        yield reading(Kind.SCALED, "read with the sibling's bias only", bias=step)
        yield storing(stored_as, "the sibling's codes", target=other)
    listed = isinstance(fmt, Codebook)      # no fields that could be misread
    if listed:
        yield reading(Kind.SIGN_LOST, "sign dropped", sign_lost=True)
    elif fmt.twos_complement:
        yield reading(Kind.SIGN_LOST, "read as unsigned", unsigned=True)
    else:
        yield reading(Kind.SIGN_LOST, "sign dropped", sign_lost=True)
        yield reading(Kind.SUBNORMAL_FLUSHED, "subnormals read as zero", flush=True)
        yield reading(Kind.SUBNORMAL_WRONG, "implicit one", implicit_one=True)
        yield reading(Kind.SUBNORMAL_WRONG, "subnormals halved", halved=True)
        yield reading(Kind.TRUNCATED, "lowest mantissa bit dropped", dropped=1)
        yield storing(Kind.SUBNORMAL_FLUSHED, "subnormals stored as zero", flushed=True)
        if fmt.specials != "fnuz":
            yield reading(Kind.NEGATIVE_ZERO, "-0 read as NaN", minus_zero_nan=True)
        else:
            yield storing(Kind.NEGATIVE_ZERO, "NaN stored for -0", minus_zero=True)
    if not listed and fmt.has_nan:
        yield reading(Kind.NAN_CODE_LOST, "NaN read as a number", specials="none")
        yield reading(Kind.NAN_CODE_LOST, "NaN read as zero", nan_zero=True)
    yield reading(Kind.FORMAT_MISTAKEN, "bits in reverse order", bit_order=list(reversed(range(fmt.bits))))
    if not listed and not fmt.twos_complement and fmt.specials != "fnuz":
        yield reading(Kind.FORMAT_MISTAKEN, "two's complement", complement=True)
    if fmt.name in MISTAKEN_FOR:
        other = MISTAKEN_FOR[fmt.name]
        yield reading(Kind.FORMAT_MISTAKEN, f"read as {other}", other_format=other)


def _order(fmt, layout) -> Iterator[Injection]:
    yield reading(Kind.OUTPUT_PERMUTED, "output features of five rows before", output_roll=5)
    if layout == "planar" and 4 <= fmt.bits < 8:
        yield reading(Kind.NIBBLE_SWAP, "nibbles exchanged", nibbles=True)
    if layout == "planar" and 4 < fmt.bits < 8:
        yield reading(Kind.PLANE_SWAP, "planes backwards", planes=True)
        yield reading(Kind.PLANE_SWAP, "pieces exchanged", pieces=True)
    if layout == "planar" and fmt.bits < 8:
        yield reading(Kind.PLANE_SWAP, "planes as neighbours", neighbours=True)
        yield reading(Kind.PLANE_SWAP, "planes as neighbours, high first", neighbours="high")
    yield reading(Kind.NIBBLE_SWAP if fmt.bits == 4 else Kind.PLANE_SWAP, "k ^ 1", pairs=True)
    if fmt.bits == 8:
        yield reading(Kind.NIBBLE_SWAP, "code's nibbles exchanged", code_nibbles=True)


def _scales(scheme) -> Iterator[Injection]:
    fmt, scales = scheme.format, scheme.scaling.scale_format
    yield reading(Kind.SCALE_MISSING, "no scale", no_scale=True)
    if scheme.scaling.has_tensor_scale:
        yield reading(Kind.GLOBAL_SCALE_MISSING, "no tensor scale", no_tensor_scale=True)
        yield reading(Kind.SCALE_MISSING, "no block scale", no_block_scale=True)
        yield reading(Kind.FN_AS_FNUZ, "block scales as FNUZ", e4m3_bias=1)
        yield reading(Kind.GLOBAL_SCALE_INVERTED, "divided by the tensor scale", tensor_power=-1.0)
        yield reading(Kind.GLOBAL_SCALE_MISREAD, "tensor scale squared", tensor_power=2.0)
        yield reading(Kind.GLOBAL_SCALE_MISREAD, "tensor scale through bf16", alone=True, tensor_dtype=torch.bfloat16)
        yield reading(Kind.SCALE_ENDS_LOST, "subnormal scales read as zero", e4m3_flush=True)
    if scales.powers_of_two:
        yield reading(Kind.SCALED, "exponent one too high", exponent=1)
        yield reading(Kind.SCALED, "exponent one too low", exponent=-1)
        yield reading(Kind.SCALE_ENDS_LOST, "E8M0 by a shift", by_shift=True)
        yield reading(Kind.SCALE_NARROWED, "scales through fp16", scale_dtype=torch.float16)
        yield storing(Kind.SCALE_ONE_STEP_HIGH, "exponent stored one too high", exponent_up=1)
        yield storing(Kind.SCALE_ONE_STEP_LOW, "exponent stored one too low", exponent_up=-1)
    if scales.coded:
        yield reading(Kind.SCALE_BITS_AS_VALUE, "scale bits as an integer", as_integer=True)
    yield reading(Kind.SCALE_SQUARED, "scale squared", power=2.0)
    yield reading(Kind.SCALE_INVERTED, "divided by the scale", power=-1.0)
    if scales.coded:
        return
    yield reading(Kind.SCALE_NARROWED, "scales through fp16", scale_dtype=torch.float16)
    if scales.format == FP32:
        yield reading(Kind.SCALE_NARROWED, "scales through bf16", alone=True, scale_dtype=torch.bfloat16)
    yield reading(Kind.SCALE_NARROWED, "scales clamped", clamp_scale=(2.0**-10, 2.0**10))
    if fmt.name in ("e4m3fn", "e4m3fnuz"):
        maximum = 240 if fmt.name == "e4m3fn" else 448
        yield reading(Kind.WRONG_MAX, "scale of another maximum", ratio=fmt.max / maximum)
        yield storing(Kind.WRONG_MAX, "scale of another maximum", maximum=maximum)
    yield reading(Kind.SCALED, "half of each scale", ratio=0.5)
    yield reading(Kind.SCALED, "0.3 of each scale", ratio=0.3)


def _blocks(scaling) -> Iterator[Injection]:
    if scaling.name == "row":
        yield reading(Kind.SCALE_TRANSPOSED, "row scales along K", along_k=True)
    if scaling.block:
        yield reading(Kind.SCALE_TRANSPOSED, "grid transposed", transposed=True)
        yield reading(Kind.BLOCK_OFF_BY_ONE, "a column late", late=1)
        if scaling.block_rows == 1:
            yield reading(Kind.SCALE_SWIZZLED, "scales read in tiles", swizzled=True)
        yield reading(Kind.SCALE_SHARED, "two blocks share a scale", shared_blocks=2)
        yield reading(Kind.SCALE_SHARED, "four rows share scales", shared_rows=4)
        yield reading(Kind.BLOCK_SIZE_MISTAKEN, "blocks twice as long", block_size=2 * scaling.block)
    if scaling.name != "tensor":
        yield reading(Kind.BLOCK_OFF_BY_ONE, "the next scale", next_block=1)
        yield reading(Kind.SCALE_MISSING, "a constant for rows 8 to 15",
                      constant=(slice(8, 16), slice(None), 0.25))
    if scaling.block:
        yield reading(Kind.SCALE_MISSING, "a constant past column 128",
                      constant=(slice(None), slice(128, None), 1.0))


def _rounding(scheme) -> Iterator[Injection]:
    fmt, scales = scheme.format, scheme.scaling.scale_format
    yield storing(Kind.TRUNCATED, "toward zero", rounding="zero")
    yield storing(Kind.TRUNCATED, "down", rounding="down")
    yield storing(Kind.TIES_AWAY, "ties away", rounding="away")
    yield storing(Kind.TIES_NOT_EVEN, "ties to zero", rounding="half_zero")
    yield storing(Kind.TIES_NOT_EVEN, "ties up", rounding="half_up")
    if scheme.scaling.has_tensor_scale:
        yield storing(Kind.SCALE_ROUNDED_LATE, "codes under unrounded scales", late_scale=True)
    if fmt.mantissa_bits + fmt.exponent_bits > 3:
        yield storing(Kind.DOUBLE_ROUNDING, "by way of bf16", twice="bf16")
    yield storing(Kind.SIGN_LOST, "magnitudes stored", positive=True)
    if fmt.has_nan and scales.powers_of_two:
        yield storing(Kind.OVERFLOW_NAN, "NaN past the maximum", overflow="nan")
    if fmt.has_infinity and scales.powers_of_two:
        yield storing(Kind.OVERFLOW_INF, "infinity past the maximum", overflow="inf")
    if fmt.bits == 8 and not fmt.is_integer:
        yield storing(Kind.SATURATED, "clamped at half the maximum", clamp=fmt.max / 2)

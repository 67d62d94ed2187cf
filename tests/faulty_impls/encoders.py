"""Weights stored wrongly; what is stored is multiplied rightly."""

import torch

from fpxbench.diagnosis.decode_faults import is_subnormal
from fpxbench.implementation import implementation
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.tensor_codec import Overflow, Rounding, encode

from ._right import RightEncoder, faulty, swapped


@faulty("encode", base=RightEncoder)
def truncated(self, values, fmt):
    """Rounds toward zero."""
    return encode(values, fmt, rounding=Rounding.TOWARD_ZERO)


@faulty("encode", base=RightEncoder)
def ties_away(self, values, fmt):
    """Rounds halves away from zero."""
    return encode(values, fmt, rounding=Rounding.NEAREST_AWAY)


@faulty("encode", base=RightEncoder)
def double_rounding(self, values, fmt):
    """Rounds to bf16 on the way."""
    return encode(values.bfloat16(), fmt)


@faulty("encode", "mxfp8_e4m3fn", base=RightEncoder)
def overflow_nan(self, values, fmt):
    """Stores NaN past the maximum, as PyTorch's cast to E4M3FN did."""
    return encode(values, fmt, overflow=Overflow.NAN)


@faulty("encode", "mxfp8_e5m2", base=RightEncoder)
def overflow_inf(self, values, fmt):
    """Stores infinity past the maximum, as PyTorch's cast to E5M2 does."""
    return encode(values, fmt, overflow=Overflow.INFINITY)


@faulty("encode", base=RightEncoder)
def saturated(self, values, fmt):
    """Clamps E4M3FN at the maximum of E4M3FNUZ."""
    return encode(values.clamp(-240, 240), fmt)


@faulty("encode", "e4m3fnuz-row", base=RightEncoder)
def negative_zero(self, values, fmt):
    """Keeps the sign of a zero, where FNUZ has NaN."""
    codes = encode(values, fmt)
    return codes.masked_fill((codes == 0) & (values < 0), 0x80)


@faulty("encode", base=RightEncoder)
def sign_lost_when_stored(self, values, fmt):
    """Stores magnitudes."""
    return encode(values.abs(), fmt)


@faulty("encode", base=RightEncoder)
def subnormal_flushed_when_stored(self, values, fmt):
    """Stores subnormals as zero."""
    codes = encode(values, fmt)
    return codes.masked_fill(is_subnormal(fmt).to(codes.device)[codes.int()], 0)


@faulty("encode", base=RightEncoder)
def fnuz_codes_stored(self, values, fmt):
    """Stores E4M3FNUZ's codes where E4M3FN's are asked for."""
    return encode(values, FORMATS["e4m3fnuz"])


@faulty("encode", "mxfp4", base=RightEncoder)
def nibble_swap_when_stored(self, values, fmt):
    """Packs the halves of a row in the wrong order."""
    return swapped(encode(values, fmt), (1, 0))


@implementation("faulty_wrong_max")
class WrongMax(RightEncoder):
    """Takes the scale from FNUZ's maximum."""

    def scales(self, weight, scheme):
        return Scales(weight.abs().amax(dim=1, keepdim=True) / 240)


@implementation("faulty_wrong_max_overflowing")
class WrongMaxOverflowing(WrongMax):
    """Takes E4M3FNUZ's scale from FN's maximum, and stores what overflows as NaN: two faults."""

    schemes = ("e4m3fnuz-row",)

    def scales(self, weight, scheme):
        return Scales(weight.abs().amax(dim=1, keepdim=True) / 448)

    def encode(self, values, fmt):
        return encode(values, fmt, overflow=Overflow.NAN)


@faulty("stored", "e4m3fn-g32", base=RightEncoder)
def scale_transposed_when_stored(self, scales):
    """Stores the scale grid column by column."""
    return Scales(scales.stored.T.reshape(scales.stored.shape).contiguous(), scales.tensor_scale)


@faulty("scales", "mxfp4", base=RightEncoder)
def scale_exponent_when_stored(self, weight, scheme):
    """Stores E8M0 exponents one too high."""
    return Scales(RightEncoder.scales(self, weight, scheme).stored + 1)


@faulty("encode", base=RightEncoder)
def random_codes(self, values, fmt):
    """Stores codes that have nothing to do with the weight."""
    return torch.randint_like(encode(values, fmt), fmt.max_code)

"""Weights stored wrongly; what is stored is multiplied rightly."""

import torch

from fpxbench.diagnosis.decode_faults import is_subnormal
from fpxbench.implementation import implementation
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.tensor_codec import Overflow, Rounding, encode

from ._right import RightEncoder, swapped


@implementation("faulty_truncated")
class Truncated(RightEncoder):
    """Rounds toward zero."""

    def encode(self, values, fmt):
        return encode(values, fmt, rounding=Rounding.TOWARD_ZERO)


@implementation("faulty_ties_away")
class TiesAway(RightEncoder):
    """Rounds halves away from zero."""

    def encode(self, values, fmt):
        return encode(values, fmt, rounding=Rounding.NEAREST_AWAY)


@implementation("faulty_double_rounding")
class DoubleRounding(RightEncoder):
    """Rounds to bf16 on the way."""

    def encode(self, values, fmt):
        return encode(values.bfloat16(), fmt)


@implementation("faulty_overflow_nan")
class OverflowNan(RightEncoder):
    """Stores NaN past the maximum, as PyTorch's cast to E4M3FN did."""

    schemes = ("mxfp8_e4m3fn",)

    def encode(self, values, fmt):
        return encode(values, fmt, overflow=Overflow.NAN)


@implementation("faulty_overflow_inf")
class OverflowInf(RightEncoder):
    """Stores infinity past the maximum, as PyTorch's cast to E5M2 does."""

    schemes = ("mxfp8_e5m2",)

    def encode(self, values, fmt):
        return encode(values, fmt, overflow=Overflow.INFINITY)


@implementation("faulty_saturated")
class Saturated(RightEncoder):
    """Clamps E4M3FN at the maximum of E4M3FNUZ."""

    def encode(self, values, fmt):
        return encode(values.clamp(-240, 240), fmt)


@implementation("faulty_negative_zero")
class NegativeZero(RightEncoder):
    """Keeps the sign of a zero, where FNUZ has NaN."""

    schemes = ("e4m3fnuz-row",)

    def encode(self, values, fmt):
        codes = encode(values, fmt)
        return codes.masked_fill((codes == 0) & (values < 0), 0x80)


@implementation("faulty_sign_lost_when_stored")
class SignLostWhenStored(RightEncoder):
    """Stores magnitudes."""

    def encode(self, values, fmt):
        return encode(values.abs(), fmt)


@implementation("faulty_subnormal_flushed_when_stored")
class SubnormalFlushedWhenStored(RightEncoder):
    """Stores subnormals as zero."""

    def encode(self, values, fmt):
        codes = encode(values, fmt)
        return codes.masked_fill(is_subnormal(fmt).to(codes.device)[codes.int()], 0)


@implementation("faulty_fnuz_codes_stored")
class FnuzCodesStored(RightEncoder):
    """Stores E4M3FNUZ's codes where E4M3FN's are asked for."""

    def encode(self, values, fmt):
        return encode(values, FORMATS["e4m3fnuz"])


@implementation("faulty_nibble_swap_when_stored")
class NibbleSwapWhenStored(RightEncoder):
    """Packs the halves of a row in the wrong order."""

    schemes = ("mxfp4",)

    def encode(self, values, fmt):
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


@implementation("faulty_scale_transposed_when_stored")
class ScaleTransposedWhenStored(RightEncoder):
    """Stores the scale grid column by column."""

    schemes = ("e4m3fn-g32",)

    def stored(self, scales):
        return Scales(scales.stored.T.reshape(scales.stored.shape).contiguous(), scales.tensor_scale)


@implementation("faulty_scale_exponent_when_stored")
class ScaleExponentWhenStored(RightEncoder):
    """Stores E8M0 exponents one too high."""

    schemes = ("mxfp4",)

    def scales(self, weight, scheme):
        return Scales(super().scales(weight, scheme).stored + 1)


@implementation("faulty_random_codes")
class RandomCodes(RightEncoder):
    """Stores codes that have nothing to do with the weight."""

    def encode(self, values, fmt):
        return torch.randint_like(encode(values, fmt), fmt.max_code)

"""Codes decoded by another definition than their format's."""

import torch

from fpxbench.diagnosis.decode_faults import is_subnormal
from fpxbench.implementation import implementation
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.tensor_codec import decode_table

from ._right import Right


@implementation("faulty_fnuz_as_fn")
class FnuzAsFn(Right):
    """Reads E4M3FNUZ with E4M3FN's bias, as Triton 3.0 did on sm_89."""

    schemes = ("e4m3fnuz-row",)

    def table(self, fmt):
        return decode_table(FORMATS["e4m3fn"])


@implementation("faulty_fn_as_fnuz")
class FnAsFnuz(Right):
    """Reads E4M3FN as E4M3FNUZ."""

    schemes = ("e4m3fn-row", "mxfp8_e4m3fn")

    def table(self, fmt):
        return decode_table(FORMATS["e4m3fnuz"])


@implementation("faulty_subnormal_flushed")
class SubnormalFlushed(Right):
    """Reads subnormals as zero."""

    def table(self, fmt):
        return decode_table(fmt).masked_fill(is_subnormal(fmt), 0.0)


@implementation("faulty_subnormal_wrong")
class SubnormalWrong(Right):
    """Gives subnormals the implicit one of normals."""

    def table(self, fmt):
        right = decode_table(fmt)
        return torch.where(is_subnormal(fmt), right + right.sign() * fmt.min_normal, right)


@implementation("faulty_one_subnormal_wrong")
class OneSubnormalWrong(Right):
    """Reads one subnormal code as another number, in a way that no known fault would."""

    def table(self, fmt):
        return decode_table(fmt).index_fill(0, torch.tensor([3]), 1.7 * fmt.min_normal)


@implementation("faulty_sign_lost")
class SignLost(Right):
    """Drops the sign bit."""

    def table(self, fmt):
        return decode_table(fmt).abs()


@implementation("faulty_int8_unsigned")
class Int8Unsigned(Right):
    """Reads two's complement as unsigned."""

    schemes = ("int8-row",)

    def table(self, fmt):
        return torch.arange(256).float()


@implementation("faulty_negative_zero_read_as_nan")
class NegativeZeroAsNan(Right):
    """Takes the code of -0 for FNUZ's NaN, all else being right."""

    def table(self, fmt):
        return decode_table(fmt).index_fill(0, torch.tensor([1 << (fmt.bits - 1)]), torch.nan)


@implementation("faulty_mantissa_bit_dropped")
class MantissaBitDropped(Right):
    """Decodes without the lowest mantissa bit."""

    def codes(self, weight):
        return weight.codes() & 0xFE


@implementation("faulty_one_code_wrong")
class OneCodeWrong(Right):
    """Decodes one normal code to its neighbour."""

    def table(self, fmt):
        right = decode_table(fmt)
        right[0x40] = right[0x41]
        return right


@implementation("faulty_nan_code_lost")
class NanCodeLost(Right):
    """A decoder without NaN: no weight that a quantizer stores shows it."""

    def table(self, fmt):
        return super().table(fmt).nan_to_num(480.0)


@implementation("faulty_format_mistaken")
class FormatMistaken(Right):
    """E3M2's codes through the table of E2M3."""

    schemes = ("mxfp6_e3m2",)

    def table(self, fmt):
        return super().table(FORMATS["e2m3"])


@implementation("faulty_second_half_scales")
class SecondHalfScales(Right):
    """Multiplies in two halves of K, both by the scales of the first."""

    schemes = ("nvfp4",)

    def factors(self, weight):
        factors = super().factors(weight)
        half = factors.shape[1] // 2
        return factors if factors.shape[1] % 32 else torch.cat([factors[:, :half]] * 2, dim=1)

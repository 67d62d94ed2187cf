"""Codes decoded by another definition than their format's."""

import torch

from fpxbench.diagnosis.decode_faults import is_subnormal
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.tensor_codec import decode_table

from ._right import Right, faulty


@faulty("table", "e4m3fnuz-row")
def fnuz_as_fn(self, fmt):
    """Reads E4M3FNUZ with E4M3FN's bias, as Triton 3.0 did on sm_89."""
    return decode_table(FORMATS["e4m3fn"])


@faulty("table", "e4m3fn-row", "mxfp8_e4m3fn")
def fn_as_fnuz(self, fmt):
    """Reads E4M3FN as E4M3FNUZ."""
    return decode_table(FORMATS["e4m3fnuz"])


@faulty("table")
def subnormal_flushed(self, fmt):
    """Reads subnormals as zero."""
    return decode_table(fmt).masked_fill(is_subnormal(fmt), 0.0)


@faulty("table")
def subnormal_wrong(self, fmt):
    """Gives subnormals the implicit one of normals."""
    right = decode_table(fmt)
    return torch.where(is_subnormal(fmt), right + right.sign() * fmt.min_normal, right)


@faulty("table")
def one_subnormal_wrong(self, fmt):
    """Reads one subnormal code as another number, in a way that no known fault would."""
    return decode_table(fmt).index_fill(0, torch.tensor([3]), 1.7 * fmt.min_normal)


@faulty("table")
def sign_lost(self, fmt):
    """Drops the sign bit."""
    return decode_table(fmt).abs()


@faulty("table", "int8-row")
def int8_unsigned(self, fmt):
    """Reads two's complement as unsigned."""
    return torch.arange(256).float()


@faulty("table")
def negative_zero_read_as_nan(self, fmt):
    """Takes the code of -0 for FNUZ's NaN, all else being right."""
    return decode_table(fmt).index_fill(0, torch.tensor([1 << (fmt.bits - 1)]), torch.nan)


@faulty("codes")
def mantissa_bit_dropped(self, weight):
    """Decodes without the lowest mantissa bit."""
    return weight.codes() & 0xFE


@faulty("table")
def one_code_wrong(self, fmt):
    """Decodes one normal code to its neighbour."""
    right = decode_table(fmt)
    right[0x40] = right[0x41]
    return right


@faulty("table")
def nan_code_lost(self, fmt):
    """A decoder without NaN: no weight that a quantizer stores shows it."""
    return Right.table(self, fmt).nan_to_num(480.0)


@faulty("table", "mxfp6_e3m2")
def format_mistaken(self, fmt):
    """E3M2's codes through the table of E2M3."""
    return Right.table(self, FORMATS["e2m3"])


@faulty("factors", "nvfp4")
def second_half_scales(self, weight):
    """Multiplies in two halves of K, both by the scales of the first."""
    factors = Right.factors(self, weight)
    half = factors.shape[1] // 2
    return factors if factors.shape[1] % 32 else torch.cat([factors[:, :half]] * 2, dim=1)

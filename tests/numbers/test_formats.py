"""The number of each code: the table of formats, its corners, and two libraries that decode independently."""

import math
from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import pytest
from gfloat.formats import format_info_ocp_e8m0
from gfloat.types import Domain

from fpxbench.numbers.formats import FORMATS, Format, format_named

# name: (exponent bits, mantissa bits, bias, max, smallest normal, smallest subnormal, NaN codes, infinity codes)
PUBLISHED = {
    "e4m3fn": (4, 3, 7, 448.0, 2.0**-6, 2.0**-9, {0x7F, 0xFF}, set()),
    "e4m3fnuz": (4, 3, 8, 240.0, 2.0**-7, 2.0**-10, {0x80}, set()),
    "e5m2": (5, 2, 15, 57344.0, 2.0**-14, 2.0**-16, {0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}, {0x7C, 0xFC}),
    "e5m2fnuz": (5, 2, 16, 57344.0, 2.0**-15, 2.0**-17, {0x80}, set()),
    "e3m4": (3, 4, 3, 15.5, 2.0**-2, 2.0**-6, {*range(0x71, 0x80), *range(0xF1, 0x100)}, {0x70, 0xF0}),
    "e3m2": (3, 2, 3, 28.0, 2.0**-2, 2.0**-4, set(), set()),
    "e2m3": (2, 3, 1, 7.5, 1.0, 2.0**-3, set(), set()),
    "e2m1": (2, 1, 1, 6.0, 1.0, 0.5, set(), set()),
}

ML_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn, "e4m3fnuz": ml_dtypes.float8_e4m3fnuz, "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz, "e3m4": ml_dtypes.float8_e3m4, "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn, "e2m1": ml_dtypes.float4_e2m1fn, "e8m0": ml_dtypes.float8_e8m0fnu, "int8": np.int8,
    "int4": ml_dtypes.int4, "e4m3ieee": ml_dtypes.float8_e4m3, "e4m3b11fnuz": ml_dtypes.float8_e4m3b11fnuz,
}

BY_PARTS = ("e2m2", "e1m1", "e1m2", "e3m1", "e2m0", "e4m0", "e5m1fnuz", "e3m3fn", "e4m2ieee", "e3m4b5", "e2m5", "e6m1",
            "e3m2b-2")


def gfloat_format(fmt: Format) -> gfloat.FormatInfo:
    """Return the same format in gfloat's terms."""
    return gfloat.FormatInfo(
        fmt.name, fmt.bits, fmt.mantissa_bits + 1, bias=fmt.bias, is_signed=fmt.signed,
        domain=Domain.Extended if fmt.has_infinity else Domain.Finite, has_nz=fmt.specials != "fnuz",
        num_high_nans={"ieee": (1 << fmt.mantissa_bits) - 1, "fn": 1}.get(fmt.specials, 0),
        has_subnormals=True, is_twos_complement=False,
    )


def same_number(a: float, b: float) -> bool:
    """Return whether numbers are equal, the sign of zero included; NaN equals NaN."""
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_format_has_its_published_fields_and_corners(name):
    exponent_bits, mantissa_bits, bias, largest, min_normal, min_subnormal, _, _ = PUBLISHED[name]
    fmt = FORMATS[name]
    assert (fmt.exponent_bits, fmt.mantissa_bits, fmt.bias) == (exponent_bits, mantissa_bits, bias)
    assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == (largest, min_normal, min_subnormal)
    assert fmt.value(1) == min_subnormal
    assert fmt.value(1 << mantissa_bits) == min_normal


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_nan_and_infinity_codes_are_the_published_ones_and_no_others(name):
    fmt, nans, infinities = FORMATS[name], *PUBLISHED[name][-2:]
    values = [fmt.value(code) for code in range(1 << fmt.bits)]
    assert {code for code, value in enumerate(values) if math.isnan(value)} == nans
    assert {code for code, value in enumerate(values) if math.isinf(value)} == infinities
    assert fmt.has_nan == bool(nans) and fmt.has_infinity == bool(infinities)
    assert fmt.nan_code is None or fmt.nan_code in nans


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sign_bit_alone_is_negative_zero_but_in_fnuz_nan(name):
    fmt = FORMATS[name]
    value = fmt.value(1 << (fmt.bits - 1))
    assert math.isnan(value) if name.endswith("fnuz") else same_number(value, -0.0)


def test_e8m0_holds_powers_of_two_from_code_0_and_one_nan():
    values = [FORMATS["e8m0"].value(code) for code in range(256)]
    assert values[:255] == [2.0 ** (code - 127) for code in range(255)]
    assert math.isnan(values[255])


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_means_what_ml_dtypes_takes_it_for(name):
    fmt = format_named(name)
    codes = np.arange(1 << fmt.bits, dtype=np.uint8)
    theirs = codes.view(ML_DTYPES[name]) if name != "int4" else codes.astype(ml_dtypes.int4)
    assert all(same_number(fmt.value(code), float(value)) for code, value in enumerate(theirs))


@pytest.mark.parametrize("name", [*PUBLISHED, *BY_PARTS, "e8m0"])
def test_every_code_means_what_gfloat_takes_it_for(name):
    fmt = format_named(name)
    theirs = format_info_ocp_e8m0 if name == "e8m0" else gfloat_format(fmt)
    for code in range(1 << fmt.bits):
        assert same_number(fmt.value(code), float(gfloat.decode_float(theirs, code).fval)), fmt.describe_code(code)


@pytest.mark.parametrize(("by_parts", "integer_bits"), [("e1m2", 4), ("e1m1", 3)])
def test_one_exponent_bit_is_the_integer_grid(by_parts, integer_bits):
    fmt = format_named(by_parts)
    steps = {Fraction(fmt.value(code)) / Fraction(fmt.min_subnormal) for code in range(1 << fmt.bits)}
    most = 2 ** (integer_bits - 1) - 1
    assert steps == set(range(-most, most + 1))


@pytest.mark.parametrize("name", [*PUBLISHED, *BY_PARTS])
def test_positive_codes_ascend(name):
    fmt = format_named(name)
    values = [fmt.value(code) for code in range(fmt.max_code + 1)]
    assert values[0] == 0 and all(low < high for low, high in zip(values, values[1:], strict=False))


@pytest.mark.parametrize(("name", "emax"), [("e4m3fn", 8), ("e5m2", 15), ("e3m2", 4), ("e2m3", 2), ("e2m1", 2)])
def test_emax_is_the_one_that_mx_scales_by(name, emax):
    assert FORMATS[name].emax == emax


@pytest.mark.parametrize(
    ("name", "fields"),
    [("e2m2", (2, 2, 1, "none")), ("e3m4b5", (3, 4, 5, "none")), ("e5m1fnuz", (5, 1, 16, "fnuz")),
     ("e4m3ieee", (4, 3, 7, "ieee")), ("e3m2b-2", (3, 2, -2, "none"))],
)
def test_a_format_can_be_named_by_its_parts(name, fields):
    fmt = format_named(name)
    assert (fmt.exponent_bits, fmt.mantissa_bits, fmt.bias, fmt.specials) == fields


@pytest.mark.parametrize(("name", "says"), [
    ("e9m1", "no format 'e9m1'"), ("", "no format ''"), ("e4m3fnu", "no format 'e4m3fnu'"), ("e8m6", "15 bits"),
    ("e5m0ieee", "IEEE specials need"), ("e8m0ieee", "9 bits"), ("e2m1b500", "past the range of fp32"),
    ("e2m1b-500", "past the range of fp32"), ("e2m1b127", "past the normal range of fp32")
])
def test_a_format_that_cannot_be_is_refused_by_name(name, says):
    with pytest.raises(ValueError, match=says) as refusal:
        format_named(name)
    assert repr(name) in str(refusal.value)


@pytest.mark.parametrize("code", [-1, 16, 255])
def test_a_code_outside_the_format_has_no_value(code):
    with pytest.raises(ValueError, match=str(code)):
        FORMATS["e2m1"].value(code)


def test_codes_are_described_field_by_field():
    assert FORMATS["e4m3fn"].describe_code(0x7E) == "0x7e 0.1111.110"
    assert FORMATS["e8m0"].describe_code(127) == "0x7f 01111111"
    assert FORMATS["int8"].describe_code(0x81) == "0x81 1.0000001"


@pytest.mark.parametrize(("name", "sibling"), [("e4m3fn", "e4m3fnuz"), ("e5m2", "e5m2fnuz")])
def test_fn_and_fnuz_are_each_others_siblings_and_other_formats_have_none(name, sibling):
    assert FORMATS[name].sibling == FORMATS[sibling] and FORMATS[sibling].sibling == FORMATS[name]
    assert all(FORMATS[other].sibling is None for other in ("e3m2", "e2m1", "e8m0", "int8"))

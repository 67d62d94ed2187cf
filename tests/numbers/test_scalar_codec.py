"""The exact scalar codec agrees with the tensor codec and with numpy, and rounds fractions that no float holds."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from codec_by_search import DETERMINISTIC, discriminating_numbers, overflows
from hypothesis import given, strategies as st
from test_codec_systematic import any_format

from fpxbench.numbers.codec_definition import rounded_codes
from fpxbench.numbers.formats import BF16, FORMATS, FP16, FP32, FP64, Format
from fpxbench.numbers.rounding import Overflow, Rounding
from fpxbench.numbers.tensor_codec import encode

pytestmark = pytest.mark.usefixtures("one_thread")

NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32, "fp64": np.float64}
WIDE = (FP16, BF16, FP32, FP64)


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_every_tie_and_its_neighbours_round_as_the_tensor_codec_rounds_them(fmt, rounding):
    numbers = discriminating_numbers(fmt, np.float64)
    numbers = numbers[~np.isnan(numbers) | fmt.has_nan][::3]
    for overflow in overflows(fmt):
        codes = encode(torch.from_numpy(numbers), fmt, rounding, overflow).tolist()
        assert codes == [fmt.round(number, rounding, overflow) for number in numbers.tolist()]


@given(any_format(), st.data())
def test_any_number_in_any_format_rounds_as_the_tensor_codec_rounds_it(fmt, data):
    near = st.floats(-1.2, 1.2).map(lambda part: part * fmt.max)
    number = data.draw(st.one_of(st.floats(allow_nan=fmt.has_nan), near))
    rounding, overflow = data.draw(st.sampled_from(DETERMINISTIC)), data.draw(st.sampled_from(overflows(fmt)))
    assert (
        fmt.round(number, rounding, overflow)
        == encode(torch.tensor([number], dtype=torch.float64), fmt, rounding, overflow).item()
    )


@given(st.sampled_from(sorted(FORMATS)), st.floats(-500, 500), st.integers(1, 32), st.data())
def test_a_stochastic_draw_rounds_as_the_tensor_codec_rounds_it(name, number, random_bits, data):
    fmt, random = FORMATS[name], data.draw(st.integers(0, (1 << random_bits) - 1))
    by_tensor = rounded_codes(torch.tensor([number], dtype=torch.float64), fmt, Rounding.STOCHASTIC, Overflow.SATURATE,
                              random_bits=random_bits, random=torch.tensor([random]))
    assert fmt.round(number, Rounding.STOCHASTIC, random_bits=random_bits, random=random) == by_tensor.item()


@pytest.mark.parametrize("fmt", WIDE, ids=lambda fmt: fmt.name)
@given(number=st.floats())
def test_wide_floats_are_those_of_numpy(fmt, number):
    with np.errstate(over="ignore"):
        source = float(np.float32(number)) if fmt is BF16 else number     # ml_dtypes rounds twice, through fp32
        theirs = np.float64(source).astype(NUMPY[fmt.name])
    code = fmt.round(source, overflow=Overflow.INFINITY)
    bits = int(theirs.view(f"u{fmt.bits // 8}"))
    assert code == bits or (math.isnan(number) and code == fmt.nan_code)
    value = fmt.value(bits)
    assert value == float(theirs) or (math.isnan(value) and math.isnan(number))


@pytest.mark.parametrize("fmt", (FP16, BF16), ids=lambda fmt: fmt.name)
def test_every_16_bit_code_is_the_number_that_numpy_takes_it_for(fmt):
    codes = np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(invalid="ignore"):
        theirs = codes.view(NUMPY[fmt.name]).astype(np.float64)
    np.testing.assert_array_equal([fmt.value(code) for code in range(1 << 16)], theirs)


def test_a_fraction_that_no_float_holds_is_rounded_once():
    tie = Fraction(1) + Fraction(1, 1 << 24)       # between two neighbours of fp32
    assert FP32.value(FP32.round(tie)) == 1.0
    assert FP32.value(FP32.round(tie + Fraction(1, 1 << 100))) == 1 + 2.0**-23
    assert FP64.round(Fraction(1, 3)) == int(np.float64(1 / 3).view(np.uint64))


@pytest.mark.parametrize(("fmt", "number", "overflow", "says"), [
    ("e2m1", math.nan, Overflow.SATURATE, "e2m1 has no NaN"),
    ("e4m3fn", 1.0, Overflow.INFINITY, "e4m3fn has no infinity to overflow to: use saturate or nan"),
    ("e3m2", 1.0, Overflow.NAN, "e3m2 has no NaN to overflow to: use saturate"),
])
def test_what_the_format_cannot_express_is_refused_by_name(fmt, number, overflow, says):
    with pytest.raises(ValueError, match=says):
        FORMATS[fmt].round(number, overflow=overflow)


def test_the_tensor_codec_takes_no_wide_format():
    with pytest.raises(ValueError, match="up to 8 bits, not fp16 of 16"):
        encode(torch.ones(1), FP16)


@pytest.mark.parametrize(
    ("fields", "says"),
    [((12, 52, 2047, "ieee"), "65 bits"), ((8, 7, 1200, "ieee"), "past the range of float64"),
     ((11, 52, 1023, "none"), "past the range of float64")],
)
def test_a_wide_format_that_cannot_be_is_refused_by_name(fields, says):
    with pytest.raises(ValueError, match=says):
        Format("wide", *fields)

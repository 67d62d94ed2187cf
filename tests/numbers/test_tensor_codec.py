"""The codec as software: what it refuses, which shapes and dtypes it supports, what it returns."""

import numpy as np
import pytest
import torch
from codec_by_search import DETERMINISTIC, overflows
from test_formats import PUBLISHED

from fpxbench.numbers.codec_definition import SOURCES, rounded_codes
from fpxbench.numbers.formats import FORMATS, Format, format_named
from fpxbench.numbers.tensor_codec import Overflow, Rounding, decode, decode_table, encode

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def decoded(values, fmt, *how):
    return decode(encode(torch.tensor(values), fmt, *how), fmt).tolist()


def test_the_most_negative_integer_saturates_to_the_symmetric_range():
    assert decoded([-128.0, -1e9, 1e9], FORMATS["int8"]) == [-127, -127, 127]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_rounds_down_to_the_maximum_is_no_overflow(name):
    fmt = FORMATS[name]
    step = fmt.max - fmt.value(fmt.max_code - 1)
    for overflow in overflows(fmt):
        assert encode(torch.tensor([fmt.max + 0.49 * step]), fmt, overflow=overflow).item() == fmt.max_code


@pytest.mark.parametrize(
    ("rounding", "positive", "negative"),
    [(Rounding.NEAREST_EVEN, torch.inf, -torch.inf), (Rounding.NEAREST_AWAY, torch.inf, -torch.inf),
     (Rounding.TOWARD_ZERO, 57344, -57344), (Rounding.TO_ODD, 57344, -57344), (Rounding.UP, torch.inf, -57344),
     (Rounding.DOWN, 57344, -torch.inf)],
)
def test_a_finite_number_that_is_rounded_inward_does_not_overflow_and_an_infinite_one_always_does(
    rounding, positive, negative
):
    assert decoded([1e9, -1e9], FORMATS["e5m2"], rounding, Overflow.INFINITY) == [positive, negative]
    assert decoded([torch.inf, -torch.inf], FORMATS["e5m2"], rounding, Overflow.INFINITY) == [torch.inf, -torch.inf]


@pytest.mark.parametrize("name", ["e4m3fnuz", "e5m2fnuz"])
def test_tiny_negatives_round_to_zero_and_not_to_the_nan_of_fnuz(name):
    fmt = FORMATS[name]
    assert encode(torch.tensor([-0.0, -1e-30, -fmt.min_subnormal / 2]), fmt).tolist() == [0, 0, 0]


def test_a_format_without_a_sign_ends_at_zero():
    fmt = format_named("ue4m3fn")
    below = [-1e-9, -1.0, -torch.inf]
    assert decoded(below, fmt) == [0, 0, 0]
    assert encode(torch.tensor(below), fmt, overflow=Overflow.NAN).tolist() == [0, fmt.nan_code, fmt.nan_code]
    assert encode(torch.tensor(below), fmt, Rounding.UP, Overflow.NAN).tolist() == [0, 0, fmt.nan_code]
    assert encode(torch.tensor(below), fmt, Rounding.DOWN, Overflow.NAN).tolist() == [fmt.nan_code] * 3
    assert decoded([-0.0, 1.0, 448.0, 1e9], fmt) == [0, 1, 448, 448]


def test_e8m0_takes_the_nearest_power_of_two_and_has_none_for_zero_and_negatives():
    fmt = FORMATS["e8m0"]
    assert decoded([1.0, 1.4, 1.5, 3.0, 6.1, 1e38], fmt) == [1, 1, 2, 2, 8, 2.0**126]
    assert decoded([1.9, 1.1], fmt, Rounding.TOWARD_ZERO) == [1, 1] and decoded([1.9, 1.1], fmt, Rounding.UP) == [2, 2]
    nothing = torch.tensor([0.0, -0.0, -1.0, -torch.inf])
    for rounding in DETERMINISTIC:
        assert encode(nothing, fmt, rounding).tolist() == [0] * 4
        assert encode(nothing, fmt, rounding, Overflow.NAN).tolist() == [255] * 4
        assert encode(torch.tensor([2.0**-140, 2.0**-127]), fmt, rounding, Overflow.NAN).tolist() == [0, 0]


def test_one_rounding_to_odd_and_then_one_to_nearest_are_one_rounding_to_nearest():
    fmt, wider = FORMATS["e3m2"], format_named("e3m4b3")
    x = randn(100_000) * 8
    twice = encode(decode(encode(x, wider, Rounding.TO_ODD), wider), fmt)
    assert torch.equal(twice, encode(x, fmt))
    # rounded twice to nearest, it is not
    assert not torch.equal(encode(decode(encode(x, wider), wider), fmt), encode(x, fmt))


@pytest.mark.parametrize("name", [*FORMATS, "e2m2", "e1m1", "ue5m3"])
def test_encoding_is_monotone(name):
    fmt = format_named(name)
    span = torch.linspace(-1.5 * fmt.max, 1.5 * fmt.max, 20001, dtype=torch.float64)
    fine = torch.linspace(-4 * fmt.min_normal, 4 * fmt.min_normal, 20001, dtype=torch.float64)
    for x in (span, fine):
        for rounding in DETERMINISTIC:
            assert bool((decode(encode(x, fmt, rounding), fmt).diff() >= 0).all())


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_long_inputs_are_encoded_by_table_as_short_ones_are_by_definition(name, source):
    fmt = FORMATS[name]
    x = (randn(150_000) * fmt.max / 3).to(source)
    for rounding in DETERMINISTIC:
        for overflow in overflows(fmt):
            assert torch.equal(encode(x, fmt, rounding, overflow), rounded_codes(x, fmt, rounding, overflow))


def test_formats_whose_numbers_are_subnormal_in_fp32_do_without_a_table():
    fmt = Format("deep", 4, 3, 142)
    x = randn(1 << 18) * fmt.max / 3
    assert fmt.min_subnormal < 2.0**-126
    assert torch.equal(encode(x, fmt), encode(x.double(), fmt))
    assert torch.equal(decode(encode(x, fmt), fmt)[:1000], decode(encode(x[:1000], fmt), fmt))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7, 11), (3, 100_000)])
def test_codes_and_values_keep_the_shape(shape):
    x = randn(*shape)
    codes = encode(x, FORMATS["e2m1"])
    assert codes.shape == decode(codes, FORMATS["e2m1"]).shape == shape


def test_a_view_that_is_not_contiguous_is_encoded_and_decoded_by_its_elements():
    x, fmt = randn(640, 480), FORMATS["e4m3fn"]
    assert torch.equal(encode(x.t(), fmt), encode(x, fmt).t())
    assert torch.equal(encode(x[:, ::3], fmt), encode(x, fmt)[:, ::3])
    codes = encode(x, fmt)
    assert torch.equal(decode(codes.t(), fmt), decode(codes, fmt).t())
    assert torch.equal(decode(codes[:, ::3], fmt), decode(codes, fmt)[:, ::3])


def test_a_parameter_is_encoded_without_a_gradient():
    assert not encode(torch.nn.Parameter(torch.ones(4)), FORMATS["e2m1"]).requires_grad


def test_the_decode_table_handed_out_is_a_copy():
    decode_table(FORMATS["e2m1"]).zero_()
    assert decode_table(FORMATS["e2m1"]).max() == 6


@pytest.mark.parametrize(("name", "overflow", "says"), [
    ("e4m3fn", Overflow.INFINITY, "e4m3fn has no infinity to overflow to: use saturate or nan"),
    ("e2m1", Overflow.INFINITY, "e2m1 has no infinity to overflow to: use saturate$"),
    ("e2m1", Overflow.NAN, "e2m1 has no NaN to overflow to: use saturate"),
    ("e8m0", Overflow.INFINITY, "e8m0 has no infinity"),
])
def test_an_overflow_that_a_format_cannot_express_is_refused(name, overflow, says):
    with pytest.raises(ValueError, match=says):
        encode(torch.ones(1), FORMATS[name], overflow=overflow)


@pytest.mark.parametrize("length", [2, 100_000])
def test_nan_is_refused_by_a_format_without_one_and_kept_by_the_others(length):
    x = torch.ones(length)
    x[-1] = torch.nan
    with pytest.raises(ValueError, match="e2m1 has no NaN, and the input holds one"):
        encode(x, FORMATS["e2m1"])
    for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e3m4", "e8m0"):
        assert torch.equal(decode(encode(x, FORMATS[name]), FORMATS[name]).isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_what_is_no_float_of_16_bits_or_more_is_not_encoded(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        encode(torch.ones(1).to(dtype), FORMATS["e4m3fn"])


def test_a_code_that_the_format_does_not_have_is_not_decoded():
    for codes in ([16], [3, 16], [200, 3]):
        with pytest.raises(IndexError):
            decode(torch.tensor(codes, dtype=torch.uint8), FORMATS["e2m1"])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 70_000, 70_001])
@pytest.mark.parametrize("start", [0, 1])
def test_codes_are_decoded_alike_wherever_they_begin_and_however_many_there_are(size, start):
    codes = torch.randint(64, (size + start,), dtype=torch.uint8)[start:]
    values = decode(codes, FORMATS["e3m2"])
    assert values.dtype == torch.float32 and torch.equal(values, decode_table(FORMATS["e3m2"])[codes.int()])


def test_compiled_whole_it_gives_the_same_codes_and_values():
    x, fmt = randn(300) * 4, FORMATS["e4m3fnuz"]

    def both(x):
        codes = encode(x, fmt)
        return codes, decode(codes, fmt)

    for compiled, eager in zip(torch.compile(both, fullgraph=True)(x), both(x), strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_a_gpu_gives_the_same_codes_and_values(name, source):
    fmt = FORMATS[name]
    for length in (100, 150_000):       # by definition; by table
        x = (randn(length) * fmt.max / 3).to(source)
        for rounding in DETERMINISTIC:
            codes = encode(x.cuda(), fmt, rounding)
            assert torch.equal(codes.cpu(), encode(x, fmt, rounding))
            assert torch.equal(decode(codes, fmt).cpu(), decode(codes.cpu(), fmt))


def test_the_numbers_of_a_format_are_exact_in_numpy_too():
    fmt = FORMATS["e5m2fnuz"]
    assert np.array_equal(decode_table(fmt).double().numpy(), [fmt.value(code) for code in range(256)], equal_nan=True)

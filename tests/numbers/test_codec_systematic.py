"""Every format of up to 8 bits: all splits of exponent and mantissa, all specials, with and without a sign."""

import math

import numpy as np
import pytest
import torch
from codec_by_search import DETERMINISTIC, discriminating_numbers, overflows, search_codes
from hypothesis import given, strategies as st

from fpxbench.numbers.codec_definition import rounded_codes, values_of
from fpxbench.numbers.formats import FORMATS, SPECIALS, WEIGHT_BITS, Format
from fpxbench.numbers.tensor_codec import Overflow, Rounding, decode, encode, encode_by_table

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = [(exponent_bits, mantissa_bits) for exponent_bits in range(9) for mantissa_bits in range(9 - exponent_bits)]


def formats_of(exponent_bits, mantissa_bits):
    """Yield the formats that can be: `Format` refuses the others by name."""
    for signed in (True, False):
        for specials in SPECIALS:
            bias = (1 << (exponent_bits - 1)) - (specials != "fnuz") if exponent_bits else 1 - mantissa_bits
            if signed + exponent_bits + mantissa_bits > WEIGHT_BITS:
                continue
            name = f"{'' if signed else 'u'}e{exponent_bits}m{mantissa_bits}{specials}"
            try:
                yield Format(name, exponent_bits, mantissa_bits, bias, specials, signed)
            except ValueError as refusal:
                assert repr(name) in str(refusal)
    if exponent_bits == 0 and 0 < mantissa_bits < 8:
        yield Format(f"int{mantissa_bits + 1}", 0, mantissa_bits, 1 - mantissa_bits, twos_complement=True)


def test_the_set_is_every_format_but_those_that_have_no_meaning():
    names = {fmt.name for split in SPLITS for fmt in formats_of(*split)}
    # none, ieee, fn, fnuz; none, ieee, fn; int2 to int8
    signed, unsigned, integers = 36 + 21 + 35 + 36, 43 + 28 + 44, 7
    assert len(names) == signed + unsigned + integers == 250
    assert {"ue8m0fn", "e4m3fn", "e5m2ieee", "e2m1none", "e5m2fnuz", "ue0m8none"} <= names
    assert not {"e8m0none", "e5m0ieee", "ue4m3fnuz", "ue8m0none"} & names


@pytest.mark.parametrize("split", SPLITS, ids="e{0[0]}m{0[1]}".format)
def test_every_code_of_every_format_decodes_to_its_definition(split):
    for fmt in formats_of(*split):
        codes = torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)
        definition = np.array([fmt.value(code) for code in range(1 << fmt.bits)])
        for decoded in (decode(codes, fmt), values_of(codes, fmt)):
            assert decoded.dtype == torch.float32
            np.testing.assert_array_equal(decoded.double().numpy(), definition, err_msg=fmt.name)
            np.testing.assert_array_equal(
                np.signbit(decoded.numpy())[~np.isnan(definition)], np.signbit(definition)[~np.isnan(definition)]
            )


@pytest.mark.parametrize("split", SPLITS, ids="e{0[0]}m{0[1]}".format)
def test_every_number_of_every_format_encodes_to_its_own_code_under_every_rounding(split):
    for fmt in formats_of(*split):
        codes = torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)
        values = decode(codes, fmt)
        own = values.isfinite() & (values >= -fmt.max)      # two's complement: the range is symmetric
        for rounding in DETERMINISTIC:
            assert torch.equal(encode(values[own], fmt, rounding), codes[own]), (fmt.name, rounding)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("split", SPLITS, ids="e{0[0]}m{0[1]}".format)
def test_every_tie_and_its_neighbours_round_to_the_code_that_a_search_finds(split, dtype):
    for fmt in formats_of(*split):
        numbers = discriminating_numbers(fmt, dtype)
        numbers = numbers[~np.isnan(numbers) | fmt.has_nan]
        for rounding in DETERMINISTIC:
            for overflow in overflows(fmt):
                found = search_codes(numbers.astype(np.float64), fmt, rounding, overflow)
                codes = encode(torch.from_numpy(numbers), fmt, rounding, overflow).numpy()
                wrong = np.flatnonzero(codes != found)
                assert not len(wrong), [
                    (fmt.name, rounding, overflow, float(numbers[i]).hex(), codes[i], found[i]) for i in wrong[:4]
                ]


@pytest.mark.parametrize("split", SPLITS, ids="e{0[0]}m{0[1]}".format)
def test_the_table_gives_the_code_that_the_definition_gives(split):
    bits = torch.randint(-(1 << 31), 1 << 31, (4096,), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    for fmt in formats_of(*split):
        numbers = torch.cat([torch.from_numpy(discriminating_numbers(fmt, np.float32)), bits.view(torch.float32)])
        numbers = numbers if fmt.has_nan else numbers[~numbers.isnan()]
        for rounding in (Rounding.NEAREST_EVEN, Rounding.DOWN):
            by_table = encode_by_table(numbers, fmt, rounding, Overflow.SATURATE)
            assert torch.equal(by_table, rounded_codes(numbers, fmt, rounding, Overflow.SATURATE)), (fmt.name, rounding)


@st.composite
def any_format(draw):
    """Return any split, specials, sign and bias that `Format` takes."""
    exponent_bits = draw(st.integers(0, 8))
    mantissa_bits = draw(st.integers(0, 8 - exponent_bits))
    signed = draw(st.booleans()) and exponent_bits + mantissa_bits < WEIGHT_BITS
    fields = (draw(st.integers(-140, 160)), draw(st.sampled_from(SPECIALS)), signed)
    try:
        return Format("drawn", exponent_bits, mantissa_bits, *fields)
    except ValueError:
        return FORMATS["e2m1"]


def test_a_format_at_the_end_of_fp32_rounds_to_the_code_that_a_search_finds():
    fmt = Format("last", 1, 1, bias=-127, specials="ieee", signed=False)
    assert fmt.max == 2.0**127      # the number after it, were it finite, is 2**128: too large for fp32
    numbers = np.array([0.0, 0.49, 0.5, 0.51, 1.0, 1.24, 1.25, 1.49, 1.5, 1.51]) * fmt.max
    for rounding in DETERMINISTIC:
        for overflow in overflows(fmt):
            codes = encode(torch.from_numpy(numbers), fmt, rounding, overflow).numpy()
            np.testing.assert_array_equal(codes, search_codes(numbers, fmt, rounding, overflow))


@given(any_format(), st.data())
def test_any_number_in_any_format_under_any_bias_rounds_to_the_code_that_a_search_finds(fmt, data):
    near = st.floats(-1.2, 1.2).map(lambda part: part * fmt.max)
    tiny = st.floats(-3, 3).map(lambda part: part * fmt.min_subnormal)
    x = np.array(data.draw(st.lists(st.one_of(st.floats(allow_nan=fmt.has_nan), near, tiny), min_size=1, max_size=20)))
    rounding, overflow = data.draw(st.sampled_from(DETERMINISTIC)), data.draw(st.sampled_from(overflows(fmt)))
    for dtype in (np.float64, np.float32):
        with np.errstate(over="ignore"):
            numbers = x.astype(dtype)
        codes = encode(torch.from_numpy(numbers), fmt, rounding, overflow).numpy()
        np.testing.assert_array_equal(codes, search_codes(numbers.astype(np.float64), fmt, rounding, overflow))


@given(st.sampled_from(sorted(FORMATS)), st.floats(width=32, allow_nan=False))
def test_no_other_number_of_the_format_is_nearer(name, number):
    fmt = FORMATS[name]
    numbers = [
        value for value in map(fmt.value, range(1 << fmt.bits)) if math.isfinite(value) and abs(value) <= fmt.max
    ]
    got = decode(encode(torch.tensor([number]), fmt), fmt).item()
    inside = min(max(number, min(numbers)), max(numbers))
    assert abs(got - inside) == min(abs(value - inside) for value in numbers)

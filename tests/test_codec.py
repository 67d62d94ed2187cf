"""Encode and decode against the definition, against ml_dtypes and gfloat, and on every 16-bit input there is."""

import gfloat
import numpy as np
import pytest
import torch
from gfloat.types import RoundMode
from hypothesis import given
from hypothesis import strategies as st
from test_formats import BY_PARTS, ML_DTYPES, PUBLISHED, gfloat_format

from fpxbench.codec import Overflow, Rounding, decode, decode_table, encode
from fpxbench.formats import FORMATS, format_named

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = (*PUBLISHED, *BY_PARTS)
ENCODABLE = (*FLOATS, "int8", "int4")
# What ml_dtypes does past the maximum, format by format: its choice, and not the same in all of them.
ML_OVERFLOW = {
    "e4m3fn": Overflow.NAN, "e4m3fnuz": Overflow.NAN, "e5m2fnuz": Overflow.NAN, "e5m2": Overflow.INFINITY, "e3m4": Overflow.INFINITY,
    "e3m2": Overflow.SATURATE, "e2m3": Overflow.SATURATE, "e2m1": Overflow.SATURATE,
}
MODES = {
    Rounding.NEAREST_EVEN: RoundMode.TiesToEven,
    Rounding.NEAREST_AWAY: RoundMode.TiesToAway,
    Rounding.TOWARD_ZERO: RoundMode.TowardZero,
    Rounding.UP: RoundMode.TowardPositive,
    Rounding.DOWN: RoundMode.TowardNegative,
}


def telling_inputs(fmt, dtype):
    """Every number, every midpoint, and the neighbours of each one ulp of `dtype` away; the maximum's surroundings too."""
    table = decode_table(fmt).numpy().astype(np.float64)
    numbers = np.unique(table[np.isfinite(table)])
    middles = (numbers[1:] + numbers[:-1]) / 2
    past = np.array([fmt.max + step * (fmt.max - numbers[-2]) for step in (0.25, 0.5, 0.75, 1, 10)])
    values = np.concatenate([numbers, middles, past, -past]).astype(dtype)
    return np.concatenate([values, np.nextafter(values, dtype(np.inf)), np.nextafter(values, dtype(-np.inf)), [dtype(-0.0)]])


def assert_same_codes(ours, theirs, inputs, fmt):
    """Codes are equal; a NaN may be any of the format's."""
    ours, theirs = np.asarray(ours), np.asarray(theirs).astype(np.uint8)
    nan = np.isnan(decode_table(fmt).numpy())
    differ = (ours != theirs) & ~(nan[ours] & nan[theirs])
    assert not differ.any(), [
        f"{inputs[i]!r}: {fmt.describe_code(int(ours[i]))} where {fmt.describe_code(int(theirs[i]))} is right"
        for i in np.flatnonzero(differ)[:5]
    ]


@pytest.mark.parametrize("name", [*ENCODABLE, "e8m0"])
def test_every_code_of_every_format_decodes_to_its_definition(name):
    fmt = format_named(name)
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)
    definition = torch.tensor([fmt.value(code) for code in range(1 << fmt.bits)], dtype=torch.float64)
    decoded = decode(codes, fmt)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.double().nan_to_num(nan=1e30), definition.nan_to_num(nan=1e30))
    assert torch.equal(decoded.signbit()[~definition.isnan()], definition.signbit()[~definition.isnan()])


@pytest.mark.parametrize("name", ENCODABLE)
def test_a_number_of_the_format_encodes_to_its_own_code(name):
    fmt = format_named(name)
    table = decode_table(fmt)
    codes = torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8)[table.isfinite()]
    if fmt.twos_complement:
        codes = codes[codes != 1 << (fmt.bits - 1)]     # -128 lies past the symmetric range that weights are stored in
    assert torch.equal(encode(decode(codes, fmt), fmt), codes)


def test_the_most_negative_integer_saturates_to_the_symmetric_range():
    assert decode(encode(torch.tensor([-128.0, -1e9, 1e9]), FORMATS["int8"]), FORMATS["int8"]).tolist() == [-127, -127, 127]


@pytest.mark.parametrize("rounding", MODES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", FLOATS)
def test_ties_and_their_neighbours_round_as_gfloat_rounds_them(name, dtype, rounding):
    fmt = format_named(name)
    inputs = telling_inputs(fmt, dtype)
    theirs = gfloat_format(fmt)
    inputs = inputs[(inputs == 0) | (np.abs(inputs) > 1e-300)]     # gfloat loses what is subnormal in fp64
    rounded = gfloat.round_ndarray(theirs, inputs.astype(np.float64), MODES[rounding], sat=True)
    ours = encode(torch.from_numpy(inputs), fmt, rounding).numpy()
    assert_same_codes(ours, gfloat.encode_ndarray(theirs, rounded), inputs, fmt)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PUBLISHED)
def test_all_65536_sixteen_bit_inputs_encode_as_ml_dtypes_encodes_them(name, source):
    fmt = FORMATS[name]
    inputs = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(source)
    if not fmt.has_nan:
        inputs = inputs[~inputs.isnan()]
    as_fp32 = inputs.float().numpy()
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = as_fp32.astype(ML_DTYPES[name]).view(np.uint8)
    assert_same_codes(encode(inputs, fmt, overflow=ML_OVERFLOW[name]).numpy(), theirs, as_fp32, fmt)


@pytest.mark.parametrize("name", [name for name, choice in ML_OVERFLOW.items() if choice is not Overflow.SATURATE])
def test_past_the_maximum_this_codec_saturates_where_ml_dtypes_does_not(name):
    fmt = FORMATS[name]
    step = fmt.max - fmt.value(fmt.max_code - 1)
    past = np.array([fmt.max + step, 10 * fmt.max, np.inf], dtype=np.float32)
    ours = decode(encode(torch.from_numpy(past), fmt), fmt)
    with np.errstate(over="ignore"):
        theirs = past.astype(ML_DTYPES[name]).astype(np.float32)
    assert ours.tolist() == [fmt.max] * 3
    assert not np.isfinite(theirs).any()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_rounds_down_to_the_maximum_is_no_overflow(name):
    fmt = FORMATS[name]
    step = fmt.max - fmt.value(fmt.max_code - 1)
    just_inside = torch.tensor([fmt.max + 0.49 * step])
    for overflow in Overflow:
        if (overflow is Overflow.NAN and not fmt.has_nan) or (overflow is Overflow.INFINITY and not fmt.has_infinity):
            continue
        assert encode(just_inside, fmt, overflow=overflow).item() == fmt.max_code


@pytest.mark.parametrize("name", ["e4m3fnuz", "e5m2fnuz"])
def test_tiny_negatives_round_to_zero_and_not_to_the_nan_of_fnuz(name):
    fmt = FORMATS[name]
    tiny = torch.tensor([-0.0, -1e-30, -fmt.min_subnormal / 2])
    assert encode(tiny, fmt).tolist() == [0, 0, 0]


def test_float64_is_rounded_once():
    # A hair above the tie of 1 and 1.125 in float64; rounding to fp32 first would land on the tie and then on 1.
    x = torch.tensor([1.0625 + 2.0**-40], dtype=torch.float64)
    assert decode(encode(x, FORMATS["e4m3fn"]), FORMATS["e4m3fn"]).item() == 1.125
    assert decode(encode(x.float(), FORMATS["e4m3fn"]), FORMATS["e4m3fn"]).item() == 1.0


@pytest.mark.parametrize("name", ENCODABLE)
def test_encoding_is_monotone(name):
    fmt = format_named(name)
    span = torch.linspace(-1.5 * fmt.max, 1.5 * fmt.max, 20001, dtype=torch.float64)
    fine = torch.linspace(-4 * fmt.min_normal, 4 * fmt.min_normal, 20001, dtype=torch.float64)
    for x in (span, fine):
        assert bool((decode(encode(x, fmt), fmt).diff() >= 0).all())


@given(st.sampled_from(ENCODABLE), st.floats(width=32, allow_nan=False))
def test_no_other_code_is_nearer(name, number):
    fmt = format_named(name)
    table = decode_table(fmt).double()
    table = table[table.isfinite() & (table.abs() <= fmt.max)]
    x = torch.tensor([number])
    got = decode(encode(x, fmt), fmt).double()
    inside = x.double().clamp(-fmt.max, fmt.max)
    assert float((got - inside).abs()) == float((table - inside).abs().min())


def test_long_inputs_are_encoded_as_short_ones_are():
    x = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(0))
    fmt = FORMATS["e3m2"]
    assert torch.equal(encode(x, fmt), torch.stack([encode(row, fmt) for row in x]))


def test_a_view_that_is_not_contiguous_is_encoded_by_its_elements():
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    fmt = FORMATS["e4m3fn"]
    assert torch.equal(encode(x.t(), fmt), encode(x, fmt).t())


def test_the_decode_table_handed_out_is_a_copy():
    decode_table(FORMATS["e2m1"]).zero_()
    assert decode_table(FORMATS["e2m1"]).max() == 6


@pytest.mark.parametrize(("name", "overflow", "says"), [
    ("e4m3fn", Overflow.INFINITY, "e4m3fn has no infinity"),
    ("e2m1", Overflow.NAN, "e2m1 has no NaN"),
])
def test_what_a_format_cannot_express_is_refused(name, overflow, says):
    with pytest.raises(ValueError, match=says):
        encode(torch.ones(1), FORMATS[name], overflow=overflow)


def test_nan_is_refused_by_a_format_without_one_and_kept_by_the_others():
    x = torch.tensor([1.0, float("nan")])
    with pytest.raises(ValueError, match="e2m1 has no NaN, and the input holds one"):
        encode(x, FORMATS["e2m1"])
    for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e3m4"):
        assert decode(encode(x, FORMATS[name]), FORMATS[name]).isnan().tolist() == [False, True]


def test_integers_are_not_encoded():
    with pytest.raises(TypeError, match="torch.int64"):
        encode(torch.tensor([1]), FORMATS["e4m3fn"])

"""Schemes by name, their scales, and how well each fits a normal weight."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from fpxbench.checking.reference import sqnr_db
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scaling import Scales, scaling_named
from fpxbench.numbers.scaling.mx import E8M0, power_of_two
from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.numbers.tensor_codec import Rounding, decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")

# Measured with independent code on a 4096x4096 N(0, 1) weight, in dB.
SQNR = {
    "e4m3fn": {"row": 31.543, "g32": 32.399, "g16": 33.031, "mx": 30.642},
    "e4m3fnuz": {"row": 31.538, "g32": 32.524, "g16": 33.184, "mx": 31.430},
    "e5m2": {"row": 25.564, "g32": 26.397, "g16": 27.023, "mx": 25.360},
    "e5m2fnuz": {"row": 25.564, "g32": 26.397, "g16": 27.023, "mx": 25.360},
    "e3m4": {"row": 37.549, "g32": 38.612, "g16": 39.290, "mx": 37.490},
    "e3m2": {"row": 25.564, "g32": 26.397, "g16": 27.023, "mx": 25.360},
    "e2m3": {"row": 30.887, "g32": 32.301, "g16": 32.997, "mx": 30.937},
    "e2m1": {"row": 18.501, "g32": 19.907, "g16": 20.525, "mx": 18.787, "nv": 20.433},
    "e2m2": {"row": 24.772, "g32": 26.132, "g16": 26.802, "mx": 24.872},
    "e1m1": {"row": 8.713, "g32": 12.895, "g16": 14.022, "mx": 11.503},
    "int8": {"row": 41.246, "g32": 45.437, "g16": 46.567},
}


@pytest.fixture(scope="module")
def normal_weight():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32))


def sqnr_and_gain(weight, decoded, rows=256):
    """Return SQNR in dB, and the slope of `decoded` of a few rows over those rows: a few at a time, which is what fits
    a cache."""
    signal, noise, product = 0.0, 0.0, 0.0
    for part in weight.split(rows):
        exact, stored = part.double(), decoded(part).double()
        signal += float(exact.square().sum())
        noise += float((exact - stored).square().sum())
        product += float((exact * stored).sum())
    return 10 * math.log10(signal / noise), product / signal


def through(scheme, weight):
    return scheme.dequantize(*scheme.quantize(weight))


@pytest.mark.parametrize(
    ("name", "expected_db"), [(f"{fmt}-{s}", db) for fmt, row in SQNR.items() for s, db in row.items()]
)
@pytest.mark.parametrize("rows", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_signal_to_noise_of_a_normal_weight_is_the_measured_one(normal_weight, name, expected_db, rows):
    scheme = scheme_named(name)
    if scheme.scaling.has_tensor_scale:     # which is of the whole weight
        db, gain = sqnr_and_gain(normal_weight, lambda part: through(scheme, part), len(normal_weight))
    else:       # four million weights give it to 0.01 dB
        db, gain = sqnr_and_gain(normal_weight[:rows], lambda part: through(scheme, part))
    assert db == pytest.approx(expected_db, abs=0.05)
    assert gain == pytest.approx(1, abs=10 ** (-expected_db / 20))


def test_one_exponent_bit_stores_a_weight_as_an_integer_does(normal_weight):
    weight = normal_weight[:64]
    assert torch.equal(through(scheme_named("e1m2-g32"), weight), through(scheme_named("int4-g32"), weight))


def test_signal_to_noise_is_computed_as_in_the_checks(normal_weight):
    scheme, weight = scheme_named("e3m2-row"), normal_weight[:64]
    assert sqnr_and_gain(weight, lambda part: through(scheme, part))[0] == pytest.approx(
        sqnr_db(weight, through(scheme, weight)), rel=1e-9
    )


def sign_dropped(codes, scales, scheme):
    return scheme.dequantize(codes, scales).abs()


def nibbles_swapped(codes, scales, scheme):
    return scheme.dequantize(codes.reshape(-1, 2).flip(1).reshape(codes.shape), scales)


def scale_bias_off_by_one(codes, scales, scheme):
    return scheme.dequantize(codes, Scales(scales.stored - 1))


def decoded_as_fnuz(codes, scales, scheme):
    return decode(codes, FORMATS["e4m3fnuz"]).nan_to_num(0) * scales.stored     # -0 is its NaN


def subnormals_flushed(codes, scales, scheme):
    values = decode(codes, scheme.format)
    return torch.where(values.abs() < scheme.format.min_normal, 0.0, values) * scales.stored


@pytest.mark.parametrize(("name", "fault", "expected_db", "expected_gain"), [
    ("e4m3fn-row", sign_dropped, -3.0, 0.0), ("e2m1-row", nibbles_swapped, -3.0, 0.0),
    ("mxfp4", scale_bias_off_by_one, 5.80, 0.490), ("e4m3fn-row", decoded_as_fnuz, 6.01, 0.4997),
    ("e4m3fn-row", subnormals_flushed, 31.54, 0.999)
], ids=lambda part: getattr(part, "__name__", None))
def test_a_fault_costs_the_measured_decibels_and_flushed_subnormals_none(
    normal_weight, name, fault, expected_db, expected_gain
):
    scheme = scheme_named(name)
    db, gain = sqnr_and_gain(normal_weight[:512], lambda part: fault(*scheme.quantize(part), scheme))
    assert (db, gain) == (pytest.approx(expected_db, abs=0.05), pytest.approx(expected_gain, abs=0.002))


def test_truncation_costs_six_decibels_and_shrinks_the_weight(normal_weight):
    scheme = scheme_named("e4m3fn-row")

    def truncated(part):
        scales = scheme.scaling.choose(part, scheme.format)
        return scheme.dequantize(
            encode(scheme.scaling.divide(part, scales), scheme.format, Rounding.TOWARD_ZERO), scales
        )

    assert sqnr_and_gain(normal_weight[:512], truncated) == (
        pytest.approx(25.8, abs=0.05),
        pytest.approx(0.956, abs=0.002),
    )


def test_without_its_tensor_scale_an_nvfp4_weight_is_too_large_by_it(normal_weight):
    scheme, weight = scheme_named("nvfp4"), normal_weight[:512]
    codes, scales = scheme.quantize(weight)
    right, wrong = (
        scheme.dequantize(codes, Scales(scales.stored, tensor_scale))
        for tensor_scale in (scales.tensor_scale, torch.ones(1))
    )
    torch.testing.assert_close(wrong * (weight.abs().max() / 2688), right)
    assert sqnr_and_gain(weight, lambda part: wrong, rows=512)[1] > 400


def test_every_listed_scheme_exists_under_its_name():
    assert [scheme_named(name).name for name in SCHEMES] == list(SCHEMES)


@pytest.mark.parametrize(("parts", "standard"), [("e2m1-mx", "mxfp4"), ("e2m1-nv", "nvfp4"), ("e3m2-mx", "mxfp6_e3m2")])
def test_a_standard_scheme_named_by_its_parts_is_the_standard_one(parts, standard):
    assert scheme_named(parts) is scheme_named(standard)


@pytest.mark.parametrize(("name", "fmt", "scaling"), [
    ("e4m3fn-row", "e4m3fn", "row"), ("e3m2-g128", "e3m2", "g128"), ("mxfp8_e4m3fn", "e4m3fn", "mx"),
    ("nvfp4", "e2m1", "nv"), ("int8-row", "int8", "row"), ("e3m4b5-g64", "e3m4b5", "g64"),
    ("e3m2b-2-row", "e3m2b-2", "row")
])
def test_a_scheme_is_a_format_and_a_scaling(name, fmt, scaling):
    scheme = scheme_named(name)
    assert (scheme.format.name, scheme.scaling.name) == (fmt, scaling) and scheme.scaling == scaling_named(scaling)


def test_dense_schemes_are_not_quantized():
    assert [(s.quantized, s.dense_dtype) for s in map(scheme_named, ("bf16", "fp16"))] == [
        (False, torch.bfloat16),
        (False, torch.float16),
    ]
    with pytest.raises(ValueError, match="'bf16' stores the weight as it is"):
        scheme_named("bf16").quantize(torch.ones(2, 2))


@pytest.mark.parametrize(("name", "says"), [
    ("e4m3-rov", "did you mean e4m3fn-row"), ("mxfp5", "did you mean mxfp4"), ("int8", "did you mean int8-row"),
    ("e4m3fn-g1", "no scaling 'g1'"), ("e4m3fn-g65537", "no scaling 'g65537'"), ("e4m3fn-col", "no scaling 'col'"),
    ("zzz", "known by name: bf16"), ("", "no scheme ''"), ("e8m0-row", "e8m0 holds scales"),
    ("ue4m3fn-row", "ue4m3fn holds scales, not weights: it has no sign")
])
def test_an_unknown_scheme_names_the_value_and_the_way_out(name, says):
    with pytest.raises(ValueError) as refusal:
        scheme_named(name)
    assert says in str(refusal.value) and repr(name) in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("bf16", 16), ("e4m3fn-row", 8 + 32 / 4096), ("e3m2-g128", 6.25), ("mxfp4", 4.25), ("nvfp4", 4.5 + 32 / 4096**2),
     ("e2m1-tensor", 4 + 32 / 4096**2)],
)
def test_bits_per_weight_count_the_code_and_its_share_of_the_scales(name, bits):
    assert scheme_named(name).bits_per_weight(4096, 4096) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("name", ["e4m3fn-tensor", "e4m3fn-row", "e3m2-g128", "e2m1-g32"])
def test_the_largest_of_each_block_lands_on_the_formats_maximum(name):
    scheme = scheme_named(name)
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(1))
    codes, scales = scheme.quantize(weight)
    largest = scheme.scaling.block_amax(decode(codes, scheme.format))
    assert torch.equal(largest, torch.full_like(scales.stored, scheme.format.max))


@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1"])
def test_mx_scales_are_the_power_of_two_of_the_specification(fmt):
    weight = torch.randn(5, 100, generator=torch.Generator().manual_seed(2)) * torch.logspace(-20, 20, 5)[:, None]
    scales = scaling_named("mx").choose(weight, FORMATS[fmt])
    amaxes = scaling_named("mx").block_amax(weight)
    for amax, scale in zip(amaxes.flatten().tolist(), decode(scales.stored, E8M0).flatten().tolist(), strict=True):
        assert scale == 2.0 ** (math.floor(math.log2(amax)) - FORMATS[fmt].emax)


@given(st.floats(min_value=2.0**-149, width=32, allow_infinity=False, exclude_min=False))
def test_the_power_of_two_of_a_scale_is_the_codecs_rounding_toward_zero(x):
    x = torch.tensor([x])
    assert torch.equal(power_of_two(x), encode(x, E8M0, Rounding.TOWARD_ZERO))


@given(st.floats(min_value=2.0**-149, max_value=2.0**127, width=32))
def test_power_of_two_is_the_largest_power_not_above(x):
    power = decode(power_of_two(torch.tensor([x])), E8M0).double().item()
    assert power <= x < 2 * power or power == 2.0**-127 > x     # below E8M0's range its smallest stands in


def test_nvfp4_scales_are_e4m3_under_one_fp32_scale():
    scheme = scheme_named("nvfp4")
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    scales = scheme.quantize(weight)[1]
    assert scales.stored.dtype == torch.uint8 and scales.stored.shape == (4, 4)
    assert scales.tensor_scale.item() == (weight.abs().max() / 2688).item()
    assert decode(scales.stored, FORMATS["e4m3fn"]).max() == 448


@pytest.mark.parametrize("name", ["e4m3fn-tensor", "e4m3fn-row", "e3m2-g128", "mxfp4", "nvfp4", "int8-row"])
def test_zeros_stay_zeros_and_their_scales_finite(name):
    scheme = scheme_named(name)
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(4))
    weight[1] = 0
    weight[2, :128] = 0
    for w in (weight, torch.zeros(4, 256)):
        decoded = through(scheme, w)
        assert decoded.isfinite().all() and (decoded[w == 0] == 0).all()


def test_a_block_too_small_for_nvfp4s_scale_becomes_zero_and_not_nan():
    weight = torch.ones(1, 32)
    weight[0, 16:] = 1e-8
    decoded = through(scheme_named("nvfp4"), weight)
    assert decoded[0, :16].tolist() == [1.0] * 16 and decoded[0, 16:].tolist() == [0.0] * 16


def test_each_scale_reaches_its_own_block_and_the_last_block_may_be_short():
    scaling = scaling_named("g4")
    factors = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    assert scaling.spread(factors, 2, 10).tolist() == [[1] * 4 + [2] * 4 + [3] * 2, [4] * 4 + [5] * 4 + [6] * 2]


@pytest.mark.parametrize("name", ["e3m2-g128", "mxfp4", "nvfp4"])
def test_a_short_last_block_is_scaled_by_what_it_holds(name):
    scheme = scheme_named(name)
    block = scheme.scaling.block
    weight = torch.randn(3, 2 * block + 5, generator=torch.Generator().manual_seed(5))
    weight[0, 0] = weight.abs().max() + 1   # nv: so that both see the same tensor scale
    whole = torch.nn.functional.pad(weight, (0, block - 5))
    assert torch.equal(through(scheme, weight), through(scheme, whole)[:, :2 * block + 5])


def test_scales_are_applied_in_the_shape_in_which_they_are_stored():
    weight = torch.randn(6, 80, generator=torch.Generator().manual_seed(6))
    for name, shape in {
        "e4m3fn-tensor": (1, 1),
        "e4m3fn-row": (6, 1),
        "e4m3fn-g32": (6, 3),
        "mxfp4": (6, 3),
        "nvfp4": (6, 5),
    }.items():
        scheme = scheme_named(name)
        codes, scales = scheme.quantize(weight)
        factors = scheme.scaling.factors(scales)
        assert factors.shape == scales.stored.shape == shape
        expected = decode(codes, scheme.format) * scheme.scaling.spread(factors, 6, 80)
        assert torch.equal(scheme.dequantize(codes, scales), expected)


def test_quantizing_what_was_dequantized_changes_nothing():
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(7))
    for name in ("e4m3fn-row", "e3m2-g128", "mxfp6_e2m3", "mxfp4"):
        scheme = scheme_named(name)
        once = through(scheme, weight)
        assert torch.allclose(through(scheme, once), once, rtol=1e-6, atol=0)


def test_codes_of_a_scheme_are_the_codecs_under_a_scale_of_one():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(8)).clamp(-5, 5)
    weight[:, 0] = 6.0
    assert torch.equal(scheme_named("e2m1-row").quantize(weight)[0], encode(weight, FORMATS["e2m1"]))


def test_a_list_of_values_has_no_mx_scales_but_under_rceil():
    with pytest.raises(ValueError, match=r"no scheme 'nf4-mx'.*nf4 is a list of values: use nf4-mx.rceil"):
        scheme_named("nf4-mx")
    assert scheme_named("nf4-mx.rceil").quantized

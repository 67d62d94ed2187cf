"""Behaviour is recovered from results: injected faults are named and counted, permitted differences are no faults."""

import ml_dtypes
import numpy as np
import pytest
import torch

from fpxbench.casts.cast_record import InputKind
from fpxbench.casts.conformance import EXACT_PRODUCT, ConformanceCheck, number_text
from fpxbench.casts.conformance_verdict import verdict_on
from fpxbench.casts.conversion import DTYPES, Conversion
from fpxbench.casts.expected import expected_codes, hypotheses, round_magnitudes
from fpxbench.casts.finfo import defined_constants
from fpxbench.casts.number_grid import grid
from fpxbench.casts.probe_values import cast_inputs, digest, product_inputs, values
from fpxbench.numbers.tensor_codec import Overflow, Rounding, encode
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status

FP8 = ("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz")
SIGNED = (*FP8, "e4m3b15")


def discriminating(source, target):
    bits = cast_inputs(DTYPES[source], DTYPES[target])
    return bits, values(bits, DTYPES[source])


def checked(source, target, got, x, rounding=Rounding.NEAREST_EVEN, alternatives=None):
    check = ConformanceCheck(DTYPES[source], DTYPES[target], rounding)
    check.add(x, got, lambda index: (hex(index), number_text(x[index])), alternatives)
    conformance = check.result()
    return verdict_on(
        Conversion(operation="cast", source=source, target=target, engine="eager", device="cpu"), conformance
    ), conformance


def with_overflow(x, target, overflow):
    return encode(torch.from_numpy(x), DTYPES[target].format, Rounding.NEAREST_EVEN, overflow).numpy().copy()


def signed(codes, x, target):
    """Return codes of magnitudes with the signs of `x`, as `target` has them."""
    numbers = grid(DTYPES[target])
    negative = np.signbit(x) & (numbers.format.has_negative_zero | (codes != 0))
    return codes | np.where(negative, numbers.format.sign_bit, 0)


# ---- the reference --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", ["fp16", "bf16"])
def test_numpys_16_bit_numbers_are_the_definitions(target):
    numbers, fmt = grid(DTYPES[target]).values, DTYPES[target].format
    ends = [code ^ sign for code in range(fmt.max_code - 2, fmt.max_code + 4) for sign in (0, fmt.sign_bit)]
    codes = [*range(0, 1 << 16, 61), *ends, fmt.sign_bit]
    defined = np.array([fmt.value(code) for code in codes])
    assert np.array_equal(numbers[codes], defined, equal_nan=True)
    assert np.array_equal(np.signbit(numbers[codes]) & ~np.isnan(defined), np.signbit(defined) & ~np.isnan(defined))


@pytest.mark.parametrize("source", ["fp32", "fp64"])
def test_each_input_is_there_once_in_order(source):
    bits = cast_inputs(DTYPES[source], DTYPES["e4m3fn"])
    assert np.array_equal(bits, np.unique(bits))


@pytest.mark.parametrize("target", [*SIGNED, "e8m0"])
@pytest.mark.parametrize("source", ["bf16", "fp16"])
@pytest.mark.parametrize("rounding", [Rounding.NEAREST_EVEN, Rounding.NEAREST_AWAY, Rounding.TOWARD_ZERO])
def test_search_in_the_table_of_numbers_rounds_every_16_bit_input_as_the_codec_does(source, target, rounding):
    _, x = discriminating(source, target)
    numbers = grid(DTYPES[target])
    positive = x[np.isfinite(x) & (x >= numbers.positive[0]) & ~np.signbit(x)]
    found = np.minimum(round_magnitudes(positive, numbers, rounding.value), numbers.format.max_code)
    assert np.array_equal(found, encode(torch.from_numpy(positive), DTYPES[target].format, rounding).numpy())


@pytest.mark.parametrize(("target", "numpy_dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_the_reference_for_16_bit_targets_is_what_numpy_gives(target, numpy_dtype):
    bits, x = discriminating("fp32", target)
    with np.errstate(over="ignore", invalid="ignore"):
        independent = bits.view(np.float32).astype(numpy_dtype).view(np.uint16)
    number = ~np.isnan(x)
    assert np.array_equal(expected_codes(x, DTYPES[target])[number], independent[number])
    assert np.isnan(grid(DTYPES[target]).values[expected_codes(x, DTYPES[target])[~number]]).all()


@pytest.mark.parametrize("source", ["fp32", "fp64"])
@pytest.mark.parametrize("target", [*SIGNED, "e8m0", "bf16", "fp16"])
def test_inputs_hold_every_number_midpoint_and_neighbour_of_both_with_both_signs(source, target):
    _, x = discriminating(source, target)
    given = set(x[~np.isnan(x)].tolist())
    numbers = grid(DTYPES[target]).positive
    float_type = {"fp32": np.float32, "fp64": np.float64}[source]
    points = np.concatenate([numbers, (numbers[:-1] + numbers[1:]) / 2])
    with np.errstate(over="ignore"):  # bf16's midpoint past the maximum has no neighbour above in fp32
        near = [
            points,
            *(np.nextafter(points.astype(float_type), float_type(end)).astype(np.float64) for end in (0, np.inf)),
        ]
    for wanted in near:
        with np.errstate(over="ignore"):
            fits = wanted[wanted.astype(float_type).astype(np.float64) == wanted]
        assert set(fits.tolist()) <= given and set((-fits).tolist()) <= given


def test_inputs_are_the_same_every_time_and_each_is_given_once():
    bits, _ = discriminating("fp32", "e4m3fn")
    cast_inputs.cache_clear()
    again, _ = discriminating("fp32", "e4m3fn")
    assert digest(bits) == digest(again) and len(np.unique(bits)) == bits.size


# ---- injected faults ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("target", FP8)
@pytest.mark.parametrize("source", ["bf16", "fp32", "fp64"])
def test_the_right_answer_is_right_however_it_overflows(source, target):
    _, x = discriminating(source, target)
    special = Overflow.INFINITY if DTYPES[target].format.has_infinity else Overflow.NAN
    for overflow in (Overflow.SATURATE, special):
        verdict, conformance = checked(source, target, with_overflow(x, target, overflow), x)
        assert verdict.status is Status.OK, verdict.summary
        assert (
            conformance.behaviour.rounding == "nearest_even"
            and conformance.behaviour.overflow == conformance.behaviour.infinity == overflow
        )
        assert (conformance.differing == 0) == (overflow is Overflow.SATURATE)


WAYS = {
    "nearest_away": Kind.TIES_AWAY, "toward_zero": Kind.TRUNCATED, "nearest_even via bf16": Kind.DOUBLE_ROUNDING,
    "nearest_even via fp16": Kind.DOUBLE_ROUNDING, "nearest_even, subnormals flushed": Kind.SUBNORMAL_FLUSHED,
}


@pytest.mark.parametrize("target", FP8)
@pytest.mark.parametrize("way", WAYS)
def test_a_wrong_way_to_round_is_named_and_every_wrong_input_counted(way, target):
    _, x = discriminating("fp32", target)
    numbers, right = grid(DTYPES[target]), expected_codes(x, DTYPES[target])
    plain = dict(hypotheses(DTYPES["fp32"], DTYPES[target]))[way]
    inside = np.abs(x) <= numbers.format.max
    got = right.copy()
    got[inside] = signed(plain(np.abs(x[inside]), np.signbit(x[inside])), x[inside], target)
    verdict, conformance = checked("fp32", target, got, x)
    assert (verdict.status, verdict.kind) == (Status.WRONG, WAYS[way]), verdict.summary
    assert conformance.behaviour.rounding == way
    assert (
        conformance.differing
        == (got != right).sum()
        == sum(d.count for d in conformance.differences if not d.permitted)
        > 0
    )
    assert f"{conformance.differing:,} of {x.size:,} inputs" in verdict.summary


def test_rounding_twice_through_fp32_shows_only_in_fp64():
    _, x = discriminating("fp64", "e4m3fn")
    with np.errstate(over="ignore", invalid="ignore"):
        twice = x.astype(np.float32).astype(np.float64)
    got = with_overflow(twice, "e4m3fn", Overflow.NAN)
    verdict, conformance = checked("fp64", "e4m3fn", got, x)
    assert verdict.kind is Kind.DOUBLE_ROUNDING and conformance.behaviour.rounding == "nearest_even via fp32"
    assert conformance.behaviour.overflow == "nan"        # what the first rounding brings back into range is no mixture
    _, x = discriminating("fp32", "e4m3fn")
    assert checked("fp32", "e4m3fn", with_overflow(x, "e4m3fn", Overflow.NAN), x)[0].status is Status.OK


@pytest.mark.parametrize(
    ("target", "taken_for", "kind"),
    [("e4m3fnuz", "e4m3fn", Kind.FNUZ_AS_FN), ("e4m3fn", "e4m3fnuz", Kind.FN_AS_FNUZ),
     ("e5m2fnuz", "e5m2", Kind.FNUZ_AS_FN)],
)
def test_a_format_taken_for_its_sibling_is_named_in_both_directions(target, taken_for, kind):
    _, x = discriminating("bf16", target)
    verdict, _ = checked("bf16", target, with_overflow(x, taken_for, Overflow.SATURATE), x)
    assert verdict.status is Status.WRONG and verdict.kind is kind, verdict.summary
    codes = np.arange(256, dtype=np.uint8)
    right, misread = values(codes, DTYPES[target]), values(codes, DTYPES[taken_for])
    verdict, _ = checked(
        target, "fp32", expected_codes(misread, DTYPES["fp32"]), right, alternatives={taken_for: misread}
    )
    assert verdict.status is Status.WRONG and verdict.kind is kind, verdict.summary


def test_nan_that_becomes_a_number_is_lost():
    codes = np.arange(256, dtype=np.uint8)
    x = values(codes, DTYPES["e4m3fn"])
    got = expected_codes(np.where(np.isnan(x), np.where(codes > 127, -480.0, 480.0), x), DTYPES["fp32"])
    verdict, conformance = checked("e4m3fn", "fp32", got, x)
    assert verdict.kind is Kind.NAN_CODE_LOST and conformance.differing == 2 and conformance.behaviour.nan == "number"


@pytest.mark.parametrize(("target", "wrong_zero", "word"), [("e4m3fn", 0x00, "positive"), ("e4m3fnuz", 0x80, "nan")])
def test_negative_zero_that_loses_its_sign_or_becomes_nan_is_named(target, wrong_zero, word):
    _, x = discriminating("bf16", target)
    got = expected_codes(x, DTYPES[target])
    got[np.signbit(x) & ((got & 0x7F) == 0) & ~np.isnan(x)] = wrong_zero
    verdict, conformance = checked("bf16", target, got, x)
    assert verdict.kind is Kind.NEGATIVE_ZERO and conformance.behaviour.negative_zero == word
    assert [d.kind for d in conformance.differences if not d.permitted] == [InputKind.NEGATIVE_ZERO]
    assert conformance.behaviour.rounding == "nearest_even"


def test_e5m2_may_saturate_or_go_to_infinity_but_not_each_where_it_likes():
    _, x = discriminating("bf16", "e5m2")
    got = with_overflow(x, "e5m2", Overflow.SATURATE)
    got[np.isinf(x)] = np.where(np.signbit(x[np.isinf(x)]), 0xFC, 0x7C)
    verdict, conformance = checked("bf16", "e5m2", got, x)
    assert (verdict.status, verdict.kind) == (Status.WRONG, Kind.OVERFLOW_INF)
    assert (
        conformance.behaviour.overflow == "saturate"
        and conformance.behaviour.infinity == "infinity"
        and conformance.differing == 2
    )


def test_one_input_of_hundreds_of_thousands_is_found_and_shown_in_bits():
    bits, x = discriminating("fp32", "e4m3fn")
    got = expected_codes(x, DTYPES["e4m3fn"])
    at = int(np.flatnonzero(x == 3.25)[0])
    got[at] += 1
    verdict, conformance = checked("fp32", "e4m3fn", got, x)
    (difference,) = conformance.differences
    assert verdict.status is Status.WRONG and difference.kind is not InputKind.TIE and difference.count == 1
    assert (difference.examples[0].got, difference.examples[0].expected, difference.examples[0].input_value) == (
        "0x46", "0x45", "3.25"
    )
    assert conformance.behaviour.rounding == f"mixture: nearest_even on {100 * (1 - 1 / (np.abs(x) <= 448).sum()):.4g}%"


def test_nan_payloads_are_counted_apart_and_allowed():
    _, x = discriminating("bf16", "e4m3fn")
    got = expected_codes(x, DTYPES["e4m3fn"])
    got[np.flatnonzero(np.isnan(x))[::2]] = 0xFF
    verdict, conformance = checked("bf16", "e4m3fn", got, x)
    assert verdict.status is Status.OK and conformance.differing == 0
    assert [(d.kind, d.permitted, d.count) for d in conformance.differences] == [(InputKind.NAN_PAYLOAD, True, 127)]
    assert conformance.behaviour.nan_codes == ["0x7f", "0xff"]


def test_a_product_that_is_not_rounded_before_the_cast_is_told_from_a_wrong_cast():
    bf16 = DTYPES["bf16"]
    first, second = (values(bits, bf16) for bits in product_inputs(bf16))
    with np.errstate(invalid="ignore"):
        exact = first * second
    rounded = values(expected_codes(exact, bf16).astype(np.uint16), bf16)
    for target, overflow in (("e4m3fn", Overflow.SATURATE), ("e4m3fnuz", Overflow.NAN), ("e5m2", Overflow.INFINITY)):
        kept = with_overflow(exact, target, overflow)
        verdict, conformance = checked("bf16", target, kept, rounded, alternatives={EXACT_PRODUCT: exact})
        assert verdict.status is Status.OK and "only if the product is not rounded to its dtype" in verdict.summary
        assert conformance.behaviour.taken_as == EXACT_PRODUCT and conformance.behaviour.overflow == overflow
        (kept,) = (d for d in conformance.differences if d.kind is InputKind.UNROUNDED_PRODUCT)
        saturated = with_overflow(exact, target, Overflow.SATURATE) != expected_codes(rounded, DTYPES[target])
        assert kept.permitted and kept.count == saturated.sum() > 0
    once = with_overflow(rounded, "e4m3fn", Overflow.SATURATE)
    assert checked("bf16", "e4m3fn", once, rounded, alternatives={EXACT_PRODUCT: exact})[0].status is Status.OK


def test_infinity_that_is_lost_with_nan_is_named_and_shown_first():
    """What Triton's e5m2 to bf16 does on NVIDIA GPUs: 0x7c is 65536."""
    e5m2 = np.arange(256, dtype=np.uint8)
    x = values(e5m2, DTYPES["e5m2"])
    got = expected_codes(x, DTYPES["bf16"]).astype(np.uint16)
    magnitude = e5m2 & 0x7F
    special = magnitude >= 0x7C
    got[special] = ((e5m2[special] & 0x80).astype(np.uint16) << 8) | (
        0x4780 + 0x20 * (magnitude[special] - 0x7C).astype(np.uint16)
    )
    verdict, _ = checked("e5m2", "bf16", got, x)
    assert (verdict.kind, verdict.evidence["mistake"]) == (
        Kind.NAN_CODE_LOST,
        "turns infinity and NaN into finite numbers",
    )
    assert "(inf) gives 0x4780 (65536), not 0x7f80 (inf)" in verdict.summary
    got[special & (magnitude == 0x7C)] = [0x7F80, 0xFF80]
    assert checked("e5m2", "bf16", got, x)[0].evidence["mistake"] == "turns NaN into a number"


def test_of_a_mixture_past_the_maximum_an_input_is_shown_that_becomes_what_no_rule_permits():
    _, x = discriminating("fp32", "e4m3fn")
    got = with_overflow(x, "e4m3fn", Overflow.NAN)
    (wrapped, *_) = np.flatnonzero((x > 1000) & np.isfinite(x))[500:]
    got[wrapped] = 0x78     # 256
    verdict, conformance = checked("fp32", "e4m3fn", got, x)
    assert verdict.status is Status.WRONG and "gives 0x78 (256), not 0x7e (448)" in verdict.summary
    (overflow,) = (one for one in conformance.differences if one.kind is InputKind.OVERFLOW)
    assert overflow.examples[0].got == "0x78" and overflow.count > 1


def test_e8m0_may_round_either_way_but_one_way_only():
    _, x = discriminating("fp32", "e8m0")
    x = x[np.isfinite(x) & (x >= 2.0**-127) & (x <= 2.0**127)]
    numbers = grid(DTYPES["e8m0"])
    for way in ("nearest_away", "toward_zero", "away_from_zero"):
        assert checked("fp32", "e8m0", round_magnitudes(x, numbers, way), x)[0].status is Status.OK
    mixed = np.where(x < 1, round_magnitudes(x, numbers, "toward_zero"), round_magnitudes(x, numbers, "away_from_zero"))
    assert checked("fp32", "e8m0", mixed, x)[0].status is Status.WRONG


def test_a_fault_that_the_discriminating_inputs_miss_shows_on_all_inputs():
    _, x = discriminating("bf16", "e4m3fn")
    check = ConformanceCheck(DTYPES["bf16"], DTYPES["e4m3fn"])
    check.add(x, expected_codes(x, DTYPES["e4m3fn"]), lambda index: ("", ""))
    every = check.restarted()
    every.add_conforming(999)
    every.add(np.array([1.1]), np.array([0x39 + 1]), lambda index: ("0x3f8ccccd", "1.1"))
    conformance = every.result()
    assert (conformance.inputs, conformance.differing) == (
        1000,
        1,
    ) and conformance.behaviour.rounding == "mixture: nearest_even on 99.9%"


# ---- constants ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("name", "independent"),
    [("e4m3fn", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2), ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
     ("e5m2fnuz", ml_dtypes.float8_e5m2fnuz), ("bf16", ml_dtypes.bfloat16), ("fp16", np.float16), ("fp32", np.float32),
     ("fp64", np.float64)],
)
def test_constants_are_what_ml_dtypes_and_numpy_say(name, independent):
    told, defined = ml_dtypes.finfo(independent), defined_constants(DTYPES[name])
    for constant in ("max", "min", "eps", "smallest_normal", "tiny", "bits"):
        assert defined[constant] == float(getattr(told, constant)), constant
    if not DTYPES[name].is_float8:      # ml_dtypes counts an FP8's decimal digits in a way of its own
        assert defined["resolution"] == pytest.approx(float(told.resolution), rel=1e-3)

"""A diagnosis is right, or says that it cannot tell: never confidently wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from core import core_of

from fpxbench.checking import inputs
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.decode_fault import DecodeFault
from fpxbench.diagnosis.decode_faults import decode_faults
from fpxbench.diagnosis.effective_weight import Prediction, Readout
from fpxbench.diagnosis.encode_faults import encode_faults, encoded, quotient_slack
from fpxbench.diagnosis.hypotheses import Predictor
from fpxbench.diagnosis.products import diagnose_product
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.stored import diagnose_quantization
from fpxbench.implementation import Implementation
from fpxbench.numbers import tensor_codec
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.targets.cell_outcomes import named_table

pytestmark = pytest.mark.usefixtures("one_thread")


class Effective(Implementation):
    """Multiplies by a weight that `effective` makes of the stored one."""

    def __init__(self, effective=QuantizedWeight.dequantize):
        self.effective = effective

    def matmul(self, x, weight):
        return (x.float() @ self.effective(weight).float().T).to(x.dtype)


class Storing(Implementation):
    """Stores codes and scales that `store` makes of (weight, scheme)."""

    def __init__(self, store):
        self.store = store

    def quantize(self, weight, scheme):
        codes, scales = self.store(weight, scheme)
        return QuantizedWeight.from_codes(codes, scales, scheme, self.layout)


def operands_for(
    implementation: Implementation, scheme: str, *, m=16, n=48, k=96, workload="canary.ragged", layout="planar", seed=3
) -> Operands:
    case = Case(implementation="x", scheme=scheme, workload=workload, m=m, n=n, k=k)
    implementation.layout = layout
    original = inputs.make_weight(case, seed)
    weight = implementation.quantize(original, scheme_named(scheme))
    return Operands(case, "cpu", seed, original, weight, weight.dequantize())


def diagnosed(effective, scheme: str, **how):
    implementation = Effective(effective)
    return diagnose_product(implementation, operands_for(implementation, scheme, **how))


def stored_wrongly(store, scheme: str, **how):
    operands = operands_for(Storing(store), scheme, **how)
    return diagnose_quantization(operands.original, operands)


# The effective weight.


SCHEMES = {
    "e4m3fn-row": "bytes", "e4m3fnuz-row": "planar", "e5m2-row": "planar", "mxfp8_e4m3fn": "planar",
    "mxfp6_e3m2": "planar", "e3m2-g32": "planar", "mxfp4": "planar", "nvfp4": "planar", "e2m2-row": "planar",
    "int8-row": "bytes", "nf4-g64": "planar",
}
"""Scheme -> layout."""
DECODE_FAULTS = [(scheme, workload) for scheme in SCHEMES for workload in ("canary.codes", "canary.ragged")]
ONE_IN = 12
"""So many of a weight's decode faults, and each that no weight before it can have, are diagnosed without -m slow."""


@cache
def effects(scheme: str, workload: str) -> list[tuple[DecodeFault, Operands, Callable]]:
    """Return the decode faults that change the weight, each with the operands and the effective weight of a stored one.
    """
    operands = operands_for(Effective(), scheme, workload=workload, layout=SCHEMES[scheme])
    known = decode_faults(operands.weight)
    planes = [fault for fault in known if fault.kind is Kind.PLANE_SWAP]
    found = []
    for fault in [fault for fault in known if fault not in planes[:-4]]:    # of the 24 orders of four planes, a few

        def effective(weight, fault=fault):
            columns = torch.arange(weight.shape[1])
            everything = Readout(weight, columns, weight.dequantize().double(), None, torch.bfloat16, None)
            return Predictor(everything).predict([fault], torch.arange(weight.shape[0])).weight

        # Without a difference it is no fault on this weight: its scales are all 1, or it holds no such code.
        if not bool((effective(operands.weight) == operands.decoded).all()):
            found.append((fault, operands, effective))
    return found


def form_of(fault: DecodeFault) -> tuple[Kind, str, str]:
    """Return what a fault is, whatever the scheme's numbers and names of formats."""
    return fault.kind, fault.step, re.sub(r"0x[0-9a-f]+|e\dm\d\w*|[\d.]+", "#", fault.message)


@cache
def core() -> dict[tuple[str, str], list[tuple[DecodeFault, Operands, Callable]]]:
    """Return the decode faults that are diagnosed without -m slow, by scheme and workload."""
    return core_of({weight: effects(*weight) for weight in DECODE_FAULTS}, lambda effect: form_of(effect[0]), ONE_IN)


def assert_named_or_among_those_that_fit(tried: list[tuple[DecodeFault, Operands, Callable]]) -> None:
    """Diagnose implementations with the effective weight that one fault gives: the diagnosis names that fault, or a tie
    with it in."""
    named = 0
    for fault, operands, effective in tried:
        found = diagnose_product(Effective(effective), operands)
        fitting = found.evidence.get("fitting", [])
        unseen = found.message.endswith("wrong for some activations only")   # too small a difference for the tolerance
        assert found.kind is fault.kind or unseen or any(str(fault.kind) in name for name in fitting), \
            (fault.kind, fault.message, found.kind, found.message)
        named += found.kind is fault.kind
    assert named >= min(3, len(tried) // 2)


def test_the_core_has_every_decode_fault_and_every_scheme() -> None:
    every = {form_of(effect[0]) for weight in DECODE_FAULTS for effect in effects(*weight)}
    assert {form_of(effect[0]) for weight in DECODE_FAULTS for effect in core()[weight]} == every and len(every) > 60
    assert all(core()[weight] for weight in DECODE_FAULTS)


@pytest.mark.parametrize(("scheme", "workload"), DECODE_FAULTS)
def test_a_known_decode_fault_is_named_or_counted_among_those_that_fit(scheme, workload) -> None:
    assert_named_or_among_those_that_fit(core()[scheme, workload])


@pytest.mark.slow      # 2 minutes
@pytest.mark.parametrize(("scheme", "workload"), DECODE_FAULTS)
def test_each_known_decode_fault_is_named_or_counted_among_those_that_fit(scheme, workload) -> None:
    assert_named_or_among_those_that_fit(effects(scheme, workload))


def test_scales_are_read_together_where_each_weight_meets_a_known_block(monkeypatch) -> None:
    """One at a time, the 256 codes of E8M0 would take a weight each."""
    held = []
    hold = Bench.hold
    monkeypatch.setattr(Bench, "hold", lambda bench, *what: held.append(what) or hold(bench, *what))

    def next_rows_scales(weight):
        grid = weight.scale_grid().roll(1, dims=0)
        return tensor_codec.decode(weight.codes(), weight.scheme.format) * grid.repeat_interleave(32, dim=1)

    found = diagnosed(next_rows_scales, "mxfp4")
    assert found.kind is Kind.BLOCK_OFF_BY_ONE, found.message
    assert len(held) < 100


def test_what_is_right_for_another_activation_is_not_said_to_be_right_when_asked_again() -> None:
    """The activation of a diagnosis is another one than that whose product was wrong."""
    found = diagnosed(QuantizedWeight.dequantize, "e4m3fn-row")
    assert found.kind is Kind.INACCURATE
    assert found.message.endswith("and so is the product of another activation: it is wrong for some activations only")


def test_the_bias_is_told_with_both_numbers() -> None:
    def by_fnuz(weight):
        return tensor_codec.decode(weight.codes(), FORMATS["e4m3fnuz"]) * weight.scale_grid()

    found = diagnosed(by_fnuz, "e4m3fn-row")
    assert found.kind is Kind.FN_AS_FNUZ
    assert found.message.startswith("every normal code decodes to half its value: read with bias 8, the format's is 7")
    assert found.evidence["weights_read"] == 48 * 96
    assert float(found.evidence["example"]["read_as"]) == pytest.approx(
        float(found.evidence["example"]["stored"]) / 2, rel=0.01
    )


def test_a_nan_code_read_as_a_number_is_named_though_no_encoder_writes_one() -> None:
    implementation = Effective(lambda weight: weight.dequantize().nan_to_num(0.0))
    operands = operands_for(implementation, "e4m3fnuz-row")
    codes = operands.weight.codes()
    codes[5, 7] = 0x80
    operands.weight = QuantizedWeight.from_codes(codes, Scales(operands.weight.scales), operands.weight.scheme)
    operands.decoded = operands.weight.dequantize()
    found = diagnose_product(implementation, operands)
    assert found.kind is Kind.NAN_CODE_LOST
    assert "0x80" in found.message


def test_what_looks_the_same_is_not_decided() -> None:
    """The weight is remembered from the first call, so a probe weight shows nothing: half of everything is FNUZ's bias
    or a factor on it all."""
    class Remembers(Effective):
        kept = None

        def matmul(self, x, weight):
            if self.kept is None:
                self.kept = weight.dequantize() / 2
            return (x.float() @ self.kept.T).to(x.dtype)

    implementation = Remembers()
    found = diagnose_product(implementation, operands_for(implementation, "mxfp8_e4m3fn"))
    assert found.kind is Kind.INACCURATE
    assert found.evidence["fitting"] == ["fn_as_fnuz", "scaled"]
    assert found.message.startswith("cannot tell")


def test_two_faults_at_once_are_both_named() -> None:
    def unsigned_and_unscaled(weight):
        return tensor_codec.decode(weight.codes(), weight.scheme.format).abs()

    found = diagnosed(unsigned_and_unscaled, "e2m1-g32")
    assert found.evidence["kinds"] == ["scale_missing", "sign_lost"]
    assert "two faults at once" in found.message


def test_a_table_that_no_known_fault_gives_is_read_out_code_by_code() -> None:
    def another(weight):
        table = tensor_codec.decode_table(weight.scheme.format)
        table[0x30] *= 1.25
        return table[weight.codes().int()] * weight.scale_grid()

    found = diagnosed(another, "e4m3fn-row", workload="canary.codes")
    assert found.kind is Kind.INACCURATE
    assert found.evidence["codes_misread"] == 1
    assert "0x30 0.0110.000 as 0.625 instead of 0.5" in found.message


@pytest.mark.parametrize(
    ("first", "last", "factor", "what"),
    [(90, 96, 0, "columns 90 to 95, the tail of K = 96, are ignored"),
     (32, 40, 0, "columns 32 to 39 of K = 96, are ignored"), (0, 16, 2, "columns 0 to 15 of K = 96, are counted twice"),
     (64, 65, -1, "columns 64 to 64 of K = 96, are misread")],
)
def test_a_run_of_columns_that_alone_is_wrong_is_found(first, last, factor, what) -> None:
    def effective(weight):
        w = weight.dequantize()
        w[:, first:last] *= factor
        return w

    for m in (1, 16):
        assert what in diagnosed(effective, "e4m3fn-row", m=m).message


def test_the_part_of_the_output_that_is_wrong_is_named() -> None:
    class LastRows(Effective):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            y[12:] = 0
            return y

    found = diagnose_product(LastRows(), operands_for(LastRows(), "e4m3fn-row"))
    assert found.message == "wrong only in output rows 12 to 15 of 16, all of it zero"


def test_noise_is_gibberish_and_a_small_error_an_inaccuracy() -> None:
    def noise(weight):
        return torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def near(weight):
        return weight.dequantize() * (1 + 0.1 * noise(weight))

    nothing = diagnosed(lambda weight: torch.zeros(weight.shape), "e4m3fn-row")
    assert (nothing.kind, nothing.message) == (Kind.GIBBERISH, "every weight reads as zero")
    assert diagnosed(noise, "e4m3fn-row").kind is Kind.GIBBERISH
    assert diagnosed(near, "e4m3fn-row").kind is Kind.INACCURATE


def test_a_weight_in_a_layout_of_its_own_is_diagnosed_without_codes() -> None:
    class Own(Effective):
        def quantize(self, weight, scheme):
            oracle = super().quantize(weight, scheme)
            return QuantizedWeight(scheme, oracle.shape, "own", oracle.dequantize())

        def matmul(self, x, weight):
            return (x.float() @ weight.packed.abs().T).to(x.dtype)

    implementation = Own()
    case = Case(implementation="x", scheme="e4m3fn-row", workload="canary.ragged", m=4, n=32, k=64)
    original = inputs.make_weight(case, 1)
    weight = implementation.quantize(original, scheme_named("e4m3fn-row"))
    operands = Operands(case, "cpu", 1, original, weight, weight.packed)
    assert diagnose_product(implementation, operands).kind is Kind.SIGN_LOST
    assert diagnose_quantization(original, operands) is None


def test_a_readout_of_nothing_but_nan_fits_no_number() -> None:
    nothing = Prediction(torch.ones(4, 4, dtype=torch.float64), torch.ones(4, dtype=torch.bool))
    seen = torch.full((4, 4), torch.nan, dtype=torch.float64)
    assert not Readout(None, torch.arange(4), seen, nothing, torch.bfloat16, None).fits(nothing)


# What is stored.


@pytest.mark.parametrize(
    "scheme",
    ["e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "mxfp8_e4m3fn", "mxfp8_e5m2", "e3m2-g32", "mxfp4", "nvfp4", "int8-row",
     "nf4-g64"],
)
def test_each_known_encode_fault_is_named_or_counted_among_those_that_fit(scheme) -> None:
    """Each fault is made on probe values; unless it changes no code there, it is found."""
    operands = operands_for(Effective(), scheme, workload="canary.codes", n=64, k=256)
    fmt, scaling = operands.weight.scheme.format, operands.weight.scheme.scaling
    right, scales = operands.weight.scheme.quantize(operands.original)
    named = 0
    for fault in encode_faults(fmt, "planar", 256, fmt.max_code - 1):
        codes = encoded(operands.original, lambda w: scaling.divide(w, scales), fmt, [fault])
        operands.weight = QuantizedWeight.from_codes(codes, scales, operands.weight.scheme)
        found = diagnose_quantization(operands.original, operands)
        if bool((codes == right).all()):
            assert found is None
            continue
        assert found is not None, fault.message
        assert found.kind is fault.kind or str(fault.kind) in found.evidence.get("fitting", []), (
            fault.message,
            found.message,
        )
        named += found.kind is fault.kind
    assert named >= 4


@pytest.mark.parametrize("scheme", ["e4m3fn-row", "e4m3fnuz-tensor", "e3m2-g32", "nvfp4", "int8-row", "mxfp6_e2m3"])
def test_another_right_way_to_quantize_is_not_a_fault(scheme) -> None:
    """Multiplying by the reciprocal, max by reciprocal, -0 stored as 0: fp32's last bit and a zero's sign are free."""
    def store(weight, scheme):
        _, scales = scheme.quantize(weight)
        if not scheme.scaling.scale_format.coded:
            reciprocal = torch.tensor(1 / scheme.format.max)
            scales = Scales(scales.stored * scheme.format.max * reciprocal)
        unit = scheme.scaling.divide(torch.ones_like(weight), scales)
        codes = tensor_codec.encode(weight * unit, scheme.format)
        if scheme.format.specials != "fnuz" and not scheme.format.twos_complement:
            codes = codes.masked_fill(codes == 1 << (scheme.format.bits - 1), 0)
        return codes, scales

    for seed in range(5):
        assert stored_wrongly(store, scheme, n=64, k=320, seed=seed) is None


def test_a_halfway_value_is_no_matter_of_taste_where_the_scale_is_exact() -> None:
    def ties_away(weight, scheme):
        _, scales = scheme.quantize(weight)
        return tensor_codec.encode(
            scheme.scaling.divide(weight, scales), scheme.format, rounding=Rounding.NEAREST_AWAY
        ), scales

    for scheme in ("mxfp4", "mxfp8_e4m3fn", "e4m3fn-row", "nvfp4"):
        assert stored_wrongly(ties_away, scheme, workload="canary.codes", n=64, k=256).kind is Kind.TIES_AWAY


@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4.up", "nvfp4.div", "nvfp4.normal", "e2m1-nv16x16"])
def test_a_halfway_value_goes_either_way_only_where_its_quotient_is_inexact(scheme) -> None:
    operands = operands_for(Effective(), scheme, workload="canary.codes", n=64, k=256)
    weight, fmt, scaling = operands.weight, operands.weight.scheme.format, operands.weight.scheme.scaling
    scales, right = weight.stored_scales, weight.codes()
    away = tensor_codec.encode(scaling.divide(operands.original, scales), fmt, rounding=Rounding.NEAREST_AWAY)
    exact = quotient_slack(scales, weight.scheme, 64, 256) == 0
    for where, named in ((exact, Kind.TIES_AWAY), (~exact, None)):
        codes = torch.where(where, away, right)
        assert bool((codes != right).any())
        operands.weight = QuantizedWeight.from_codes(codes, scales, weight.scheme)
        found = diagnose_quantization(operands.original, operands)
        assert (found and found.kind) is named
    factor = 1 / scaling.levels(scales)[1] / scaling.spread(scaling.levels(scales)[0], 64, 256)
    codes = tensor_codec.encode(operands.original * factor, fmt)       # as torchao multiplies: w * ((1 / t) / s)
    operands.weight = QuantizedWeight.from_codes(codes, scales, weight.scheme)
    assert diagnose_quantization(operands.original, operands) is None


@pytest.mark.parametrize(("scheme", "digits"), [("nf4-g64", 16), ("bnbfp4-g64", 6)])
def test_thresholds_of_a_codebook_are_midpoints_as_far_as_fp32_holds_them(scheme, digits) -> None:
    def by_thresholds(weight, scheme, moved=0.0):
        _, scales = scheme.quantize(weight)
        numbers, book = scheme.scaling.divide(weight, scales), scheme.format
        limits = torch.tensor([float(f"{middle:.{digits}g}") * (1 + moved) for middle, _ in book.thresholds()])
        order = torch.tensor([code for _, code in book.ascending()])
        return order[torch.bucketize(numbers.contiguous(), limits)].to(torch.uint8), scales

    for workload in ("canary.codes", "canary.seed"):
        assert stored_wrongly(by_thresholds, scheme, workload=workload, n=64, k=256) is None
    found = stored_wrongly(lambda *given: by_thresholds(*given, moved=0.02), scheme, workload="canary.codes", n=64,
                           k=256)
    assert found is not None and "codes are wrong" in found.message


def test_one_wrong_code_is_found_and_shown_in_bits() -> None:
    def one_off(weight, scheme):
        codes, scales = scheme.quantize(weight)
        codes[17, 33] ^= 1
        return codes, scales

    found = stored_wrongly(one_off, "e4m3fn-row")
    assert found.kind is Kind.INACCURATE
    assert found.evidence["codes_wrong"] == 1
    assert "row 17, column 33" in found.evidence["examples"][0]


def test_scales_rounded_to_bf16_are_inaccurate_and_their_codes_right() -> None:
    def rounded(weight, scheme):
        scales = Scales(scheme.quantize(weight)[1].stored.bfloat16().float())
        return tensor_codec.encode(scheme.scaling.divide(weight, scales), scheme.format), scales

    found = stored_wrongly(rounded, "e4m3fn-row")
    assert found.kind is Kind.INACCURATE
    assert "codes_wrong" not in found.evidence


@pytest.mark.parametrize(
    ("other", "of"), [(240, "e4m3fn-row"), (224, "e4m3fn-row"), (448, "e4m3fnuz-row"), (128, "int8-row")]
)
def test_the_maximum_that_scales_were_taken_from_is_told(other, of) -> None:
    def store(weight, scheme):
        scales = Scales(weight.abs().amax(dim=1, keepdim=True) / other)
        return tensor_codec.encode(scheme.scaling.divide(weight, scales), scheme.format), scales

    found = stored_wrongly(store, of)
    assert found.kind is Kind.WRONG_MAX
    assert f"from the maximum {other};" in found.message


def test_scales_of_another_shape_are_told_by_both_shapes() -> None:
    def store(weight, scheme):
        codes, scales = scheme.quantize(weight)
        return codes, Scales(scales.stored.T.contiguous())

    operands = operands_for(Effective(), "e4m3fn-g32")
    codes, scales = store(operands.original, operands.weight.scheme)
    operands.weight = QuantizedWeight.from_codes(codes, scales, operands.weight.scheme)
    found = diagnose_quantization(operands.original, operands)
    assert found.kind is Kind.WRONG_SHAPE
    assert "[3, 48]" in found.message and "[48, 3]" in found.message


@pytest.mark.parametrize(("scheme", "factor"), [("e4m3fn-row", 0.5), ("e4m3fn-g32", 3.0)])
def test_scales_off_by_a_factor_from_those_that_the_codes_were_made_under_are_no_other_maximum(scheme, factor) -> None:
    def off(weight, scheme):
        codes, scales = scheme.quantize(weight)
        return codes, Scales(scales.stored * factor)

    found = stored_wrongly(off, scheme)
    assert found.kind is Kind.SCALED
    assert found.message == f"every stored scale is {factor:g} times the one that its codes were made under"


def test_a_table_that_makes_infinity_a_number_says_so_before_nan() -> None:
    """Triton's e5m2 to bf16 on NVIDIA GPUs: 0x7c is 65536."""
    e5m2 = FORMATS["e5m2"]
    read = tuple(replace(e5m2, specials="none").value(code) for code in range(256))
    kind, message = named_table(e5m2, read)
    assert kind is Kind.NAN_CODE_LOST and read[0x7C] == 65536
    assert message.startswith("infinity, 0x7c 0.11111.00, and NaN codes such as 0x7f")
    twice = tuple(2 * e5m2.value(code) for code in range(256))
    assert named_table(e5m2, twice)[0] is Kind.SCALED

"""A fault in an activation's quantizer is named as the same fault of a weight's is, or none is claimed."""

from __future__ import annotations

from functools import partial

import fault_injection
import pytest
from activation_injection import SCHEMES, FaultyActivation, activation_injections, right
from confusion import NAMED, UNSEEN, WRONG, outcome_of_activation

from fpxbench.checking import activation_rules
from fpxbench.diagnosis.activation_explained import explain_activation
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def verdict_on(implementation: Implementation, scheme: str, explain=explain_activation):
    case = Case(implementation="i", scheme=scheme, workload="x", m=5, n=48, k=160)
    return activation_rules.find_rule(implementation, prepare(implementation, TrialRequest(case=case, seed=1)), explain)


def injected(scheme: str, about: str) -> FaultyActivation:
    found, = (each for each in activation_injections(scheme_named(scheme)) if each.about == about)
    return FaultyActivation(found)


@pytest.mark.parametrize(("scheme", "about", "kind"), [
    ("mxfp8_e4m3fn+mxfp8_e4m3fn", "scales read in tiles", Kind.SCALE_SWIZZLED),
    ("mxfp8_e4m3fn+mxfp8_e4m3fn", "ties away", Kind.TIES_AWAY),
    ("mxfp4+mxfp8_e4m3fn", "clamped at half the maximum", Kind.SATURATED),
    ("nvfp4+nvfp4", "the next scale", Kind.BLOCK_OFF_BY_ONE),
    ("nvfp4+nvfp4", "no tensor scale", Kind.GLOBAL_SCALE_MISSING),
    ("nvfp4+nvfp4", "subnormal scales read as zero", Kind.SCALE_ENDS_LOST),
    ("nvfp4+nvfp4", "scale bits as an integer", Kind.SCALE_BITS_AS_VALUE),
    ("nvfp4+nvfp4", "the tensor scale of the first call", Kind.STALE_ACTIVATION_SCALE),
    ("nvfp4+nvfp4", "ties to zero", Kind.TIES_NOT_EVEN),
    ("e4m3fn-row+e4m3fn-row", "read as the sibling", Kind.FN_AS_FNUZ),
    ("e4m3fn-row+e4m3fn-row", "implicit one", Kind.SUBNORMAL_WRONG),
    ("e4m3fn-b128x128+e4m3fn-g128", "grid transposed", Kind.SCALE_TRANSPOSED),
    ("int8-row+int8-row", "row scales along K", Kind.SCALE_TRANSPOSED),
    # Of another shape, in an encoder, or with a number of its own.
    ("nvfp4+nvfp4", "codes under unrounded scales", Kind.SCALE_ROUNDED_LATE),
    ("e4m3fn-b128x128+e4m3fn-g128", "ties up", Kind.TIES_NOT_EVEN),
    ("e4m3fn-row+e4m3fn-row", "divided by the previous token's scale", Kind.BLOCK_OFF_BY_ONE),
    ("int8-row+int8-row", "1.1 of each scale throughout", Kind.WRONG_MAX),
    # Nothing but a loud token, or a tiny one, shows other codes than the largest.
    ("e4m3fn-tensor+e4m3fn-tensor", "read as e5m2", Kind.FORMAT_MISTAKEN),
    ("mxfp8_e4m3fn+mxfp8_e4m3fn", "the sibling's codes", Kind.FNUZ_AS_FN),
])
def test_a_fault_of_blocks_codes_or_scales_of_an_activation_is_named(scheme: str, about: str, kind: Kind) -> None:
    verdict = verdict_on(injected(scheme, about), scheme)
    assert verdict is not None and verdict.kind is kind, verdict
    assert "the activation is" in verdict.summary


@pytest.mark.parametrize(("scheme", "about", "kind", "words"), [
    ("int8-row+int8-row", "bits in reverse order", Kind.FORMAT_MISTAKEN, "read in reverse order"),
    ("nvfp4+nvfp4", "two's complement", Kind.FORMAT_MISTAKEN, "two's complement"),
    ("nvfp4+nvfp4", "all bits but the sign inverted", Kind.FORMAT_MISTAKEN, "bits 0, 1, 2 of each code are inverted"),
    ("nvfp4+nvfp4", "scales below 2^-5 doubled", Kind.SCALE_MISREAD, "2 times its value"),
    ("e4m3fn-row+e4m3fn-row", "scales clamped", Kind.SCALE_NARROWED, "those above 1024 multiply by it"),
    ("nvfp4+nvfp4", "a constant for the last 40 columns", Kind.SCALE_MISSING, "columns 473 to 511"),
    ("nvfp4+nvfp4", "every third block's scale", Kind.SCALE_SHARED, "3 * (c div 3)"),
    pytest.param("int8-row+int8-row", "tokens' scales in a random order", Kind.SCALE_PERMUTED, "without a simple rule",
                 marks=pytest.mark.slow),
    ("nvfp4+nvfp4", "rounded up from 0.7 on", Kind.INACCURATE, "from 0.7 of the way"),
])
def test_maps_of_an_activations_quantizer_are_recovered(scheme: str, about: str, kind: Kind, words: str) -> None:
    verdict = verdict_on(injected(scheme, about), scheme)
    assert verdict is not None and verdict.kind is kind and words in verdict.summary, verdict


@pytest.mark.parametrize("about", ["read as e5m2", "the sibling's codes"])
def test_where_every_token_becomes_nan_no_fault_is_claimed(about: str) -> None:
    """Each token's largest element has the largest code, which is NaN to both."""
    verdict = verdict_on(injected("e4m3fn-row+e4m3fn-row", about), "e4m3fn-row+e4m3fn-row")
    assert verdict is not None and (verdict.status, verdict.kind) == (Status.NONFINITE, None)
    assert verdict.evidence["fitting"] == [Kind.FNUZ_AS_FN, Kind.FORMAT_MISTAKEN]
    assert "every token that holds a number becomes NaN" in verdict.summary


def test_a_sweep_ends_its_experiments_and_says_so() -> None:
    scheme = "int8-row+int8-row"
    verdict = verdict_on(injected(scheme, "scales clamped"), scheme, partial(explain_activation, seconds=0.0))
    assert verdict is not None and "`fpxbench inspect` makes experiments" in verdict.summary, verdict


@pytest.mark.slow       # 20 seconds
def test_a_constant_in_the_weights_scales_is_not_taken_for_the_activations() -> None:
    class OfTheWeight(FaultyActivation):
        def quantized(self, x, scheme):
            return right(x, scheme)

        def matmul(self, x, weight):
            flat = x.reshape(-1, x.shape[-1]).float()
            read = fault_injection.read(weight, constant=(slice(None), slice(128, None), 0.5))
            return self.multiply(self.quantized(flat, weight.scheme.activation), read).to(x.dtype).reshape(
                *x.shape[:-1], -1)

    scheme = "int8-row+int8-row"
    assert verdict_on(OfTheWeight(activation_injections(scheme_named(scheme))[0]), scheme) is None


def test_without_the_faults_of_weights_none_of_them_is_claimed() -> None:
    scheme = "nvfp4+nvfp4"
    verdict = verdict_on(injected(scheme, "the next scale"), scheme, explain=None)
    assert verdict is not None and verdict.kind is Kind.INACCURATE and "by no known rule" in verdict.summary


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_activation_that_follows_its_rule_is_right_also_on_ties_and_quiet_blocks(scheme: str) -> None:
    class Right(FaultyActivation):
        def quantized(self, x, scheme):
            return right(x, scheme)

    assert verdict_on(Right(activation_injections(scheme_named(scheme))[0]), scheme) is None


@pytest.mark.slow       # 10 minutes
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_fault_of_an_activation_is_taken_for_another(scheme: str) -> None:
    outcomes = [outcome_of_activation(scheme, each) for each in activation_injections(scheme_named(scheme))]
    assert [one for one in outcomes if one.outcome == WRONG] == []
    left = {one.injected[0].about for one in outcomes if one.outcome not in (NAMED, UNSEEN)}
    assert left <= {"read as e5m2", "the sibling's codes"}      # where every token becomes NaN

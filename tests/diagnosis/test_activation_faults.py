"""A fault in an activation's quantizer is named as the same fault of a weight's is, or none is claimed."""

from __future__ import annotations

import pytest
from activation_injection import SCHEMES, FaultyActivation, activation_injections, right
from confusion import NAMED, UNSEEN, WRONG, outcome_of_activation

from fpxbench.checking import activation_rules
from fpxbench.diagnosis.activation_explained import explain_activation
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
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
])
def test_a_fault_of_blocks_codes_or_scales_of_an_activation_is_named(scheme: str, about: str, kind: Kind) -> None:
    verdict = verdict_on(injected(scheme, about), scheme)
    assert verdict is not None and verdict.kind is kind, verdict
    assert "the activation is" in verdict.summary


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


@pytest.mark.slow       # 5 minutes
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_fault_of_an_activation_is_taken_for_another(scheme: str) -> None:
    outcomes = [outcome_of_activation(scheme, each) for each in activation_injections(scheme_named(scheme))]
    assert [one for one in outcomes if one.outcome == WRONG] == []
    # Constants and other readings of a code's bits are not looked for in activations; other faults change nothing here.
    effective = [one for one in outcomes if one.outcome != UNSEEN]
    assert sum(one.outcome == NAMED for one in effective) >= 0.8 * len(effective)

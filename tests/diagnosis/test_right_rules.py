"""Right quantizers of other rules than the scheme's are never called wrong, declared or not, in whatever order products
are summed."""

from __future__ import annotations

import pytest
import torch
from ruled import ORDERS, RULES, ByRule

from fpxbench.diagnosis.scale_rules import find_scale_rule, rule_beside_zeros
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import TrialResult, _run
from fpxbench.workloads import workload_named

pytestmark = pytest.mark.usefixtures("one_thread")

def run(implementation: ByRule, case: Case, seed: int) -> TrialResult:
    result = TrialResult(verdict=Verdict(status=Status.OK))
    _run(implementation, TrialRequest(case=case, seed=seed, timing_budget_s=0), result)
    return result


def false_alarms(count: int) -> list[str]:
    """Return what was called wrong of so many right cases: rules by orders by shapes by weights."""
    rng = torch.Generator().manual_seed(8)

    def pick(choices):
        choices = list(choices)
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    found = []
    for number in range(count):
        scheme = pick(RULES)
        rule, order, declared = pick(RULES[scheme]), pick(ORDERS), number % 3 != 0
        workload = pick(("random", "random", "canary.values", "canary.codes"))
        if workload == "random":
            n, k, m = pick((32, 77, 128)), pick((64, 96, 203)), pick((1, 2, 7, 16, 33))
        else:
            layer = workload_named(workload)
            n, k, m = layer.n, layer.k, layer.m[0]
        case = Case(implementation="ruled", scheme=scheme, workload=workload, m=m, n=n, k=k,
                    activation=pick(("bf16", "fp16")))
        result = run(ByRule(rule, order, declared=declared), case, number)
        if result.verdict.status is not Status.OK:
            found.append(f"{case.id} {rule} {order} {'declared' if declared else 'undeclared'}: "
                         f"{result.verdict.headline}: {result.verdict.summary}")
        elif declared and result.flags:
            found.append(f"{case.id} {rule}: declared, and flagged {result.flags}")
    return found


def test_none_of_24_right_cases_by_other_rules_is_called_wrong() -> None:
    assert false_alarms(24) == []


@pytest.mark.slow       # 3 minutes
def test_none_of_1000_right_cases_by_other_rules_is_called_wrong() -> None:
    assert false_alarms(1000) == []


SMALL = Case(implementation="ruled", scheme="e4m3fn-row", workload="canary.values", m=6, n=32, k=128)


@pytest.mark.parametrize(("scheme", "rule", "words"), [
    ("e4m3fn-row", "floor", "scales are at least a fixed small number"),
    ("e3m2-g32", "search", "under which it errs less"),
    ("mxfp4", "stochastic", "rounded at random"),
])
def test_an_undeclared_rule_that_is_no_function_of_the_weight_is_named(scheme: str, rule: str, words: str) -> None:
    case = SMALL.model_copy(update={"scheme": scheme, "workload": "random", "n": 64} if rule != "floor" else {})
    result = run(ByRule(rule, declared=False), case, 1)
    assert result.verdict.status is Status.OK, result.verdict.summary
    assert "undeclared_rule" in result.flags and words in result.verdict.summary
    assert f'declare it (`scale_rule = "{rule}"`)' in result.verdict.summary


@pytest.mark.parametrize("declared", [True, False])
def test_powers_of_two_that_are_stored_in_fp32_are_right_where_a_rule_of_coded_scales_chooses_them(declared) -> None:
    result = run(ByRule("e8m0", declared=declared), SMALL.model_copy(update={"workload": "random"}), 1)
    assert result.verdict.status is Status.OK and ("undeclared_rule" in result.flags) is not declared, result.verdict


@pytest.mark.parametrize("scheme", ["mxfp4", "e4m3fn-row"])
def test_random_rounding_with_a_bias_is_named(scheme: str) -> None:
    case = Case(implementation="ruled", scheme=scheme, workload="random", m=4, n=128, k=256)
    result = run(ByRule("stochastic", declared=False, bias=0.1), case, 1)
    assert result.verdict.kind is Kind.ROUNDING_BIASED, result.verdict.summary
    assert "values at" in result.verdict.summary and "go up in" in result.verdict.summary


def test_a_scale_of_another_maximum_is_not_taken_for_a_searched_one() -> None:
    scheme, weight = scheme_named("e2m1-g32"), torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    own = scheme.scaling.choose(weight, scheme.format)
    for factor in (0.8, 1.1):
        scales = Scales(own.stored * factor)
        codes = encode(scheme.scaling.divide(weight, scales), scheme.format)
        assert find_scale_rule(weight, QuantizedWeight.from_codes(codes, scales, scheme, "bytes")) is None
    large = Scales(own.stored.clamp(min=0.4))      # a floor that costs accuracy is none
    codes = encode(scheme.scaling.divide(weight, large), scheme.format)
    assert find_scale_rule(weight, QuantizedWeight.from_codes(codes, large, scheme, "bytes")) is None


@pytest.mark.parametrize("workload", ["canary.codes", "canary.ragged"])
def test_a_second_rounding_is_not_taken_for_a_random_one(workload: str) -> None:
    class Twice(ByRule):
        def quantize(self, weight, scheme):
            scales = scheme.scaling.choose(weight, scheme.format)
            values = scheme.scaling.divide(weight, scales).bfloat16().float()
            return QuantizedWeight.from_codes(encode(values, scheme.format), scales, scheme, self.layout)

        def judged(self, scheme):
            return scheme

    layer = workload_named(workload)
    case = Case(implementation="ruled", scheme="e4m3fn-row", workload=workload, m=3, n=layer.n, k=layer.k)
    assert run(Twice("twice", declared=False), case, 1).verdict.kind is Kind.DOUBLE_ROUNDING


def test_values_rounded_to_nearest_are_not_taken_for_random_ones() -> None:
    scheme, weight = scheme_named("e2m1-g32"), torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for rounding in (Rounding.TOWARD_ZERO, Rounding.UP, Rounding.NEAREST_AWAY):
        scales = scheme.scaling.choose(weight, scheme.format)
        codes = encode(scheme.scaling.divide(weight, scales), scheme.format, rounding)
        assert decode(codes, scheme.format).isfinite().all()
        assert find_scale_rule(weight, QuantizedWeight.from_codes(codes, scales, scheme, "bytes")) is None


def test_the_smallest_of_the_scheme_s_own_scales_is_no_floor() -> None:
    """Rows of zeros with a scale of 0 and NaN codes, as torchao 0.18 stores them, are no sign of another rule."""
    original = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    original[3] = 0
    scheme = scheme_named("e4m3fn-row")
    codes, own = scheme.quantize(original)
    scales = own.stored.clone()
    scales[3] = 0
    weight = QuantizedWeight.from_codes(codes, Scales(scales), scheme, "bytes")
    assert rule_beside_zeros(original, weight) is None
    floored = Scales(torch.where(scales == 0, scales, scales.clamp(min=float(scales[scales > 0].median()))))
    codes = encode(scheme.scaling.divide(original, Scales(floored.stored.clamp(min=1e-9))), scheme.format)
    weight = QuantizedWeight.from_codes(codes, floored, scheme, "bytes")
    assert rule_beside_zeros(original, weight).name == "floor"

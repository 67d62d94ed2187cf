"""Right quantizers of other rules than the scheme's are never called wrong, declared or not, in whatever order products
are summed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fpxbench.diagnosis.scale_rules import find_scale_rule, rule_beside_zeros
from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.codec import decode, decode_table, encode
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import TrialResult, _run
from fpxbench.workloads import workload_named

pytestmark = pytest.mark.usefixtures("one_thread")

ORDERS = {
    "in one": lambda x, w: x.float() @ w.T,
    "in fp64": lambda x, w: x.double() @ w.double().T,
    "decoded to 16 bits first": lambda x, w: x.float() @ w.to(x.dtype).float().T,
    "from the end": lambda x, w: x.flip(-1).float() @ w.flip(1).T,
    "in pairs": lambda x, w: x.float()[..., 0::2] @ w[:, 0::2].T + x.float()[..., 1::2] @ w[:, 1::2].T,
    "split along K": lambda x, w: x.float()[..., :17] @ w[:, :17].T + x.float()[..., 17:] @ w[:, 17:].T,
}
RULES = {
    "mxfp4": ("rceil", "ceil", "even", "stochastic"),
    "mxfp8_e4m3fn": ("rceil", "even"),
    "mxfp6_e2m3": ("rceil", "ceil"),
    "nvfp4": ("up", "4over6", "div", "normal", "shared"),
    "e4m3fn-row": ("bf16", "fp16", "e8m0", "floor", "stochastic"),
    "e3m2-g32": ("bf16", "search", "floor", "stochastic"),
    "e2m1-g32": ("search", "bf16"),
    "e5m2-g128": ("fp16", "floor"),
}
FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8)
FLOOR = 1e-12


class ByRule(Implementation):
    """Quantizes by a rule, and multiplies by what it stored."""

    layout = "bytes"

    def __init__(self, rule: str, order: str = "in one", *, declared: bool = True, bias: float = 0.0) -> None:
        self.rule, self.order, self.bias = rule, order, bias
        self.scale_rule = rule if declared else None

    def supports(self, scheme, device):
        return Support.yes()

    def judged(self, scheme):
        own = self.rule in ("shared", "floor", "search", "stochastic")
        return scheme if own else scheme_named(f"{scheme.format.name}-{scheme.scaling.base_name}.{self.rule}")

    def quantize(self, weight, scheme):
        other = self.judged(scheme)
        fmt, scaling = other.format, other.scaling
        scales = scaling.choose(weight, fmt)
        if self.rule == "shared":
            scales = scaling.choose(weight, fmt, shared_amax=3 * weight.abs().amax())
        if self.rule == "floor":
            scales = Scales(scales.stored.clamp(min=FLOOR))
        if self.rule == "search":
            scales = searched(weight, other, scales)
        values = scaling.divide(weight, scales)
        if self.rule == "stochastic":
            codes = encode(values, fmt, Rounding.STOCHASTIC, random_bits=23) if not self.bias else self.biased(
                values, fmt)
        else:
            codes = encode(values, fmt)
        stored = scales.stored
        if not scheme.scaling.scale_format.coded:       # numbers, whatever format they are of
            stored = scaling.scale_format.decode(stored) if scaling.scale_format.coded else stored.float()
        return QuantizedWeight.from_codes(codes, replace(scales, stored=stored), scheme, self.layout)

    def biased(self, values, fmt):
        """Return codes that go up more often than they should."""
        grid = decode_table(fmt)
        grid = grid[grid.isfinite()].unique()
        above = torch.searchsorted(grid, values).clamp(1, len(grid) - 1)
        low, high = grid[above - 1], grid[above]
        place = (values - low) / (high - low)
        up = (torch.rand(values.shape) < place + self.bias) & (place > 0)
        return encode(torch.where(up, high, low), fmt)

    def matmul(self, x, weight):
        scheme = self.judged(weight.scheme)
        stored = weight.scales
        if scheme.scaling.scale_format.coded and stored.dtype != torch.uint8:
            stored = scheme.scaling.scale_format.encode(stored)
        decoded = scheme.dequantize(weight.codes(), Scales(stored, weight.tensor_scale))
        return ORDERS[self.order](x, decoded).to(x.dtype)


def searched(weight, scheme, scales):
    """Return, of a few multiples of each block's scale, the one under which it errs least."""
    fmt, scaling = scheme.format, scheme.scaling
    block, (n, k) = scaling.block, weight.shape
    best = None
    for factor in FACTORS:
        tried = Scales(scales.stored * factor)
        decoded = scheme.dequantize(encode(scaling.divide(weight, tried), fmt), tried)
        padded = torch.nn.functional.pad((decoded - weight).square(), (0, -k % block))
        error = padded.reshape(n, -1, block).sum(2)
        if best is None:
            best = error, tried.stored
        else:
            best = torch.minimum(best[0], error), torch.where(error < best[0], tried.stored, best[1])
    return Scales(best[1])


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

"""Quantized activations are judged by the computation that is declared, not by a wider bound."""

from __future__ import annotations

import pytest
import torch
from core import in_turn

from fpxbench.checking import activation_rules
from fpxbench.checking.activation_probe import SHAPE, WIDE_SHAPE
from fpxbench.checking.correctness import check_calls
from fpxbench.checking.reference import compare
from fpxbench.implementation import Implementation
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.rounding import Rounding
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


class Quantizing(Implementation):
    """Quantizes its activation by `rule`, times `factor`; declares what it is told to."""

    def __init__(self, rule: str, declared_format: str | None = None, declared: ActivationRule | None = None, *,
                 rounding: Rounding = Rounding.NEAREST_EVEN, factor: float = 1.0, scale: float | None = None) -> None:
        self.rule, self.factor = ActivationRule(rule, rounding, scale), factor
        self.activation_format, self.activation_rule = declared_format, declared

    def matmul(self, x, weight):
        values = self.rule.quantized(x)[0].float() * self.factor
        return (values @ weight.dequantize().T).to(x.dtype)


def operands_for(implementation: Implementation, scheme: str, m: int = 16):
    case = Case(implementation="i", scheme=scheme, workload="x", m=m, n=48, k=256)
    return prepare(implementation, TrialRequest(case=case, seed=2))


RULES = ("e4m3fn-row", "e4m3fn-tensor", "e4m3fn-g128", "mxfp8_e4m3fn", "e5m2-row", "nvfp4", "mxfp4", "int8-row")


@pytest.mark.parametrize(("rule", "scheme"), in_turn(RULES, ["e4m3fn-row", "nvfp4"], one_in=2))
def test_a_usual_rule_is_found_from_its_format_alone(rule: str, scheme: str) -> None:
    implementation = Quantizing(rule, declared_format=scheme_named(rule).format.name)
    operands = operands_for(implementation, scheme)
    assert activation_rules.find_rule(implementation, operands) is None
    assert operands.rule == ActivationRule(rule)
    assert check_calls(implementation, operands)[1] is None


class ForLargeLayers(Quantizing):
    """Refuses the probe's weights."""

    def matmul(self, x, weight):
        if tuple(weight.shape) in (SHAPE, WIDE_SHAPE):
            raise NotImplementedError("no kernel for this shape")
        return super().matmul(x, weight)


class OnesMisread(Quantizing):
    """Reads the weight of each column as a multiple of its own."""

    def matmul(self, x, weight):
        values = self.rule.quantized(x)[0].float() * torch.linspace(1, 2, x.shape[-1])
        return (values @ weight.dequantize().T).to(x.dtype)


@pytest.mark.parametrize(("kind", "why"), [(ForLargeLayers, "is refused"), (OnesMisread, "not read as ones"),
                                           (Quantizing, "floors under its scales")])
def test_a_quantizer_that_no_probe_has_seen_is_not_asked(kind: type[Quantizing], why: str) -> None:
    implementation = kind("e4m3fn-row", declared=ActivationRule("e4m3fn-row"))
    operands = operands_for(implementation, "e4m3fn-row")
    assert activation_rules.find_rule(implementation, operands) is None
    assert operands.rule == ActivationRule("e4m3fn-row")
    assert why in activation_rules.not_asked(operands)


@pytest.mark.parametrize("rule", RULES)
def test_a_result_in_fp16_that_was_rounded_to_bf16_first_follows_its_rule(rule: str) -> None:
    """As `torch._scaled_mm` gives it on a GPU, whose row-wise kernels write bf16 alone."""

    class ThroughBf16(Quantizing):
        def matmul(self, x, weight):
            return super().matmul(x, weight).to(torch.bfloat16).to(x.dtype)

    implementation = ThroughBf16(rule, declared_format=scheme_named(rule).format.name)
    case = Case(implementation="i", scheme="e4m3fn-row", workload="x", m=16, n=48, k=256, activation="fp16")
    operands = prepare(implementation, TrialRequest(case=case, seed=2))
    assert activation_rules.find_rule(implementation, operands) is None
    assert operands.rule == ActivationRule(rule)


@pytest.mark.parametrize("rule", RULES)
def test_a_factor_of_0_8_does_not_hide_in_the_rounding(rule: str) -> None:
    implementation = Quantizing(rule, declared_format=scheme_named(rule).format.name, factor=0.8)
    operands = operands_for(implementation, "e4m3fn-row")
    assert activation_rules.find_rule(implementation, operands) is None     # it may be the weight's factor as well
    assert operands.rule == ActivationRule(rule) and check_calls(implementation, operands)[1] is not None


@pytest.mark.parametrize("rounding", [Rounding.TOWARD_ZERO, Rounding.DOWN])
@pytest.mark.parametrize("rule", ["e4m3fn-row", "nvfp4"])
def test_truncation_is_named_unless_it_is_declared(rule: str, rounding: Rounding) -> None:
    undeclared = Quantizing(rule, declared_format=scheme_named(rule).format.name, rounding=rounding)
    verdict = activation_rules.find_rule(undeclared, operands_for(undeclared, "e4m3fn-row"))
    assert verdict.kind is Kind.TRUNCATED and verdict.evidence["activation_rule"] == f"{rule}, {rounding.value}"
    declared = Quantizing(rule, declared=ActivationRule(rule, rounding), rounding=rounding)
    operands = operands_for(declared, "e4m3fn-row")
    assert activation_rules.find_rule(declared, operands) is None and check_calls(declared, operands)[1] is None


def test_a_fixed_scale_is_right_where_it_is_declared_and_stale_where_it_is_not() -> None:
    class Frozen(Implementation):
        activation_format, scale = "e4m3fn", None

        def matmul(self, x, weight):
            self.scale = self.scale or float(x.abs().amax()) / 448
            values = ActivationRule("e4m3fn-tensor", scale=self.scale).quantized(x)[0].float()
            return (values @ weight.dequantize().T).to(x.dtype)

    frozen = Frozen()
    operands = operands_for(frozen, "e4m3fn-row")
    named = activation_rules.find_rule(frozen, operands)
    assert named is not None and named.kind is Kind.STALE_ACTIVATION_SCALE, named
    declared = Quantizing("e4m3fn-tensor", declared=ActivationRule("e4m3fn-tensor", scale=0.02), scale=0.02)
    operands = operands_for(declared, "e4m3fn-row")
    assert activation_rules.find_rule(declared, operands) is None and check_calls(declared, operands)[1] is None


def test_a_scale_that_freezes_after_the_first_checked_call_is_stale() -> None:
    class FrozenLater(Implementation):
        activation_format, scale, calls = "e4m3fn", None, 0

        def matmul(self, x, weight):
            self.calls += 1
            own = float(x.abs().amax()) / 448
            if self.calls >= 6:     # after four probes and the weight of ones
                self.scale = self.scale or own
            values = ActivationRule("e4m3fn-tensor", scale=self.scale or own).quantized(x)[0].float()
            return (values @ weight.dequantize().T).to(x.dtype)

    frozen = FrozenLater()
    operands = operands_for(frozen, "e4m3fn-row")
    assert activation_rules.find_rule(frozen, operands) is None and operands.rule == ActivationRule("e4m3fn-tensor")
    _, verdict = check_calls(frozen, operands)
    named = activation_rules.stale_scale(frozen, operands, verdict.evidence["call"])
    assert named is not None and named.kind is Kind.STALE_ACTIVATION_SCALE


class Faulty(Implementation):
    """Declares E4M3 activations, and quantizes them by `how`."""

    activation_format = "e4m3fn"

    def __init__(self, how) -> None:
        self.how = how

    def matmul(self, x, weight):
        return (self.how(x.float()) @ weight.dequantize().T).to(x.dtype)


E4M3 = FORMATS["e4m3fn"]


def codes_and_scale(x):
    scale = x.abs().amax(-1, keepdim=True) / 448
    return decode(encode(torch.where(scale > 0, x / scale, 0.0), E4M3), E4M3), scale


def without_subnormals(x):
    codes, scale = codes_and_scale(x)
    return torch.where(codes.abs() < 2.0**-6, 0.0, codes) * scale


def scale_of_the_next_token(x):
    codes, scale = codes_and_scale(x)
    return codes * scale.roll(-1, 0)


def per_channel(x):
    codes, scale = codes_and_scale(x.T.contiguous())
    return (codes * scale).T


def fixed(x):
    return decode(encode(x / 0.01, E4M3), E4M3) * 0.01


def fixed_and_not_clamped(x):
    return torch.where((x / 0.01).abs() > 448, torch.nan, fixed(x))


def zeros_divided(x):
    codes, scale = codes_and_scale(x)
    return torch.where(scale == 0, torch.nan, codes * scale)


def truncated_and_zeros_divided(x):
    _, scale = codes_and_scale(x)
    codes = encode(torch.where(scale > 0, x / scale, 0.0), E4M3, Rounding.TOWARD_ZERO)
    return torch.where(scale == 0, torch.nan, decode(codes, E4M3) * scale)


FAULTS = [
    (without_subnormals, Kind.SUBNORMAL_FLUSHED, "a subnormal of e4m3fn becomes zero"),
    (scale_of_the_next_token, Kind.BLOCK_OFF_BY_ONE, "the scale of the next one"),
    (per_channel, Kind.SCALE_TRANSPOSED, "per channel"),
    (fixed, Kind.SATURATED, "the fixed scale 0.01"),
    (fixed_and_not_clamped, Kind.OVERFLOW_NAN, "becomes NaN"),
    (zeros_divided, Kind.ZERO_BLOCK, "a token of zeros becomes NaN"),
    (truncated_and_zeros_divided, Kind.TRUNCATED, "besides, a token of zeros becomes NaN"),
    (lambda x: ActivationRule("e5m2-row").quantized(x)[0].float(), Kind.ACTIVATION_QUANTIZED, "e5m2-row, declared is"),
    (torch.Tensor.float, Kind.INACCURATE, "is not quantized; declared is e4m3fn"),
    (lambda x: x.round(decimals=1), Kind.INACCURATE, "by no known rule"),
]


@pytest.mark.parametrize(("how", "kind", "words"), FAULTS)
def test_a_fault_of_an_activations_quantizer_is_named(how, kind: Kind, words: str) -> None:
    implementation = Faulty(how)
    verdict = activation_rules.find_rule(implementation, operands_for(implementation, "mxfp4", m=1))
    assert verdict is not None and verdict.kind is kind and words in verdict.summary, verdict


@pytest.mark.parametrize("rule", ["e4m3fn-row", "e4m3fn-tensor", "e4m3fn-row.e8m0", "e4m3fn-g128"])
def test_rules_that_look_the_same_for_one_token_or_a_short_k_are_told_apart(rule: str) -> None:
    implementation = Quantizing(rule, declared_format="e4m3fn")
    case = Case(implementation="i", scheme="e4m3fn-row", workload="x", m=1, n=48, k=96)
    operands = prepare(implementation, TrialRequest(case=case, seed=2))
    assert activation_rules.find_rule(implementation, operands) is None
    assert operands.rule == ActivationRule(scheme_named(rule).name)


def test_only_codes_beside_a_boundary_may_go_either_way() -> None:
    rule = ActivationRule("e4m3fn-row")
    x = torch.tensor([[448.0, 17.0, 17.0 + 2**-3, 16.0, 3.0, -9.5]])       # 17 and -9.5 are midpoints under the scale 1
    values, slack = rule.quantized(x)
    assert slack[0].gt(0).tolist() == [False, True, False, False, False, True]
    assert slack[0, 1] == pytest.approx(2, rel=1e-5) and float(values[0, 1]) in (16, 18)


def test_the_scheme_may_declare_the_rule() -> None:
    implementation = Quantizing("mxfp8_e4m3fn")
    operands = operands_for(implementation, "mxfp4+mxfp8_e4m3fn")
    assert activation_rules.find_rule(implementation, operands) is None
    assert operands.rule == ActivationRule("mxfp8_e4m3fn") and check_calls(implementation, operands)[1] is None
    other = Quantizing("e4m3fn-tensor")
    operands = operands_for(other, "mxfp4+mxfp8_e4m3fn")
    activation_rules.find_rule(other, operands)
    assert check_calls(other, operands)[1] is not None


def test_the_bound_of_a_declared_rule_is_no_wider_than_without_one() -> None:
    implementation = Quantizing("nvfp4", declared=ActivationRule("nvfp4"))
    operands = operands_for(implementation, "nvfp4")
    activation_rules.find_rule(implementation, operands)
    x = operands.activation(0)
    declared = operands.reference(x, implementation)
    operands.rule, implementation.activation_rule = None, None
    plain = operands.reference(x, implementation)
    assert declared.bound < 1.2 * plain.bound
    assert not compare(
        Implementation().quantize(x.float(), scheme_named("nvfp4")).dequantize().to(x.dtype)
        @ operands.decoded.T.to(x.dtype)
        * 0.9,
        declared,
    ).within


@pytest.mark.parametrize(("rule", "scheme"), in_turn(
    [rule for rule in RULES if rule != "e5m2-row"], ["e4m3fn-row", "mxfp4"], one_in=2))
def test_a_weight_only_product_of_a_quantized_activation_is_named(rule: str, scheme: str) -> None:
    implementation = Quantizing(rule)
    verdict = activation_rules.undeclared_rule(implementation, operands_for(implementation, scheme))
    assert verdict.kind is Kind.ACTIVATION_QUANTIZED and verdict.evidence["activation_rule"] == rule
    assert f"take the scheme {scheme}+{rule}" in verdict.summary


def test_a_product_that_is_wrong_otherwise_is_not_taken_for_a_quantized_activation() -> None:
    class Scaled(Quantizing):
        def matmul(self, x, weight):
            return (x.float() @ weight.dequantize().T * 1.06).to(x.dtype)

    implementation = Scaled("e4m3fn-row")
    assert activation_rules.undeclared_rule(implementation, operands_for(implementation, "e4m3fn-row")) is None

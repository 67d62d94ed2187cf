"""Faults from public bug reports are found and named, by a sweep and by an inspection; what is right by another rule is
not called wrong."""

from __future__ import annotations

import inspecting
import pytest
import torch
import world

from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import TrialResult, Verdict, _run
from fpxbench.workloads import workload_named

pytestmark = pytest.mark.usefixtures("one_thread", "on_device", "few_repeats")
DEVICE = {"device": "cpu"}


@pytest.fixture(params=[
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))])
def on_device(request, monkeypatch) -> None:
    monkeypatch.setitem(DEVICE, "device", request.param)


def trial(implementation, scheme: str, workload: str) -> TrialResult:
    layer = workload_named(workload)
    case = Case(implementation="world", scheme=scheme, workload=workload, m=layer.m[0], n=layer.n, k=layer.k)
    result = TrialResult(verdict=Verdict(status=Status.OK))
    _run(implementation, TrialRequest(case=case, seed=1, timing_budget_s=0, check_budget_s=1.0, **DEVICE), result)
    return result


def inspected(implementation, scheme: str, *, m=64, n=160, k=384):
    return inspecting.inspected(implementation, scheme, m=m, n=n, k=k, seed=1, **DEVICE)


NAMED = [
    # implementation, scheme, the canary of a sweep that shows it, kind, words of the sentence
    (world.ScalesInTiles, "nvfp4", "canary.values", Kind.SCALE_SWIZZLED, "128 x 4 tiled order"),
    (world.ScalesInTiles, "mxfp4", "canary.scales", Kind.SCALE_SWIZZLED, "128 x 4 tiled order"),
    (world.GlobalDivided, "nvfp4", "canary.values", Kind.GLOBAL_SCALE_INVERTED, "divided by the tensor scale"),
    (world.FnOnFnuzHardware, "e4m3fn-row", "canary.ragged", Kind.FN_AS_FNUZ, "half its value: read with bias 8"),
    (world.ScaleByShift, "mxfp4", "canary.scales", Kind.SCALE_ENDS_LOST, "code 0 multiplies by 0"),
    (world.ScaleInFp16, "mxfp4", "canary.scales", Kind.SCALE_NARROWED, "fp16"),
    (world.PairsOfBlocks, "nvfp4", "canary.values", Kind.SCALE_SHARED, "2 neighbouring blocks share"),
    (world.ScaleTwice, "e4m3fn-row", "canary.values", Kind.SCALE_SQUARED, "applied twice"),
    (world.ScaleBlind, "mxfp4", "canary.values", Kind.SCALE_MISSING, "not applied"),
    (world.SubnormalsRebased, "mxfp4", "canary.codes", Kind.SUBNORMAL_WRONG, "exponent field 0"),
    (world.ActivationTruncated, "e4m3fn-row", "canary.ragged", Kind.TRUNCATED, "the activation is quantized"),
    (world.ZerosDividedByZero, "e4m3fn-row", "canary.values", Kind.ZERO_BLOCK, "blocks of zeros read back as nan"),
    (world.StaleScale, "e4m3fn-row", "canary.ragged", Kind.STALE_ACTIVATION_SCALE, "first call"),
    (world.SomeTokens, "nvfp4", "canary.ragged", Kind.M_DEPENDENT, "wrong for M = "),
    (world.FirstOfBatch, "e4m3fn-row", "canary.ragged", Kind.ACTIVATION_LAYOUT, "[B, M, K]"),
    (world.PaddingRead, "mxfp4", "canary.ragged", Kind.READS_UNWRITTEN, "never written"),
]


@pytest.mark.parametrize(("implementation", "scheme", "workload", "kind", "words"), NAMED,
                         ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_sweep_and_an_inspection_give_a_fault_the_same_name(implementation, scheme, workload, kind, words) -> None:
    of_sweep = trial(implementation(), scheme, workload).verdict
    assert (of_sweep.kind, of_sweep.status) in ((kind, Status.WRONG), (kind, Status.NONFINITE)), of_sweep.summary
    assert words in of_sweep.summary
    of_inspection = inspected(implementation(), scheme).verdict
    assert of_inspection.kind is kind, of_inspection.summary
    assert words in of_inspection.summary


@pytest.mark.parametrize(("implementation", "scheme", "kind"), [
    (world.NanAsZero, "e4m3fnuz-row", Kind.NAN_CODE_LOST),
    (world.SquareTransposed, "e4m3fn-row", Kind.WEIGHT_TRANSPOSED),
    (world.Remembers, "e4m3fn-row", Kind.RESULT_REMEMBERED),
    (world.RowsByShare, "e4m3fn-b128x128", Kind.BLOCK_SIZE_MISTAKEN),
])
def test_an_inspection_names_what_no_stored_weight_of_its_shape_shows(implementation, scheme, kind) -> None:
    found = inspected(implementation(), scheme)
    assert found.verdict.kind is kind, found.verdict.summary


def test_a_square_weight_that_is_transposed_is_named_by_a_sweep() -> None:
    assert trial(world.SquareTransposed(), "e4m3fn-row", "canary.seed").verdict.kind is Kind.WEIGHT_TRANSPOSED


@pytest.mark.parametrize("workload", ["canary.ragged", "canary.values"])
def test_a_dropped_tail_of_k_is_found(workload) -> None:
    assert trial(world.TailOfK(), "mxfp4", workload).verdict.status is Status.WRONG
    assert "columns 256 to 383, the tail of K = 384, are ignored" in inspected(world.TailOfK(), "mxfp4").verdict.summary


def ruled(rule: str, declared: bool):
    return type("Ruled", (world.ByRule,), {"rule": rule, "scale_rule": rule if declared else None})()


RULES = [("mxfp4", "rceil"), ("mxfp4", "ceil"), ("mxfp8_e4m3fn", "even"), ("e4m3fn-row", "bf16"),
         ("e3m2-g32", "bf16"), ("nvfp4", "up"),
         ("nvfp4", "4over6")]


@pytest.mark.parametrize(("scheme", "rule"), RULES)
def test_another_right_rule_is_named_and_flagged_not_called_wrong(scheme, rule) -> None:
    undeclared = trial(ruled(rule, False), scheme, "canary.ragged")
    assert undeclared.verdict.status is Status.OK, undeclared.verdict.summary
    assert "undeclared_rule" in undeclared.flags
    assert f'declare it (`scale_rule = "{rule}"`)' in undeclared.verdict.summary
    declared = trial(ruled(rule, True), scheme, "canary.ragged")
    assert declared.verdict.status is Status.OK and declared.flags == [], declared.verdict.summary
    found = inspected(ruled(rule, False), scheme, n=40, k=160)
    assert found.right, found.verdict.summary
    assert found.undeclared_rule is not None


class Bf16WithoutAFloor(world.World):
    """Scales in bf16, by which a row of zeros is divided too."""

    def quantize(self, weight, scheme):
        scale = (weight.abs().amax(dim=1, keepdim=True) / 448).bfloat16().float()
        codes = world.encode((weight / scale).clamp(-448, 448), scheme.format)
        return world.QuantizedWeight.from_codes(codes, world.replace_scales(scheme, weight, scale), scheme, self.layout)


def test_nan_of_a_row_of_zeros_is_told_besides_the_rule_of_all_others() -> None:
    undeclared = trial(Bf16WithoutAFloor(), "e4m3fn-row", "canary.values").verdict
    assert undeclared.kind is Kind.ZERO_BLOCK and 'declare it (`scale_rule = "bf16"`)' in undeclared.summary
    declared = type("Declared", (Bf16WithoutAFloor,), {"scale_rule": "bf16"})()
    assert trial(declared, "e4m3fn-row", "canary.values").verdict.kind is Kind.ZERO_BLOCK     # 0 / 0 by that rule too
    assert trial(declared, "e4m3fn-row", "canary.ragged").verdict.status is Status.OK


@pytest.mark.parametrize("declared", [None, "div"])
def test_a_global_scale_that_is_stored_as_a_divisor_is_right(declared) -> None:
    implementation = type("Divisor", (world.GlobalAsDivisor,), {"scale_rule": declared})()
    result = trial(implementation, "nvfp4", "canary.ragged")
    assert result.verdict.status is Status.OK, result.verdict.summary
    assert ("undeclared_rule" in result.flags) is (declared is None)


def test_a_declared_rule_that_is_not_kept_is_wrong() -> None:
    claims_rceil = type("Claims", (world.ByRule,), {"rule": "ceil", "scale_rule": "rceil"})()
    assert trial(claims_rceil, "mxfp4", "canary.ragged").verdict.status is Status.WRONG


@pytest.mark.parametrize("workload", ["canary.ragged", "canary.values", "canary.scales"])
def test_activations_that_are_rounded_to_nearest_are_right(workload) -> None:
    assert trial(world.ActivationRounded(), "e4m3fn-row", workload).verdict.status is Status.OK


def test_a_right_implementation_that_refuses_nan_is_right() -> None:
    found = inspected(world.RefusesNan(), "mxfp4")
    assert found.right, found.verdict.summary
    assert trial(world.RefusesNan(), "mxfp4", "canary.values").verdict.status is Status.OK


def test_what_a_first_call_leaves_in_its_output_is_no_matter_of_token_counts() -> None:
    found = inspected(world.TunedInPlace(), "e4m3fn-row")
    assert found.kinds == [Kind.NOT_REPEATABLE] and "are right when made again" in found.verdict.summary
    assert trial(world.TunedInPlace(), "e4m3fn-row", "canary.ragged").verdict.status is Status.WRONG

"""Calls as serving stacks make them: what is wrong is said with its extent, what was not asked is not called right."""

from __future__ import annotations

import time

import pytest
import torch
from small_implementations import Right

from fpxbench.checking import contract, kept_memory, serving_calls, tampering
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.examination import Examination, ranges
from fpxbench.implementation import Implementation
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Record
from fpxbench.records.verdict import Status, Verdict
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import TrialResult, _run, prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def request(scheme: str = "e4m3fn-row", m: int = 2, n: int = 32, k: int = 96, **fields) -> TrialRequest:
    case = Case(implementation="right", scheme=scheme, workload="canary.x", m=m, n=n, k=k)
    return TrialRequest(case=case, seed=1, timing_budget_s=0, **{"check_budget_s": 20.0, **fields})


def result_of(implementation: Implementation, asked: TrialRequest) -> TrialResult:
    result = TrialResult(verdict=Verdict(status=Status.OK))
    try:
        _run(implementation, asked, result)
    except ContractViolation as violation:
        result.verdict = violation.verdict
    return result


def examination(implementation: Implementation, **fields) -> Examination:
    asked = request(**fields)
    return Examination(implementation, prepare(implementation, asked), asked.check_budget_s)


def test_a_right_implementation_is_asked_for_everything_and_is_right() -> None:
    result = result_of(Right(), request())
    assert result.verdict.status is Status.OK, result.verdict.summary
    assert set(result.coverage.covered) == {
        "token counts", "activation layouts", "other shapes", "several weights", "repeats", "accumulator",
        "codes that are no numbers"}
    assert set(result.coverage.not_asked) == {"bias", "streams", "early launch"}
    assert result.properties.tokens_checked == sorted({*serving_calls.TOKEN_COUNTS, *serving_calls.MANY_TOKENS})
    assert result.properties.repeatable is True and result.properties.repeats >= 2
    edges = {edge + step for edge in (1, 16, 32, 64, 128, 256, 512) for step in (-1, 0, 1)} - {0}
    assert edges <= set(result.properties.tokens_checked)


def test_what_was_not_asked_is_said_with_the_reason() -> None:
    class CompilesForEachShape(Right):
        def matmul(self, x, weight):
            self.seen = getattr(self, "seen", set())
            if x.shape not in self.seen:
                self.seen.add(x.shape)
                time.sleep(0.3)
            return super().matmul(x, weight)

    coverage = result_of(CompilesForEachShape(), request(check_budget_s=0.01)).coverage
    assert "a first call takes 0.3" in coverage.not_asked["token counts"]
    assert "token counts" not in coverage.covered and "other shapes" in coverage.not_asked
    large = result_of(Right(), request(n=512, k=512)).coverage
    assert "large" in large.not_asked["token counts"]


def test_a_refusal_is_no_mistake_and_no_success() -> None:
    class TwoDimensional(Right):
        def matmul(self, x, weight):
            if x.dim() != 2 or weight.shape[1] % 32:
                raise ValueError(f"takes [M, K] with K a multiple of 32, not {list(x.shape)}")
            return super().matmul(x, weight)

    result = result_of(TwoDimensional(), request())
    assert result.verdict.status is Status.OK
    assert "ValueError: takes [M, K]" in result.coverage.not_asked["[B, M, K]"]
    assert (
        "[17, 33]" not in result.coverage.covered["other shapes"]
        and "[48, 288]" in result.coverage.covered["other shapes"]
    )


def test_a_mistake_for_some_m_is_said_with_where_it_begins_and_ends() -> None:
    class WrongBelow32(Right):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            return y * 1.5 if 16 < y.shape[-2] < 32 else y

    verdict = result_of(WrongBelow32(), request()).verdict
    assert verdict.kind is Kind.M_DEPENDENT
    assert verdict.summary.startswith("wrong for M = 17, 31, right for M = 1 to 16, 32 to 33, 63 to 65")
    assert verdict.evidence["wrong_m"] == [17, 31]


def test_batch_invariance_is_measured_and_no_mistake() -> None:
    class SplitsByTokens(Right):
        """Splits K where there are few tokens."""

        def matmul(self, x, weight):
            w, x32 = weight.dequantize(), x.float()
            if x.shape[-2] > 16:
                return (x32 @ w.T).to(x.dtype)
            parts = [x32[..., i::8].double() @ w[:, i::8].double().T for i in range(8)]
            return sum(part.to(x.dtype) for part in parts)

    loose = result_of(SplitsByTokens(), request(k=512))
    assert loose.verdict.status is Status.OK, loose.verdict.summary
    assert loose.properties.batch_invariant is False
    assert "depends on how many" in loose.properties.messages()["other tokens"]


def test_repeats_that_differ_within_the_tolerance_are_a_property() -> None:
    class Wanders(Right):
        calls = 0

        def matmul(self, x, weight):
            self.calls += 1
            return (x.double() @ weight.dequantize().double().T * (1 + 1e-3 * (self.calls % 3))).to(x.dtype)

    found = examination(Wanders())
    assert serving_calls.check_repeats(found) is None
    assert found.properties["repeatable"] is False and found.properties["repeats"] > 10


def test_a_rare_failure_is_said_with_how_often() -> None:
    class Rarely(Right):
        calls = 0

        def matmul(self, x, weight):
            self.calls += 1
            return super().matmul(x, weight) * (3 if self.calls % 40 == 0 else 1)

    verdict = serving_calls.check_repeats(examination(Rarely()), most=200)
    assert verdict.kind is Kind.NOT_REPEATABLE
    assert verdict.summary.startswith("wrong in 5 of 200 calls with the same operands")


@pytest.mark.parametrize("name", [name for name, _ in serving_calls.activation_layouts(prepare(Right(), request()))])
def test_each_layout_is_another_view_of_memory(name: str) -> None:
    operands = prepare(Right(), request())
    x = dict(serving_calls.activation_layouts(operands))[name]
    assert bool(x.isfinite().all()) and x.shape[-1] == operands.case.k
    contiguous_matrix = x.dim() == 2 and x.is_contiguous() and x.data_ptr() % 16 == 0 and x.numel() > 0
    assert not contiguous_matrix


def test_a_transposed_activation_that_is_read_as_if_it_were_contiguous_is_named() -> None:
    class ReadsInOrder(Right):
        def matmul(self, x, weight):
            if x.dim() == 2 and x.stride(0) == 1 and x.stride(1) == len(x) > 1:
                x = x.T.reshape(x.shape)
            return super().matmul(x, weight)

    verdict = serving_calls.check_layouts(examination(ReadsInOrder(), m=3))
    assert verdict.kind is Kind.ACTIVATION_LAYOUT and "a transposed [K, M]" in verdict.summary


def test_a_ragged_second_tile_of_n_is_asked_for() -> None:
    class WrongThere(Right):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            if weight.shape[0] > 128 and weight.shape[0] % 128:
                y[..., -2:] = y[..., -2:].flip(-1)
            return y

    result = result_of(WrongThere(), request())
    assert result.verdict.status is Status.WRONG and "wrong for a weight [200, 64]" in result.verdict.summary


def test_an_output_that_a_later_call_overwrites_is_noticed() -> None:
    y = torch.ones(4, dtype=torch.bfloat16)
    output = contract.Output(y.clone(), y)
    output.check_unchanged()
    y[0] = 2
    with pytest.raises(ContractViolation, match="changed after"):
        output.check_unchanged()


def test_replaced_functions_are_noticed_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.matmul
    torch.matmul = lambda *arguments: original(*arguments)
    with pytest.raises(ContractViolation, match=r"replaced torch\.matmul"):
        tampering.check_untampered()
    assert torch.matmul is original
    tampering.check_untampered()


def test_settings_that_a_call_changes_are_put_back() -> None:
    before = torch.get_default_dtype()
    with tampering.settings_kept() as changed:
        torch.set_default_dtype(torch.float64)
    assert torch.get_default_dtype() is before and changed == ["default dtype"]


def test_a_compiled_implementation_is_not_taken_for_one_that_replaces_functions() -> None:
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    tampering.check_untampered()
    torch._dynamo.reset()


@pytest.mark.parametrize("keeps", ["for each weight", "of the latest weight", "nothing"])
def test_memory_held_between_calls_is_counted(keeps: str) -> None:
    class Keeping(Right):
        def matmul(self, x, weight):
            w = weight.dequantize()
            if keeps == "for each weight":
                self.kept = getattr(self, "kept", {})
                self.kept.setdefault(weight.packed.data_ptr(), w.bfloat16())
            elif keeps == "of the latest weight":
                self.kept = w.bfloat16()
            return (x.float() @ w.T).to(x.dtype)

    implementation, before = Keeping(), kept_memory.live_storages()
    operands = prepare(implementation, request(n=1024, k=1024))
    implementation.matmul(operands.activation(0), operands.weight)
    kept = kept_memory.kept_bytes(implementation, operands, before)
    assert kept == 0 if keeps == "nothing" else 2 * 1024 * 1024 <= kept < 3 * 1024 * 1024


def test_runs_of_numbers_are_told_as_runs() -> None:
    assert ranges([1, 2, 3, 5, 8, 9]) == "1 to 3, 5, 8 to 9"
    assert ranges(range(1, 60, 2), most=2) == "1, 3 and 28 more runs"


def test_a_bias_is_added_once_and_unscaled() -> None:
    class WithBias(Right):
        supports_bias = True
        times = 1

        def matmul(self, x, weight, bias=None):
            y = super().matmul(x, weight)
            return y if bias is None else (y.float() + self.times * bias.float()).to(x.dtype)

    class Twice(WithBias):
        times = 2

    assert serving_calls.check_bias(examination(WithBias())) is None
    assert serving_calls.check_bias(examination(Twice())).kind is Kind.BIAS_WRONG


def test_a_record_keeps_properties_and_coverage() -> None:
    result = result_of(Right(), request())
    fields = Record.model_fields
    assert {"properties", "coverage"} <= set(fields)
    assert type(result.properties).model_validate_json(result.properties.model_dump_json()) == result.properties
    assert type(result.coverage).model_validate_json(result.coverage.model_dump_json()) == result.coverage


def test_a_first_call_that_loads_libraries_keeps_no_shape_from_being_asked() -> None:
    class Loads(Right):
        loaded = False

        def matmul(self, x, weight):
            if not self.loaded:
                self.loaded = True
                time.sleep(0.1)
            return super().matmul(x, weight)

    coverage = result_of(Loads(), request(check_budget_s=0.02)).coverage
    assert not any("a first call takes" in reason for reason in coverage.not_asked.values()), coverage.not_asked
    assert "token counts" in coverage.covered


def test_outputs_that_chance_puts_outside_their_bounds_are_no_matter_of_token_counts() -> None:
    """A matter of bf16 in the place of fp16: errors are as large for each M, and few outputs are outside."""
    class ByWayOfBf16(Right):
        def matmul(self, x, weight):
            return super().matmul(x, weight).bfloat16().to(x.dtype)

    case = Case(implementation="right", scheme="e4m3fn-row", workload="canary.x", m=1, n=32, k=512, activation="fp16")
    verdict = result_of(ByWayOfBf16(), TrialRequest(case=case, seed=1, timing_budget_s=0, check_budget_s=9.0)).verdict
    assert verdict.kind is Kind.INACCURATE, verdict.summary
    assert "as if rounded to bf16 before it is rounded to fp16" in verdict.summary

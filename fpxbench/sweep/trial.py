"""Run one case, from request to result, in the calling process (`fpxbench.sweep.isolation` provides a watched child).
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fpxbench.implementation as implementations
from fpxbench.checking import (
    activation_rules,
    correctness,
    early_launch,
    effects,
    expert_calls,
    inputs,
    kept_memory,
    nonfinite_codes,
    nonfinite_rows,
    output_rounding,
    serving_calls,
    tampering,
    timing,
    traffic,
)
from fpxbench.checking.accumulator import measure_accumulator
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.error_statistic import ErrorStatistic, likeness_of_rows
from fpxbench.checking.examination import Examination
from fpxbench.checking.expert_operands import ExpertOperands, GroupedProduct, OneOfExperts, expert_weight
from fpxbench.checking.operands import Operands
from fpxbench.checking.reference import Comparison, sqnr_db
from fpxbench.checking.tuning_alone import tune_alone
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weight_source import WeightSource
from fpxbench.diagnosis.activation_explained import explain_in_a_sweep
from fpxbench.diagnosis.diagnosis import Diagnosis
from fpxbench.diagnosis.expert_products import diagnose_experts
from fpxbench.diagnosis.products import diagnose_product
from fpxbench.diagnosis.recovery.scale_precision import check_precision
from fpxbench.diagnosis.scale_rules import (
    ScaleRule,
    as_judged,
    find_scale_rule,
    follows_rule,
    holds_on_powers_of_two,
    rule_beside_zeros,
)
from fpxbench.diagnosis.stored import diagnose_quantization, probe_quantization
from fpxbench.implementation import Implementation
from fpxbench.numbers.experts import CannotStack, QuantizedExperts
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.records.fields import LARGEST
from fpxbench.records.kinds import Group, Kind
from fpxbench.records.record import TIMING_OFF, Accuracy, Coverage, Flag, Properties, Traffic
from fpxbench.records.verdict import Status, Verdict, classify_exception
from fpxbench.sweep import file_operands
from fpxbench.sweep.messages import TrialRequest, TrialResult
from fpxbench.workloads import WeightContents, contents_of, is_canary

CALLS_AFTER_TIMING = 1
PEER_SQNR_SLACK_DB = 1.0
"""How far the SQNR of a weight in a private layout may lie below the oracle's."""
DESIGNED_SLACK_DB = 12.0
"""The same for the designed weights of canaries, whose zeros and outliers favour some quantizers (rotated weights lose
10 dB)."""


def run_trial(request: TrialRequest) -> TrialResult:
    """Quantize, check, and time if right. Exceptions of the implementation become the verdict."""
    started = time.perf_counter()
    known, failures = implementations.discover(request.impls)
    name = request.case.implementation
    if name not in known:
        why = "; ".join(map(str, failures)) or "it is not in impls/ nor in --impls"
        return TrialResult(verdict=Verdict(status=Status.MISSING, summary=f"no implementation {name!r}: {why}"))
    result = TrialResult(verdict=Verdict(status=Status.OK))
    try:
        _run(known[name](), request, result)
    except ContractViolation as violation:
        result.verdict = violation.verdict
    except BaseException as error:  # anything that an implementation raises is its result, SystemExit included
        traceback.print_exc()
        result.verdict = classify_exception(type(error).__name__, str(error), "")
    finally:
        tampering.restore()
        forget()
    if result.verdict.status is not Status.OK:
        result.timing, result.device_state, result.flags, result.no_timing = None, None, [], None
    result.work_s = time.perf_counter() - started
    return result


def diagnosed_trial(implementation: Implementation, request: TrialRequest) -> Verdict:
    """Return the verdict on an instance. Raise what the instance raises."""
    result = TrialResult(verdict=Verdict(status=Status.OK))
    try:
        _run(implementation, request, result)
    except ContractViolation as violation:
        return violation.verdict
    return result.verdict


def prepare(implementation: Implementation, request: TrialRequest) -> Operands:
    """Quantize the case's weight, or load it from a file. Raise ContractViolation if quantizing changed the original or
    its shape."""
    case, device, seed = request.case, request.device, request.seed
    if case.experts is not None:
        return prepare_experts(implementation, case, device, seed, request.weight)
    if request.weight is not None and request.weight.quantized:
        weight = file_operands.stored_weight(request.weight, implementation.layout, device)
        decoded = weight.dequantize()
        operands = Operands(case, device, seed, decoded, weight, decoded)
    elif request.weight is not None:
        operands = quantized(implementation, case, device, seed, file_operands.weight(request.weight, device))
    else:
        operands = quantized(implementation, case, device, seed, inputs.make_weight(case, seed, device))
    if request.activations is not None:
        operands.activations = file_operands.activations(request.activations, device)
    return operands


def quantized(implementation: Implementation, case: Case, device: str, seed: int, original: Tensor) -> Operands:
    """Quantize a weight fp32 [N, K] for `case`. Raise ContractViolation as `prepare` does."""
    before = original.clone()
    weight = implementation.quantize(original, scheme_named(case.scheme))
    if not torch.equal(original, before):
        raise ContractViolation(Kind.INPUT_MODIFIED, "quantize changed its input weight in place")
    decoded = decoded_weight(implementation, weight)
    if tuple(decoded.shape) != tuple(original.shape):
        raise ContractViolation(Kind.WRONG_SHAPE,
                                f"a weight {list(original.shape)} reads back as {list(decoded.shape)}")
    return Operands(case, device, seed, original, weight, decoded.float())


def decoded_weight(implementation: Implementation, weight: QuantizedWeight) -> Tensor:
    """Return the decoded stored weight, [N, K].

    Codes in a known layout are decoded by the oracle, so that an implementation does not choose its own reference.
    """
    if not weight.has_codes:
        return implementation.dequantize(weight)
    return as_judged(weight, implementation.scale_rule).dequantize()


def prepare_experts(implementation: Implementation, case: Case, device: str, seed: int,
                    source: WeightSource | None = None) -> ExpertOperands:
    """Quantize the weight of each expert, or load all from a file. Raise ContractViolation as `prepare` does."""
    def one(expert: int) -> Operands:
        return quantized(implementation, case.of_one_expert, device, seed, expert_weight(case, seed, expert, device))

    if source is None:
        first = one(0)
        original, decoded = first.original, first.decoded
        stored = [first.weight, *(one(expert).weight for expert in range(1, case.experts or 1))]
    else:
        stored = file_operands.stored_experts(source, implementation.layout, device)
        original = decoded = stored[0].dequantize()
    operands = ExpertOperands(case, device, seed, original, QuantizedExperts.stack(stored), decoded,
                              decode=lambda weight: decoded_weight(implementation, weight),
                              from_file=source is not None)
    operands.activation("preparation")
    return operands


def expert_alone(implementation: Implementation, operands: ExpertOperands, expert: int) -> Operands:
    """Return the operands of one expert's weight, as stored among the others."""
    case, weight = operands.case.of_one_expert, operands.weight.experts[expert]
    original = operands.original_of(expert)
    decoded = decoded_weight(implementation, weight).float()
    return Operands(case, operands.device, operands.seed, original, weight, decoded, operands.rule)


def _run(implementation: Implementation, request: TrialRequest, result: TrialResult) -> None:
    support = implementation.support(scheme_named(request.case.scheme), request.device)
    if not support.supported:
        status = Status.MISSING if support.missing else Status.UNSUPPORTED
        result.verdict = Verdict(status=status, summary=support.reason)
        return
    if implementation.experts_only and request.case.experts is None:
        result.verdict = Verdict(status=Status.UNSUPPORTED, summary=f"{implementation.name} multiplies by experts only")
        return
    result.no_timing = _no_timing(implementation, request)
    _share_cores(request, timed=not result.no_timing)
    storages_before = kept_memory.live_storages() if not result.no_timing else {}
    try:
        operands = prepare(implementation, request)
    except (CheckpointError, CannotStack) as error:     # not a fault of the implementation
        result.verdict = Verdict(status=Status.UNSUPPORTED, summary=str(error))
        return
    # A single expert's operands are not kept, since they would count as memory that the implementation holds.
    rule = undeclared_rule(implementation, expert_alone(implementation, operands, 0)
                           if isinstance(operands, ExpertOperands) else operands)
    if rule is not None:    # the instance serves only this case, and is judged by its rule from here on
        implementation.scale_rule = rule.name
        operands = prepare(implementation, request)
        result.flags.append(Flag.UNDECLARED_RULE)
        result.verdict = Verdict(status=Status.OK, summary=rule.message())
    result.accuracy = Accuracy(sqnr_db=_sqnr_db(operands))
    result.traffic = Traffic(packed_bytes=operands.weight.nbytes)
    product = GroupedProduct(implementation, operands) if isinstance(operands, ExpertOperands) else implementation
    examination = Examination(product, operands, request.check_budget_s,
                              statistic=ErrorStatistic(likeness_of_rows(operands.decoded)),
                              diagnose=lambda verdict, operands: _diagnosed(verdict, implementation, operands))
    examination.properties["library"] = implementation.library()
    try:
        with tampering.settings_kept() as changed:
            if isinstance(operands, ExpertOperands):
                verdict = _checked_experts(implementation, examination, result)
            else:
                verdict = _checked(examination, result)
        tampering.check_untampered()
        if request.device == "cpu" and torch.get_num_threads() != _all_threads():
            examination.covered["threads"] = f"{torch.get_num_threads()} of {_all_threads()}"
        if changed:
            examination.covered["settings"] = f"changed and put back: {', '.join(changed)}"
    finally:
        direction = examination.statistic.rounding.direction
        result.properties = Properties(**examination.properties, output_rounding=direction,
                                       first_call_s=examination.first_call_s or None)
        if output_rounding.is_directed(direction):
            result.flags.append(Flag.DIRECTED_ROUNDING)
        bits = result.properties.accumulator_bits
        if bits is not None and bits < implementation.accumulator.bits:
            result.flags.append(Flag.NARROW_ACCUMULATOR)
        result.coverage = Coverage(covered=examination.covered, not_asked=examination.not_asked)
    if verdict is not None:
        result.verdict = _diagnosed(verdict, implementation, operands)
    elif not result.no_timing:
        _time(product, operands, request, result, storages_before)


def _checked(examination: Examination, result: TrialResult) -> Verdict | None:
    """Run every check; return the first verdict on a fault."""
    implementation, operands = examination.implementation, examination.operands
    verdict = check_quantization(implementation, operands) or activation_rules.find_rule(
        implementation, operands, explain_in_a_sweep)
    activation_rules.note_not_asked(examination, operands)
    if verdict is None:
        comparison, verdict = correctness.check_calls(implementation, operands, examination=examination)
        result.accuracy = result.accuracy.model_copy(update=_accuracy(comparison))
        if verdict is not None and verdict.kind in (None, Kind.NOT_REPEATABLE):
            call = verdict.evidence["call"]
            verdict = (activation_rules.stale_scale(implementation, operands, call)
                       or activation_rules.undeclared_rule(implementation, operands) or verdict)
    if verdict is None and contents_of(operands.case.workload) is WeightContents.VALUES:
        asked, verdict = examination.ask(
            "NaN of one token", lambda: nonfinite_rows.check_nonfinite_rows(implementation, operands))
        if asked:
            examination.covered["NaN of one token"] = "NaN and infinity in one row of the activation"
    if verdict is None:
        verdict = (correctness.check_one_hot(implementation, operands) or _nonfinite_codes(examination)
                   or correctness.check_configs(implementation, operands) or _serving_calls(examination)
                   or check_precision(examination))
    # The statistic assumes activations of random sign, unlike those with outlier channels and offsets.
    if verdict is None and contents_of(operands.case.workload) is not WeightContents.VALUES:
        statistic = examination.statistic
        examination.properties |= {"error_factor": statistic.factor, "error_threshold": _finite(statistic.threshold)}
        verdict = examination.statistic_verdict()
    return verdict


def _nonfinite_codes(examination: Examination) -> Verdict | None:
    implementation, operands = examination.implementation, examination.operands
    name = "codes that are no numbers"
    if not is_canary(operands.case.workload) or operands.case.m == 0:
        examination.not_asked[name] = "asked of canaries"
        return None
    if (reason := nonfinite_codes.can_be_stored(operands)) is not None:
        examination.not_asked[name] = reason
        return None
    asked, verdict = examination.ask(
        name, lambda: nonfinite_codes.check_nonfinite_codes(implementation, operands))
    if asked:
        examination.covered[name] = "each NaN and infinity of the format and of its scales' once"
    return verdict


def _checked_experts(implementation: Implementation, examination: Examination, result: TrialResult) -> Verdict | None:
    """Run every check of experts; return the first verdict on a fault, with its diagnosis."""
    operands = examination.operands
    assert isinstance(operands, ExpertOperands)
    count = operands.case.experts or 1
    first, last = (expert_alone(implementation, operands, expert) for expert in (0, count - 1))
    verdict = check_quantization(implementation, first) or check_quantization(implementation, last)
    if verdict is None:
        verdict = activation_rules.find_rule(OneOfExperts(implementation, count, 0), first, explain_in_a_sweep)
        operands.rule = first.rule
        activation_rules.note_not_asked(examination, first)
    if verdict is not None:
        return verdict
    try:
        comparison, verdict = expert_calls.check_experts(examination)
    except ContractViolation:
        raise
    except Exception as error:
        verdict = expert_calls.fails_for_empty_experts_alone(examination, error)
        if verdict is None:
            raise
        traceback.print_exc()
        return verdict
    result.accuracy = result.accuracy.model_copy(update=_accuracy(comparison))
    if verdict is None or verdict.kind not in (None, Kind.NOT_REPEATABLE):
        return verdict
    # Each call has another routing, which may be why one call is right and the next is wrong.
    named = _named(verdict, lambda: diagnose_experts(
        examination, implementation,
        lambda alone, expert: quantized(alone, operands.case.of_one_expert, operands.device, operands.seed,
                                        operands.original_of(expert)),
        verdict.evidence.get("expert"), [verdict.evidence["column"]] if "column" in verdict.evidence else []))
    vague = named.kind is None or named.kind.group in (Group.RESULT, Group.CALL)
    return verdict if verdict.kind is not None and vague and named.kind is not Kind.FROZEN_INPUT else named


def _serving_calls(examination: Examination) -> Verdict | None:
    operands = examination.operands

    def another(n: int, k: int, purpose: object) -> Operands:
        like, original = serving_calls.prepared_like(operands, n, k, purpose)
        made = quantized(examination.implementation, like.case, like.device, like.seed, original)
        return replace(made, rule=operands.rule)

    def same_case(like: Operands, original: Tensor) -> Operands:
        return quantized(examination.implementation, like.case, like.device, like.seed, original)

    verdict = (serving_calls.check_tokens(examination) or serving_calls.check_layouts(examination)
               or serving_calls.check_shapes(examination, another) or serving_calls.check_bias(examination)
               or serving_calls.check_streams(examination, another) or early_launch.check_early_launch(examination)
               or serving_calls.check_repeats(examination))
    if verdict is None:
        examination.ask("accumulator", lambda: measure_accumulator(examination, same_case))
    return verdict


def _time(implementation: Implementation, operands: Operands, request: TrialRequest, result: TrialResult,
          storages_before: dict[int, int]) -> None:
    kept = kept_memory.kept_bytes(implementation, operands, storages_before)
    x = operands.activation(0)
    seen = effects.observe(lambda: implementation.matmul(x, operands.weight), request.device)
    with tampering.settings_kept():
        samples = timing.time_case(
            implementation, operands, cache_bytes=request.cache_bytes, budget_s=request.timing_budget_s
        )
        # After the many calls of timing, results must still be right.
        _, verdict = correctness.check_calls(implementation, operands, timed=True, calls=CALLS_AFTER_TIMING)
    tampering.check_untampered()
    if verdict is not None:
        result.verdict = _diagnosed(verdict, implementation, operands)
        return
    result.timing, result.device_state = timing.summarized(samples, request.seed), samples.device_state
    if result.device_state and result.device_state.throttled_samples:
        result.flags.append(Flag.THROTTLED)
    if result.device_state and result.device_state.shared:
        result.flags.append(Flag.SHARED_DEVICE)
    result.traffic = traffic.traffic_of(operands, seen, result.timing.median_us / 1e6, request.read_gb_per_s, kept)
    result.flags += traffic.flags(operands, result.timing, result.traffic, samples.beyond_cache, seen,
                                  request.read_gb_per_s)
    result.coverage.not_asked.update(traffic.not_asked(operands, result.traffic, seen, request.read_gb_per_s))
    result.traffic = result.traffic.model_copy(
        update={"bottleneck": traffic.bottleneck(operands, result.timing, result.traffic, request.read_gb_per_s)}
    )


def undeclared_rule(implementation: Implementation, operands: Operands) -> ScaleRule | None:
    """Return the rule by which scales were chosen, if it is valid but neither the scheme's nor declared."""
    if implementation.scale_rule is not None or not operands.weight.has_codes \
            or type(implementation).quantize is Implementation.quantize \
            or diagnose_quantization(operands.original, operands) is None:
        return None
    rule = find_scale_rule(operands.original, operands.weight)
    kept = rule is not None and holds_on_powers_of_two(implementation, operands.original, rule, operands.weight.scheme)
    return rule if kept else None


def check_quantization(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Return the verdict on stored codes and scales that differ from the scheme's definition; None if they are right.
    """
    cls, weight = type(implementation), operands.weight
    if cls.quantize is Implementation.quantize and cls.dequantize is Implementation.dequantize:
        return None     # quantized by the oracle
    if weight.has_codes:
        rule = implementation.scale_rule
        if rule is not None and follows_rule(operands.original, weight, rule):
            return None
        judged = replace(operands, weight=as_judged(weight, rule))
        diagnosis = diagnose_quantization(operands.original, judged)
        if diagnosis is None:
            return None
        # Two faults may look like one; a probe weight tells them apart.
        diagnosis = diagnose_quantization(
            operands.original, judged, probe_quantization(implementation, judged)) or diagnosis
        if diagnosis.kind is Kind.ZERO_BLOCK and rule is None \
                and (other := rule_beside_zeros(operands.original, weight)) is not None:
            diagnosis = replace(diagnosis, message=f"{diagnosis.message}; beside zeros, {other.message()}")
        return Verdict(status=Status.WRONG, kind=diagnosis.kind, summary=diagnosis.message, evidence=diagnosis.evidence)
    if not weight.scheme.quantized:
        return None
    expected = sqnr_db(operands.original, weight.scheme.dequantize(*weight.scheme.quantize(operands.original)))
    reached = sqnr_db(operands.original, operands.decoded)
    slack = PEER_SQNR_SLACK_DB if contents_of(operands.case.workload) is WeightContents.NORMAL else DESIGNED_SLACK_DB
    if expected is None or reached is None or reached >= expected - slack:
        return None
    return Verdict(
        status=Status.WRONG, kind=Kind.INACCURATE,
        evidence={"sqnr_db": repr(reached), "oracle_sqnr_db": repr(expected)},
        summary=f"quantizes the weight to {reached:.2f} dB, where {weight.scheme.name} reaches {expected:.2f} dB")


def _diagnosed(verdict: Verdict, implementation: Implementation, operands: Operands) -> Verdict:
    if verdict.kind is not None or isinstance(operands, ExpertOperands):
        return verdict
    columns = [verdict.evidence["column"]] if "column" in verdict.evidence else []
    return _named(verdict, lambda: diagnose_product(implementation, operands, columns))


def _named(verdict: Verdict, diagnose: Callable[[], Diagnosis]) -> Verdict:
    """Return the verdict with the kind and the message of a diagnosis, if diagnosing succeeds."""
    try:
        diagnosis = diagnose()
    except ContractViolation as violation:
        return violation.verdict
    except Exception as error:  # the implementation raised on the probes; the original verdict still holds
        traceback.print_exc()
        verdict.evidence["diagnosis_failed"] = f"{type(error).__name__}: {error}"[:400]
        return verdict
    return verdict.model_copy(update={
        "kind": diagnosis.kind, "summary": diagnosis.message,
        "evidence": {"seen": verdict.summary, **verdict.evidence, **diagnosis.evidence},
    })


def _no_timing(implementation: Implementation, request: TrialRequest) -> str | None:
    if is_canary(request.case.workload):
        return "a canary, too small for a meaningful time"
    if request.case.m == 0:
        return "no tokens: there is nothing to time"
    if request.timing_budget_s <= 0:
        return TIMING_OFF
    return implementation.no_timing(request.device)


@cache
def _all_threads() -> int:
    return torch.get_num_threads()


def _share_cores(request: TrialRequest, timed: bool) -> None:
    """Limit compilation, and multiplication if it is not timed, to this case's share of the cores: with more threads
    than cores, PyTorch's loops wait for threads that have none. A case timed on a CPU uses all cores throughout, since
    code is compiled for a fixed number of threads."""
    everything = _all_threads()
    cores = min(request.cores or everything, everything)
    torch.set_num_threads(everything if timed and request.device == "cpu" else cores)
    if request.device != "cpu" and request.cores:
        tune_alone(request.device, timed)
    if request.cores:
        # Read by Inductor on import, which only cases that compile do; importing it here would take two seconds.
        threads = os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(request.cores))
        compiler_options: Any = sys.modules.get("torch._inductor.config")
        if compiler_options is not None:        # an earlier case imported it
            compiler_options.compile_threads = int(threads)


def _accuracy(comparison: Comparison) -> dict[str, float | None]:
    return {name: _finite(getattr(comparison, name)) for name in ("relative_error", "bound", "worst_ulp")}


def _finite(value: float) -> float | None:
    """Return a number that a record can hold, or None."""
    return value if abs(value) <= LARGEST else None


def _sqnr_db(operands: Operands) -> float | None:
    return sqnr_db(operands.original, operands.decoded) if bool(operands.decoded.isfinite().all()) else None


def forget() -> None:
    """Free what this case left in the process."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()

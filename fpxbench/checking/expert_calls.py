"""Check the grouped product of experts: all routings, single weights of every expert, and other layouts.

The checks of a plain product (`fpxbench.checking.correctness`) apply to a `GroupedProduct`. This module has the checks
that only experts need: other routings, experts without rows, weights that are read with their own rows.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fpxbench.checking import contract, correctness, early_launch, inputs, poison, serving_calls
from fpxbench.checking.examination import Examination
from fpxbench.checking.expert_operands import ExpertOperands
from fpxbench.checking.reference import Comparison, Reference, compare, one_hot_tolerance
from fpxbench.checking.wrong_output import judge
from fpxbench.records.case import Routing
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

TOKEN_COUNTS = (1, 33, 4, 0)
_LARGEST_REFERENCE = 1 << 24
_LARGEST_REFERENCE_GPU = 1 << 36
ONE_HOT_COLUMNS = 16


def check_experts(examination: Examination) -> tuple[Comparison, Verdict | None]:
    """Check the grouped product of `examination`, whose implementation is a `GroupedProduct`.

    Return the comparison of the case's own calls, and a verdict if an output was wrong, perhaps without a kind. Raises
    ContractViolation.
    """
    implementation, operands = examination.implementation, _operands(examination)
    comparison, verdict = correctness.check_calls(implementation, operands, examination=examination)
    operands.check_offsets()
    if verdict is None:
        verdict = _check_one_hot(examination) or _check_routings(examination) or _check_strides(examination)
    verdict = verdict or serving_calls.check_repeats(examination)
    operands.check_offsets()
    if verdict is None:
        statistic = examination.statistic
        threshold = statistic.threshold
        examination.properties |= {"error_factor": statistic.factor,
                                   "error_threshold": threshold if threshold < float("inf") else None}
        verdict = statistic.verdict()
    for name in ("token counts", "other shapes", "several weights", "streams", early_launch.NAME, "bias",
                 "accumulator"):
        if name not in examination.covered:
            examination.not_asked.setdefault(name, "asked of single weights, not of experts")
    return comparison, verdict


def checked_again(examination: Examination) -> Verdict | None:
    """Repeat the last drawn call; return a verdict without a kind if it is wrong."""
    operands = _operands(examination)
    x = operands.drawn_again()
    again = partial(contract.watched_matmul, examination.implementation, x, operands.weight, operands.device, None)
    output, expected = again(poison.NAN), operands.reference(x, examination.implementation)
    comparison = compare(output.seen, expected)
    operands.check_offsets()
    if comparison.within:
        examination.statistic.add(output.seen, expected)
        return None
    return judge(again, output, comparison, expected, pattern=poison.NAN)


def fails_for_empty_experts_alone(examination: Examination, error: Exception) -> Verdict | None:
    """Return the verdict on a call that raised `error` when an expert had no rows, if it is right when all have rows;
    else None."""
    operands = _operands(examination)
    empty = operands.empty
    if not empty:
        return None
    try:
        verdict = wrong_with_none_empty(examination)
    except Exception:   # it fails there too, so the original exception is the result
        return None
    if verdict is not None:
        return None
    return Verdict(
        status=Status.ERROR, kind=Kind.EMPTY_EXPERT, evidence={"empty_experts": empty[:32]},
        summary=f"raises {type(error).__name__} where {len(empty)} of {operands.case.experts} experts have no rows, and"
                f" is right where all have some: {next(iter(str(error).splitlines()), '')[:200]}")


def routed_to_all(operands: ExpertOperands, counts: list[int] | None = None) -> Tensor:
    """Route two rows to every expert, or these `counts`; return the rows."""
    counts = counts or [2] * operands.case.experts
    operands.route(counts)
    case = operands.case.of_one_expert.model_copy(update={"m": sum(counts)})
    return inputs.make_activation(case, operands.seed, "all experts", operands.device)


def wrong_with_none_empty(examination: Examination) -> Verdict | None:
    """Check the current routing with two rows added for each expert without rows; return a verdict without a kind if
    the product is wrong."""
    operands, implementation = _operands(examination), examination.implementation
    starts = [0, *operands.ends[:-1]]
    x = routed_to_all(operands, [end - start or 2 for start, end in zip(starts, operands.ends, strict=True)])
    y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
    comparison = compare(y, operands.reference(x, implementation))
    if comparison.within:
        return None
    return Verdict(status=Status.WRONG if comparison.finite else Status.NONFINITE, summary=comparison.message())


def _operands(examination: Examination) -> ExpertOperands:
    assert isinstance(examination.operands, ExpertOperands)
    return examination.operands


def _check_routings(examination: Examination) -> Verdict | None:
    """Check every routing with other token counts, including 0."""
    operands = _operands(examination)
    if examination.new_shapes_cost_too_much("routings"):
        return None
    case, limit = operands.case, _LARGEST_REFERENCE if operands.device == "cpu" else _LARGEST_REFERENCE_GPU
    covered: dict[str, list[str]] = {}
    deadline = examination.deadline(0.5)
    for routing in Routing:
        for m in TOKEN_COUNTS:
            rows = m * case.experts_per_token
            if rows * case.n * case.k > limit or (examination.implementation.slow(operands.device) and m > 4):
                continue
            if covered and deadline.passed():
                examination.not_asked["routings"] = f"{routing} with {m} tokens and what follows: no time"
                break
            operands.activation(("routing", routing), m, routing)
            verdict = checked_again(examination)
            if verdict is not None:
                evidence = {"routing": str(routing), "m": m, "empty_experts": operands.empty[:32]}
                return verdict.model_copy(update={
                    "evidence": verdict.evidence | evidence,
                    "summary": f"right for {case.m} tokens that are routed {case.routing}, wrong for {m} that are"
                               f" routed {routing}: {verdict.summary}"})
            covered.setdefault(str(routing), []).append(str(m))
    examination.covered["routings"] = "; ".join(
        [f"{case.routing} with {case.m} tokens", *(f"{name} with {', '.join(m)}" for name, m in covered.items())])
    return None


def _check_strides(examination: Examination) -> Verdict | None:
    """Check rows that are slices of wider rows in memory."""
    operands, implementation = _operands(examination), examination.implementation
    rows = operands.activation("strided")
    if not len(rows):
        return None
    wide = torch.full((len(rows), rows.shape[1] + 24), torch.nan, dtype=rows.dtype, device=rows.device)
    wide[:, 8:-16] = rows
    took, verdict = examination.ask("a slice of wider rows", lambda: _compared(examination, wide[:, 8:-16], rows))
    if took and verdict is None:
        examination.covered["activation layouts"] = "a slice of wider rows"
    if verdict is None or not compare(contract.checked_matmul(implementation, rows, operands.weight, operands.device),
                                      operands.reference(rows, implementation)).within:
        return verdict
    return verdict.model_copy(update={"kind": Kind.ACTIVATION_LAYOUT})


def _compared(examination: Examination, x: Tensor, same: Tensor) -> Verdict | None:
    operands, implementation = _operands(examination), examination.implementation
    y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
    comparison = compare(y, operands.reference(same, implementation))
    if comparison.within:
        return None
    return Verdict(status=Status.WRONG if comparison.finite else Status.NONFINITE,
                   summary=f"wrong for a slice of wider rows, right for the same rows without gaps:"
                           f" {comparison.message()}")


def _check_one_hot(examination: Examination) -> Verdict | None:
    """Read single weights of every expert with one-hot rows, so that a misread code cannot hide in a sum."""
    operands, implementation = _operands(examination), examination.implementation
    case = operands.case
    if not operands.weight.scheme.quantized or implementation.slow(operands.device) or case.m == 0:
        return None
    count = min(ONE_HOT_COLUMNS, case.k)
    dtype = inputs.ACTIVATION_DTYPES[case.activation]
    columns = [_columns(operands, expert, count) for expert in range(case.experts)]
    operands.route([len(each) for each in columns])
    x = torch.cat([inputs.one_hot(each, len(each), case.k, dtype, operands.device) for each in columns])
    again = partial(contract.watched_matmul, implementation, x, operands.weight, operands.device, None)
    output = again(poison.NAN)
    decoded = torch.cat([operands.decode(operands.weight.experts[expert])[:, torch.tensor(each, device=x.device)].T
                         for expert, each in enumerate(columns)]).double()
    expected = Reference(decoded, one_hot_tolerance(
        decoded, dtype, implementation.activation_format_under(operands.weight.scheme)))
    comparison = compare(output.seen, expected)
    examination.covered["single weights"] = f"{count} columns of each of {case.experts} experts"
    if comparison.within:
        return None
    verdict = judge(again, output, comparison, expected, pattern=poison.NAN)
    if verdict.kind is not None:
        return verdict
    row, n = comparison.worst_at
    expert = next(expert for expert, first, last in operands.groups if first <= row < last)
    column = columns[expert][row - operands.groups[expert][1]]
    return Verdict(
        status=Status.WRONG if comparison.finite else Status.NONFINITE,
        evidence={"expert": expert, "row": n, "column": column, "value": repr(comparison.worst_value),
                  "expected": repr(comparison.worst_expected)},
        summary=f"reads the weight of expert {expert} at row {n}, column {column} as {comparison.worst_value:.6g};"
                f" stored is {comparison.worst_expected:.6g} ({comparison.outside} such weights in {len(x)} columns)")


def _columns(operands: ExpertOperands, expert: int, count: int) -> list[int]:
    weight = operands.weight.experts[expert]
    found = inputs.columns_covering_codes(weight, count) if weight.has_codes else []
    others = (column for column in range(0, operands.case.k) if column not in found)
    return [*found, *(next(others) for _ in range(count - len(found)))]


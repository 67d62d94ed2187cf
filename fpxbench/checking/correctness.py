"""Check one implementation on one case: results, side effects, repeatability, every autotuning configuration.

One right output proves little. Each call gets a fresh activation and poisoned memory; its output is compared with its
own reference and with that of the call before; inputs must stay unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fpxbench.checking import contract, inputs
from fpxbench.checking.operands import Operands
from fpxbench.checking.poison import unwritten_elements
from fpxbench.checking.reference import Comparison, Reference, compare, one_hot_tolerance
from fpxbench.implementation import Implementation
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

CALLS, CALLS_SLOW = 3, 2
ONE_HOT_COLUMNS, ONE_HOT_COLUMNS_FEW = 16, 4
"""One-hot probes of a case: columns chosen to hold as many different codes as possible. Fewer on a large weight, whose columns
are long, and of an interpreter, which takes seconds for each."""
LARGE = 1 << 21
EVERY_WEIGHT_SECONDS = 0.03
"""Beyond those columns, all others are read too, as far as this takes us: every weight of a small case."""


def check_calls(implementation: Implementation, operands: Operands, *, timed: bool = False, calls: int | None = None
                ) -> tuple[Comparison, Verdict | None]:
    """Compare `calls` products of fresh activations with their references; `timed`: again, after the case was timed.

    Return the worst comparison, and a verdict if an output was wrong; its kind may be open.
    """
    calls = calls or (CALLS_SLOW if implementation.slow(operands.device) else CALLS)
    worst: Comparison | None = None
    previous: Reference | None = None
    for number in range(calls):
        x = operands.activation(("after timing", number) if timed else number)
        expected = operands.reference(x, implementation)
        y = contract.checked_matmul(implementation, x, operands.weight, operands.device)
        comparison = compare(y, expected)
        if worst is None or comparison.relative_error > worst.relative_error:
            worst = comparison
        if not comparison.within:
            verdict = _judge(y, comparison, previous)
            if (number or timed) and verdict.kind is None:
                verdict.kind = Kind.NOT_REPEATABLE
                before = f"for the first {number} calls" if number else "until it was timed"
                verdict.summary = f"right {before}, then wrong: {comparison.message()}"
            verdict.evidence["call"] = number
            return comparison, verdict
        previous = expected
    return worst, None


def check_one_hot(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Single weights, read out one by one: a code that is read wrongly cannot hide in a sum."""
    case = operands.case
    if case.m == 0 or not operands.weight.scheme.quantized:
        return None
    weight = operands.weight
    most = ONE_HOT_COLUMNS_FEW if case.n * case.k >= LARGE or implementation.slow(operands.device) else ONE_HOT_COLUMNS
    if weight.has_codes:
        columns = inputs.columns_covering_codes(weight, most)
    else:
        columns = list(range(0, case.k, max(1, case.k // most)))[:most]
    if not implementation.slow(operands.device):
        columns = list(dict.fromkeys([*columns, *range(case.k)]))
    read, seen = [], []
    for batch, weights in contract.one_hot_columns(implementation, operands, columns, at_least=most, seconds=EVERY_WEIGHT_SECONDS):
        read += batch
        seen.append(weights)
    decoded = operands.decoded[:, torch.tensor(read, device=operands.decoded.device)].double()
    tolerance = one_hot_tolerance(decoded, seen[0].dtype, implementation.activation_format)
    comparison = compare(torch.cat(seen, dim=1), Reference(decoded, tolerance))
    if comparison.within:
        return None
    n, at = comparison.worst_at
    k = read[at]
    evidence = {"row": n, "column": k, "value": repr(comparison.worst_value), "expected": repr(comparison.worst_expected)}
    if weight.has_codes:
        evidence["code"] = weight.scheme.format.describe_code(int(weight.codes()[n, k]))
    return Verdict(
        status=Status.WRONG if comparison.finite else Status.NONFINITE, evidence=evidence,
        summary=f"reads the weight at row {n}, column {k} as {comparison.worst_value:.6g};"
                f" stored is {comparison.worst_expected:.6g} ({comparison.outside} such weights in {len(read)} columns)",
    )


def check_configs(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Every configuration that autotuning may pick, on the same input."""
    x = operands.activation("configurations")
    configs = list(implementation.configs(x, operands.weight))
    if len(configs) < 2:
        return None     # matmul used it
    expected = operands.reference(x, implementation)
    for config in configs:
        y = contract.checked_matmul(implementation, x, operands.weight, operands.device,
                                    lambda x, weight, config=config: implementation.matmul_with(x, weight, config))
        comparison = compare(y, expected)
        if not comparison.within:
            verdict = _judge(y, comparison, None)
            verdict.kind = Kind.CONFIG_DEPENDENT
            verdict.evidence |= {"config": str(config), "configs": len(configs)}
            verdict.summary = f"wrong with the configuration {config}, one of {len(configs)} that autotuning may pick: {comparison.message()}"
            return verdict
    return None


def _judge(y: Tensor, comparison: Comparison, previous: Reference | None) -> Verdict:
    """The verdict on an output outside its tolerance, as far as the output itself tells the kind."""
    evidence = {
        "relative_error": repr(comparison.relative_error), "bound": repr(comparison.bound), "outside": comparison.outside,
        "worst_at": list(comparison.worst_at), "worst_value": repr(comparison.worst_value),
        "worst_expected": repr(comparison.worst_expected),
    }
    unwritten = unwritten_elements(y)
    if unwritten:
        return Verdict(status=Status.WRONG, kind=Kind.UNWRITTEN_OUTPUT, evidence=evidence,
                       summary=f"{unwritten} of {y.numel()} output elements were never written")
    if previous is not None and compare(y, previous).within:
        return Verdict(status=Status.WRONG, kind=Kind.STALE_OUTPUT, evidence=evidence,
                       summary="gave the output of the call before")
    if not comparison.finite:
        bad = ~torch.isfinite(y)
        row, column = bad.nonzero()[0].tolist()
        evidence["nonfinite"] = int(bad.sum())
        return Verdict(status=Status.NONFINITE, evidence=evidence,
                       summary=f"{int(bad.sum())} of {y.numel()} outputs are not finite,"
                               f" the first at [{row}, {column}]: {y[row, column].item()}")
    return Verdict(status=Status.WRONG, evidence=evidence, summary=comparison.message())

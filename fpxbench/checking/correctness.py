"""Check one implementation on one case: results, side effects, repeatability, every autotuning configuration.

One right output proves little. Each call gets a fresh activation and poisoned memory with an alternating pattern. Its
output is compared with its reference and with the previous call's. Inputs, and outputs after their return, must not
change.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter

import torch

from fpxbench.checking import contract, inputs, poison
from fpxbench.checking.examination import Examination
from fpxbench.checking.operands import Operands
from fpxbench.checking.reference import Comparison, Reference, compare, one_hot_tolerance, summed_weight_slack
from fpxbench.checking.wrong_output import judge
from fpxbench.implementation import Implementation
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

CALLS, CALLS_SLOW = 3, 2
ONE_HOT_COLUMNS, ONE_HOT_COLUMNS_FEW = 16, 4
"""Number of one-hot probes of a case, whose columns cover as many codes as possible. Fewer for a large weight, whose
columns are long, and in an interpreter, where each takes seconds."""
LARGE = 1 << 21
EVERY_WEIGHT_SECONDS = 0.03
"""Time for reading further columns: enough for every weight of a small case."""


def check_calls(implementation: Implementation, operands: Operands, *, timed: bool = False, calls: int | None = None,
                examination: Examination | None = None) -> tuple[Comparison, Verdict | None]:
    """Compare `calls` products of fresh activations with their references. timed : whether this is after timing

    Return the worst comparison, and a verdict if an output was wrong, perhaps without a kind. Right outputs are added
    to the examination's statistic. Raise ContractViolation.
    """
    calls = calls or (CALLS_SLOW if implementation.slow(operands.device) else CALLS)
    worst: Comparison | None = None
    previous: Reference | None = None
    outputs: list[contract.Output] = []
    for number in range(calls):
        purpose = ("after timing", number) if timed else number
        x = operands.activation(purpose)
        pattern = poison.PATTERNS[number % len(poison.PATTERNS)]
        again = partial(contract.watched_matmul, implementation, x, operands.weight, operands.device, None)
        started = perf_counter()
        output = again(pattern)
        if examination is not None and number == 0:
            examination.first_call_s = perf_counter() - started
        expected = operands.reference(x, implementation)
        comparison = compare(output.seen, expected)
        if worst is None or comparison.relative_error > worst.relative_error:
            worst = comparison
        if not comparison.within:
            verdict = judge(again, output, comparison, expected, pattern=pattern, previous=previous)
            if (number or timed) and verdict.kind is None and not _first_is_right(implementation, operands, purpose):
                verdict.kind = Kind.NOT_REPEATABLE
                before = f"for the first {number} calls" if number else "until it was timed"
                verdict.summary = f"right {before}, then wrong: {comparison.message()}"
            verdict.evidence["call"] = number
            return comparison, verdict
        if examination is not None:
            examination.statistic.add(output.seen, expected)
        outputs.append(output)
        previous = expected
    for output in outputs:      # a later call must not overwrite an earlier output
        output.check_unchanged()
    return worst, None


def _first_is_right(implementation: Implementation, operands: Operands, purpose: object) -> bool:
    """Return whether the first activation, whose product was right, still has a right product: then the fault depends
    on the activation, not on the number of calls. Leave the operands as drawn for `purpose`."""
    x = operands.activation(0)
    output = contract.watched_matmul(implementation, x, operands.weight, operands.device, None, poison.PATTERNS[0])
    within = compare(output.seen, operands.reference(x, implementation)).within
    operands.activation(purpose)
    return within


def check_one_hot(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Read single weights with one-hot activations, so that a misread code cannot hide in a sum."""
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
    for batch, weights in contract.one_hot_columns(implementation, operands, columns, at_least=most,
                                                   seconds=EVERY_WEIGHT_SECONDS):
        read += batch
        seen.append(weights)
    decoded = operands.decoded[:, torch.tensor(read, device=operands.decoded.device)].double()
    tolerance = one_hot_tolerance(decoded, seen[0].dtype, implementation.activation_format_under(weight.scheme))
    if not weight.has_codes:    # in a private layout, a weight may be stored as a sum (rotated weights are)
        tolerance = tolerance + summed_weight_slack(operands.decoded)
    comparison = compare(torch.cat(seen, dim=1), Reference(decoded, tolerance))
    if comparison.within:
        return None
    n, at = comparison.worst_at
    k = read[at]
    once_more = next(weights for _, weights in contract.one_hot_columns(implementation, operands, [k]))
    if compare(once_more, Reference(decoded[:, at:at + 1], tolerance[:, at:at + 1])).within:
        return Verdict(
            status=Status.WRONG, kind=Kind.NOT_REPEATABLE, evidence={"row": n, "column": k},
            summary=f"column {k} of the weight was read wrongly once ({comparison.worst_value:.6g} in row {n}, stored"
                    f" is {comparison.worst_expected:.6g}), and is right when asked again")
    evidence = {"row": n, "column": k, "value": repr(comparison.worst_value),
                "expected": repr(comparison.worst_expected)}
    if weight.has_codes:
        evidence["code"] = weight.scheme.format.describe_code(int(weight.codes()[n, k]))
    return Verdict(
        status=Status.WRONG if comparison.finite else Status.NONFINITE, evidence=evidence,
        summary=f"reads the weight at row {n}, column {k} as {comparison.worst_value:.6g}; stored is"
                f" {comparison.worst_expected:.6g} ({comparison.outside} such weights in {len(read)} columns)")


def check_configs(implementation: Implementation, operands: Operands) -> Verdict | None:
    """Check every configuration that autotuning may choose, on the same input."""
    x = operands.activation("configurations")
    configs = list(implementation.configs(x, operands.weight))
    if len(configs) < 2:
        return None     # matmul used the only one
    expected = operands.reference(x, implementation)
    for config in configs:
        again = partial(contract.watched_matmul, implementation, x, operands.weight, operands.device,
                        lambda x, weight, config=config: implementation.matmul_with(x, weight, config))
        output = again(poison.NAN)
        comparison = compare(output.seen, expected)
        if not comparison.within:
            verdict = judge(again, output, comparison, expected, pattern=poison.NAN)
            if verdict.kind is Kind.NOT_REPEATABLE:
                return verdict
            verdict.kind = Kind.CONFIG_DEPENDENT
            verdict.evidence |= {"config": str(config), "configs": len(configs)}
            verdict.summary = (f"wrong with the configuration {config}, one of {len(configs)} that autotuning may pick:"
                               f" {comparison.message()}")
            return verdict
    return None

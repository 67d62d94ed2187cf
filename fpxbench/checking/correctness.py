"""Does one implementation answer rightly on one case, and does it behave while it does?

Right once is not right: every call gets fresh inputs and poisoned memory, outputs are compared with the reference of
their own call and of the call before, inputs and stored weight must be untouched, and each autotuning configuration
answers for itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.checking import check
from fpxbench.checking.check import Comparison, Reference
from fpxbench.checking.poison import poisoned_memory, unwritten_elements
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.records.verdict import Kind, Status, Verdict

CALLS, CALLS_SLOW = 3, 2
ONE_HOT_COLUMNS, ONE_HOT_COLUMNS_FEW = 16, 4
"""One-hot probes of a case: columns chosen to hold as many different codes as possible. Fewer on a large weight, whose columns
are long, and of an interpreter, which takes seconds for each."""
LARGE = 1 << 21
EVERY_WEIGHT_SECONDS = 0.03
"""Beyond those columns, all others are read too, as far as this takes us: every weight of a small case."""


@dataclass
class Operands:
    """What a case works on, on its device."""

    case: Case
    device: str
    seed: int
    original: Tensor
    weight: QuantizedWeight
    decoded: Tensor

    def activation(self, call: int) -> Tensor:
        return check.make_activation(self.case, self.seed, call, self.device)

    def reference(self, x: Tensor, implementation: Implementation) -> Reference:
        return check.reference(
            x, self.decoded, quantized=scheme_named(self.case.scheme).quantized,
            activation_format=implementation.activation_format,
        )


class Misconduct(Exception):
    """A call that is wrong whatever numbers it gave."""

    def __init__(self, kind: Kind, summary: str, status: Status = Status.WRONG) -> None:
        super().__init__(summary)
        self.verdict = Verdict(status=status, kind=kind, summary=summary)


def call(implementation: Implementation, x: Tensor, weight: QuantizedWeight, device: str,
         how: Callable[[Tensor, QuantizedWeight], Tensor] | None = None) -> Tensor:
    """One product under watch: memory poisoned before, shape and dtype checked after, inputs compared with copies.

    Raises Misconduct.
    """
    x_before = x.clone()
    with untouched(weight):
        y = answer(implementation, x, weight, device, how)
        if not _same_bits(x, x_before):
            raise Misconduct(Kind.INPUT_MODIFIED, "matmul changed its activation in place")
    return y


@contextmanager
def untouched(weight: QuantizedWeight) -> Iterator[None]:
    """Raises Misconduct at the end if the stored weight was changed meanwhile."""
    stored_before = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    yield
    for name, before in stored_before.items():
        if not _same_bits(weight.tensors()[name], before):
            raise Misconduct(Kind.INPUT_MODIFIED, f"matmul changed the stored weight ({name}) in place")


def answer(implementation: Implementation, x: Tensor, weight: QuantizedWeight, device: str,
           how: Callable[[Tensor, QuantizedWeight], Tensor] | None = None) -> Tensor:
    """One product, memory poisoned before, shape and dtype checked after. Raises Misconduct."""
    m, n = x.shape[0], weight.shape[0]
    with poisoned_memory(device, m, n, x.dtype), torch.no_grad():
        y = (how or implementation.matmul)(x, weight)
        if device != "cpu":
            torch.cuda.synchronize()
    if not isinstance(y, Tensor) or tuple(y.shape) != (m, n):
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise Misconduct(Kind.WRONG_SHAPE, f"x {list(x.shape)} times a weight {list(weight.shape)} gave {got}, not [{m}, {n}]")
    if y.dtype != x.dtype:
        raise Misconduct(Kind.WRONG_DTYPE, f"an activation in {x.dtype} gave an output in {y.dtype}")
    return y


def one_hot_columns(implementation: Implementation, operands: Operands, columns: Sequence[int], *,
                    at_least: int = 0, seconds: float = math.inf) -> Iterator[tuple[list[int], Tensor]]:
    """Columns of the weight that is acted by, read with one-hot activations, as many at once as the case has rows: their numbers
    and their weights [N, C] in the activation's dtype. It ends early once `at_least` were read and the next would outlast `seconds`.
    """
    case, weight = operands.case, operands.weight
    dtype = check.ACTIVATION_DTYPES[case.activation]
    started = time.monotonic()
    with untouched(weight):
        for first in range(0, len(columns), case.m):
            elapsed = time.monotonic() - started
            if first >= at_least and first and elapsed * (1 + case.m / first) > seconds:
                break
            batch = list(columns[first:first + case.m])
            x = check.one_hot(batch, case.m, case.k, dtype, operands.device)
            yield batch, answer(implementation, x, weight, operands.device)[:len(batch)].T


def check_calls(implementation: Implementation, operands: Operands, *, first_call: int = 0, calls: int | None = None
                ) -> tuple[Comparison, Verdict | None]:
    """Fresh inputs, `calls` times, numbered from `first_call` (above 0: it was right before). The worst comparison, and the
    verdict if something was wrong (kind may be open)."""
    calls = calls or (CALLS_SLOW if implementation.slow(operands.device) else CALLS)
    worst: Comparison | None = None
    previous: Reference | None = None
    for number in range(first_call, first_call + calls):
        x = operands.activation(number)
        expected = operands.reference(x, implementation)
        y = call(implementation, x, operands.weight, operands.device)
        comparison = check.compare(y, expected)
        if worst is None or comparison.relative_error > worst.relative_error:
            worst = comparison
        if not comparison.within:
            verdict = _judge(y, comparison, previous)
            if number > 0 and verdict.kind is None:
                verdict.kind = Kind.NOT_REPEATABLE
                before = "until it was timed" if number == first_call else f"for the first {number - first_call} calls"
                verdict.summary = f"right {before}, then wrong: {comparison.sentence()}"
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
        columns = check.columns_covering_codes(weight, most)
    else:
        columns = list(range(0, case.k, max(1, case.k // most)))[:most]
    if not implementation.slow(operands.device):
        columns = list(dict.fromkeys([*columns, *range(case.k)]))
    read, seen = [], []
    for batch, weights in one_hot_columns(implementation, operands, columns, at_least=most, seconds=EVERY_WEIGHT_SECONDS):
        read += batch
        seen.append(weights)
    decoded = operands.decoded[:, torch.tensor(read, device=operands.decoded.device)].double()
    tolerance = check.one_hot_tolerance(decoded, seen[0].dtype, implementation.activation_format)
    comparison = check.compare(torch.cat(seen, dim=1), Reference(decoded, tolerance))
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
    x = operands.activation(CALLS)
    configs = list(implementation.configs(x, operands.weight))
    if len(configs) < 2:
        return None     # matmul used it
    expected = operands.reference(x, implementation)
    for config in configs:
        y = call(implementation, x, operands.weight, operands.device,
                 lambda x, weight, config=config: implementation.matmul_with(x, weight, config))
        comparison = check.compare(y, expected)
        if not comparison.within:
            verdict = _judge(y, comparison, None)
            verdict.kind = Kind.CONFIG_DEPENDENT
            verdict.evidence |= {"config": str(config), "configs": len(configs)}
            verdict.summary = f"wrong with the configuration {config}, one of {len(configs)} that autotuning may pick: {comparison.sentence()}"
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
    if previous is not None and check.compare(y, previous).within:
        return Verdict(status=Status.WRONG, kind=Kind.STALE_OUTPUT, evidence=evidence,
                       summary="gave the output of the call before")
    if not comparison.finite:
        bad = ~torch.isfinite(y)
        row, column = bad.nonzero()[0].tolist()
        evidence["nonfinite"] = int(bad.sum())
        return Verdict(status=Status.NONFINITE, evidence=evidence,
                       summary=f"{int(bad.sum())} of {y.numel()} outputs are not finite,"
                               f" the first at [{row}, {column}]: {y[row, column].item()}")
    return Verdict(status=Status.WRONG, evidence=evidence, summary=comparison.sentence())


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.itemsize == 1:
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    return torch.equal(a, b) or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

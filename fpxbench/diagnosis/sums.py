"""Diagnose sums that are wrong although single weights are right: the tail of K, a part of the output, the accumulator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpxbench.checking import contract, reference
from fpxbench.checking.examination import ranges
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.diagnosis import Diagnosis, nearness
from fpxbench.diagnosis.effective_weight import Readout, correlation
from fpxbench.implementation import Implementation
from fpxbench.records.kinds import Kind


def diagnose_sums(implementation: Implementation, operands: Operands, x: Tensor, y: Tensor,
                  expected: reference.Reference, readout: Readout | None = None) -> Diagnosis:
    """Return the fault in the sums ``y`` of x [M, K], given that every weight read out is right."""
    comparison = reference.compare(y, expected)
    weights = "" if readout is None else f"each of {readout.seen.numel()} weights read out alone is right, "
    evidence = {"relative_error": repr(comparison.relative_error), "bound": repr(comparison.bound),
                "outside": comparison.outside}
    if comparison.within:
        return Diagnosis(Kind.INACCURATE, f"{weights}and so is the product of another activation: it is wrong for some"
                                          " activations only", evidence)
    out = y.double()
    if not comparison.finite:
        small = x * 2.0**-8
        again = contract.checked_matmul(implementation, small, operands.weight, operands.device)
        if bool(again.isfinite().all()) and bool(expected.product.isfinite().all()):
            nan = bool(y.isnan().any())
            return Diagnosis(
                Kind.OVERFLOW_NAN if nan else Kind.OVERFLOW_INF,
                f"{weights}sums overflow to {'NaN' if nan else 'infinity'}: they are finite for an activation 256 times"
                " smaller, so something narrower than fp32 holds them before they are scaled",
                evidence,
            )
        return Diagnosis(
            None, f"{weights}but {int((~y.isfinite()).sum())} of {y.numel()} sums are not finite", evidence
        )
    wrong = (out - expected.product).abs() > expected.tolerance
    top = out.abs().max()
    stopped = out.abs() == top
    if int(wrong.sum()) > 1 and bool((stopped | ~wrong).all()) and bool((expected.product.abs() >= top)[wrong].all()):
        return Diagnosis(Kind.SATURATED, f"{weights}but outputs stop at ±{float(top):g}, where right ones reach"
                                         f" {float(expected.product.abs().max()):g}", evidence)
    run = wrong_run_of_columns(implementation, operands)
    likeness = correlation(out, expected.product)
    kind = nearness(likeness)
    evidence["correlation"] = repr(likeness)
    if run is not None:
        message, found = run
        return Diagnosis(kind, message, evidence | found)
    part = wrong_part(y, expected)
    if part:
        return Diagnosis(kind, f"{weights}but sums are wrong in {part}", evidence)
    return Diagnosis(
        kind,
        f"{weights}but their sums are off by {comparison.relative_error:.2g} where at most {comparison.bound:.2g} is "
        "right, as when they are accumulated in less than fp32",
        evidence,
    )


def wrong_run_of_columns(implementation: Implementation, operands: Operands) -> tuple[str, dict[str, Any]] | None:
    """Return the single run of wrong weight columns, found with activations that are zero outside a range.

    None if there is no single run, or if it is longer than half of K.
    """
    k = operands.case.k
    fresh = operands.activation("run of columns").sign()   # so that no column has a small activation

    def answer(first: int, last: int) -> tuple[Tensor, reference.Reference]:
        x = torch.zeros_like(fresh)
        x[:, first:last] = fresh[:, first:last]
        return contract.checked_matmul(implementation, x, operands.weight, operands.device), operands.reference(
            x, implementation
        )

    def right(first: int, last: int) -> bool:
        return first >= last or reference.compare(*answer(first, last)).within

    if right(0, k) or not (right(0, k // 2) or right(k // 2, k)):
        return None
    first = _last_true(0, k, lambda end: right(0, end))
    last = k - _last_true(0, k - first, lambda length: right(k - length, k))
    if not first < last or last - first > k // 2 or not (right(0, first) and right(last, k)):
        return None
    y, expected = answer(first, last)
    out = y.double()
    if not bool(out.any()):
        what = "are ignored"
    elif bool(((out - 2 * expected.product).abs() <= 2 * expected.tolerance).all()):
        what = "are counted twice"
    else:
        what = "are misread"
    tail = last == k
    where = f", the tail of K = {k}" if tail else f" of K = {k}"
    return (f"weight columns {first} to {last - 1}{where}, {what}; all others are right",
            {"first_column": first, "last_column": last - 1, "columns": what})


def _last_true(low: int, high: int, holds: Any) -> int:
    """Return the largest number in [low, high] for which the monotone predicate `holds`; `low` if none."""
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low


def wrong_part(y: Tensor, expected: reference.Reference) -> str | None:
    """Return the output rows or columns that contain every wrong output, if they are at most half; else None."""
    wrong = ~((y.double() - expected.product).abs() <= expected.tolerance)
    for axis, name in ((1, "output row"), (0, "output column")):
        touched = wrong.any(dim=axis).nonzero().reshape(-1).tolist()
        size = wrong.shape[1 - axis]
        if touched and 2 * len(touched) <= size:
            return counted(name, touched, size) + (", all of it zero" if not bool(y[wrong].any()) else "")
    return None


def counted(name: str, numbers: list[int], size: int) -> str:
    return f"{name}{'' if len(numbers) == 1 else 's'} {ranges(numbers, 4)} of {size}"

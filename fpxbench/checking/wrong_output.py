"""Find out why an output is outside its tolerance, with further calls on the same operands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpxbench.checking import poison
from fpxbench.checking.contract import Output
from fpxbench.checking.reference import Comparison, Reference, compare
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

_LATE_S = 0.02
"""How long to wait for an output from another thread or stream before calling it wrong."""
_THREADS_S = 1.0
"""How long to wait for running Python threads, which may not have begun on a busy machine."""

Again = Callable[[int], Output]
"""Repeats the call in memory filled with the given pattern."""


def judge(again: Again, output: Output, comparison: Comparison, expected: Reference, *, pattern: int,
          previous: Reference | None = None) -> Verdict:
    """Return the verdict on a wrong `output` [M, N]; its kind is None if the output alone does not show it.

    `previous` is the previous call's reference. Raise ContractViolation if the output changes after its return.
    """
    y = output.seen
    evidence = comparison_evidence(comparison)
    _wait_for_late_writes()
    output.check_unchanged()
    if previous is not None and previous.product.shape == y.shape and compare(y, previous).within:
        return Verdict(status=Status.WRONG, kind=Kind.STALE_OUTPUT, evidence=evidence,
                       summary="gave the output of the call before")
    memory = _depends_on_memory(again, output, expected, pattern, evidence)
    if memory is not None:
        return memory
    if not comparison.finite:
        bad = ~torch.isfinite(y)
        row, column = bad.nonzero()[0].tolist()
        evidence["nonfinite"] = int(bad.sum())
        return Verdict(status=Status.NONFINITE, evidence=evidence,
                       summary=f"{int(bad.sum())} of {y.numel()} outputs are not finite,"
                               f" the first at [{row}, {column}]: {y[row, column].item()}")
    return Verdict(status=Status.WRONG, evidence=evidence, summary=comparison.message())


def _wait_for_late_writes() -> None:
    deadline = time.monotonic() + _THREADS_S
    for thread in threading.enumerate():
        if thread not in (threading.current_thread(), threading.main_thread()) and not thread.daemon:
            thread.join(max(0.0, deadline - time.monotonic()))
    time.sleep(_LATE_S)


def _depends_on_memory(
    again: Again, output: Output, expected: Reference, pattern: int, evidence: dict[str, Any]
) -> Verdict | None:
    """Return the verdict on unwritten outputs, and on outputs that depend on the contents of fresh memory; else
    None."""
    y = output.seen
    other = next(each for each in poison.PATTERNS if each != pattern)
    held = poison.holds_pattern(y, pattern)
    if bool(held.any()):
        held &= poison.holds_pattern(again(other).seen, other)
        if unwritten := int(held.sum()):
            return _unwritten(unwritten, output, evidence)
    if not compare(again(poison.ZERO).seen, expected).within:
        return _depends_on_its_own_memory(again, output, expected, evidence)
    if compare(again(pattern).seen, expected).within:
        return Verdict(
            status=Status.WRONG, kind=Kind.NOT_REPEATABLE, evidence=evidence,
            summary=f"wrong once, and right when asked again with the same operands: {_extent(output, expected)}")
    return _reads_unwritten(pattern, output, expected, evidence)


def _depends_on_its_own_memory(
    again: Again, output: Output, expected: Reference, evidence: dict[str, Any]
) -> Verdict | None:
    """Return the verdict on an output that depends on memory that the call itself freed and allocated again, as from a
    GPU's caching allocator; else None."""
    def filled(pattern: int) -> Tensor:
        with poison.filled_allocations(pattern):
            return again(pattern).seen

    outputs = {pattern: filled(pattern) for pattern in poison.PATTERNS}
    unwritten = torch.stack([poison.holds_pattern(y, pattern) for pattern, y in outputs.items()]).all(dim=0)
    if bool(unwritten.any()):
        return _unwritten(int(unwritten.sum()), output, evidence)
    if not compare(filled(poison.ZERO), expected).within:
        return None
    wrong = next((pattern for pattern, y in outputs.items() if not compare(y, expected).within), None)
    return None if wrong is None else _reads_unwritten(wrong, output, expected, evidence)


def _unwritten(count: int, output: Output, evidence: dict[str, Any]) -> Verdict:
    return Verdict(status=Status.WRONG, kind=Kind.UNWRITTEN_OUTPUT, evidence=evidence | {"unwritten": count},
                   summary=f"{count} of {output.seen.numel()} output elements were never written")


def _reads_unwritten(pattern: int, output: Output, expected: Reference, evidence: dict[str, Any]) -> Verdict:
    return Verdict(
        status=Status.WRONG, kind=Kind.READS_UNWRITTEN, evidence=evidence | {"pattern": poison.pattern_name(pattern)},
        summary="reads memory that was never written (padding, say): right where new memory holds zeros, wrong where it"
                f" holds {poison.pattern_name(pattern)}: {_extent(output, expected)}")


def _extent(output: Output, expected: Reference) -> str:
    comparison = compare(output.seen, expected)
    if comparison.finite:
        return comparison.message()
    return f"{int((~output.seen.isfinite()).sum())} of {output.seen.numel()} outputs are not finite"


def comparison_evidence(comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as evidence of a verdict."""
    return {"relative_error": repr(comparison.relative_error), "bound": repr(comparison.bound),
            "outside": comparison.outside, "worst_at": list(comparison.worst_at),
            "worst_value": repr(comparison.worst_value), "worst_expected": repr(comparison.worst_expected)}

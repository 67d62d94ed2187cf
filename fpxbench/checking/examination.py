"""Collect a case's checks: what they covered, what was left out and why, and the properties that were measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from fpxbench.checking.contract import ContractViolation, checked_matmul
from fpxbench.checking.error_statistic import ErrorStatistic
from fpxbench.checking.operands import Operands
from fpxbench.counted import counted
from fpxbench.implementation import Implementation
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

DEFAULT_BUDGET_S = 0.1
_WALL_MULTIPLE = 10.0
"""A deadline in processor time also passes after this many times as long in wall-clock time, which limits waiting."""
CLEARLY = 1.5
"""Least ratio of the errors of wrong token counts to those of right ones."""
_FIRST_CALL_MULTIPLE = 2.0
"""A shape's first call that takes longer than this many budgets compiles or tunes, as it would for each new shape."""
_LOADING_MULTIPLE = 10.0
"""A process's first call that takes up to this many times as long may only have loaded libraries."""


class Deadline:
    """A deadline in this thread's processor time, so that a busy machine, or being stopped while another case is timed,
    does not reduce the checks. Waiting for a GPU counts, since it takes processor time."""

    def __init__(self, seconds: float) -> None:
        self._end, self._wall_end = time.thread_time() + seconds, time.monotonic() + _WALL_MULTIPLE * seconds

    def passed(self, more: float = 0.0) -> bool:
        """Return whether the deadline, extended by `more` seconds, has passed."""
        return time.thread_time() > self._end + more or time.monotonic() > self._wall_end + _WALL_MULTIPLE * more


@dataclass
class Examination:
    """The examination of one implementation on one case.

    budget_s : total seconds for checks beyond the case's own calls
    covered, not_asked : check -> what it covered, and why the rest was left out
    properties : measured properties for the record (`fpxbench.records.record.Properties`)
    first_call_s : duration of the first call, including compilation and tuning
    """

    implementation: Implementation
    operands: Operands
    budget_s: float = DEFAULT_BUDGET_S
    covered: dict[str, str] = field(default_factory=dict)
    not_asked: dict[str, str] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    statistic: ErrorStatistic = field(default_factory=ErrorStatistic)
    by_tokens: dict[int, ErrorStatistic] = field(default_factory=dict)
    """Separate statistics by token count: outputs of the same tokens are not independent."""
    first_call_s: float = 0.0
    diagnose: Callable[[Verdict, Operands], Verdict] = lambda verdict, operands: verdict
    """Diagnoses a wrong product on operands other than the case's own, if possible."""

    @property
    def device(self) -> str:
        return self.operands.device

    def statistic_verdict(self) -> Verdict | None:
        """Return the verdict if errors are larger than their roundings explain, with the token counts; else None."""
        verdict = self.statistic.verdict()
        wrong = {m: one for m, one in self.by_tokens.items() if one.factor > one.threshold}
        right = {m: one for m, one in self.by_tokens.items() if m not in wrong}
        if not wrong or not right or CLEARLY * max(one.factor for one in right.values()) > min(
                one.factor for one in wrong.values()):
            return verdict
        factor = max(one.factor for one in wrong.values())
        return Verdict(
            status=Status.WRONG, kind=Kind.M_DEPENDENT,
            evidence={"error_factor": repr(factor), "wrong_m": sorted(wrong), "right_m": sorted(right)},
            summary=f"wrong for M = {ranges(wrong)}, right for M = {ranges(right)}: each output is within its"
                    f" worst-case bound, but together the errors of the former are up to {factor:.3g} times what their"
                    " roundings allow")

    def new_shapes_cost_too_much(self, name: str) -> bool:
        """Return whether a new shape takes longer than the budget allows; if so, note why check `name` is left out."""
        if self.implementation.slow(self.device):
            self.not_asked[name] = "an interpreter takes too long"
        elif (took := self.new_shape_s) > _FIRST_CALL_MULTIPLE * self.budget_s:
            self.not_asked[name] = (f"a first call takes {took:.2g} s, and this profile has {self.budget_s:.2g} s for"
                                    " other shapes")
        return name in self.not_asked

    @cached_property
    def new_shape_s(self) -> float:
        """Duration of a shape's first call, in seconds. The process's first call also loads libraries, so if it was
        slow, but not so slow that it must have compiled, a call with one more token is timed."""
        limit = _FIRST_CALL_MULTIPLE * self.budget_s
        if not limit < self.first_call_s <= _LOADING_MULTIPLE * limit or self.operands.case.experts is not None:
            return self.first_call_s
        x = self.operands.activation("another shape", self.operands.case.m + 1)
        started = time.perf_counter()
        try:
            checked_matmul(self.implementation, x, self.operands.weight, self.device)
        except Exception as error:
            if not is_refusal(error):
                raise
            return self.first_call_s
        return time.perf_counter() - started

    def deadline(self, share: float) -> Deadline:
        """Return the deadline of a check with a `share` of the budget."""
        return Deadline(share * self.budget_s)

    def ask(self, name: str, check: Callable[[], Verdict | None]) -> tuple[bool, Verdict | None]:
        """Run a check whose calls an implementation may refuse; return whether it accepted them, and the verdict.

        A refusal (an exception) is noted, and is not a fault. ContractViolation and device faults are raised.
        """
        try:
            return True, check()
        except Exception as error:
            if not is_refusal(error):
                raise
            self.not_asked[name] = f"refused: {in_a_line(error)}"
            return False, None


def in_a_line(error: Exception) -> str:
    """Return an exception's type and the first line of its message, shortened."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"


def is_refusal(error: Exception) -> bool:
    """Return whether an exception only means that a call is unsupported. It does not if it is a ContractViolation, or
    if the CUDA context is lost, after which no result of this process can be trusted."""
    accelerator_error = getattr(torch, "AcceleratorError", ())
    lost = isinstance(error, accelerator_error) or "CUDA error" in str(error) or "HIP error" in str(error)
    return not lost and not isinstance(error, ContractViolation)


def ranges(numbers: Iterable[int], most: int = 8) -> str:
    """Return numbers as runs: ``1 to 4, 8, 16 to 17``; at most `most` of them."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs[:most])
    return text + (f" and {counted(len(runs) - most, 'more run')}" if len(runs) > most else "")

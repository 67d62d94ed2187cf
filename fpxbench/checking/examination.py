"""Collect what a case was asked, what was left out and why, and which properties were measured on the way."""

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
"""A deadline in processor time passes after so many times as long by the clock on the wall: what waits is not free."""
CLEARLY = 1.5
"""Errors of wrong token counts are at least so many times those of right ones."""
_FIRST_CALL_MULTIPLE = 2.0
"""A first call of a shape that takes longer than this many budgets compiles or tunes, and would for each new shape."""
_LOADING_MULTIPLE = 10.0
"""A first call of a process that takes up to so many times as long may only have loaded libraries."""


class Deadline:
    """An end in this thread's own processor time, so that a busy machine asks no less, nor a process that stands still
    while another is timed. Waiting for a GPU takes processor time."""

    def __init__(self, seconds: float) -> None:
        self._end, self._wall_end = time.thread_time() + seconds, time.monotonic() + _WALL_MULTIPLE * seconds

    def passed(self, more: float = 0.0) -> bool:
        """Return whether it has passed, by `more` seconds."""
        return time.thread_time() > self._end + more or time.monotonic() > self._wall_end + _WALL_MULTIPLE * more


@dataclass
class Examination:
    """One implementation on one case, while it is checked.

    budget_s : seconds for all checks that go beyond the case's own calls together
    covered, not_asked : for each check by name, what it covered, and why the rest was left out
    properties : measured facts for the record (`fpxbench.records.record.Properties`)
    first_call_s : how long the first call took, compiling and tuning included
    """

    implementation: Implementation
    operands: Operands
    budget_s: float = DEFAULT_BUDGET_S
    covered: dict[str, str] = field(default_factory=dict)
    not_asked: dict[str, str] = field(default_factory=dict)
    properties: dict[str, Any] = field(default_factory=dict)
    statistic: ErrorStatistic = field(default_factory=ErrorStatistic)
    by_tokens: dict[int, ErrorStatistic] = field(default_factory=dict)
    """Of each token count apart: outputs of the same tokens are not independent, and not counted together."""
    first_call_s: float = 0.0
    diagnose: Callable[[Verdict, Operands], Verdict] = lambda verdict, operands: verdict
    """Name the fault of a wrong product on other operands than the case's own, where that can be done."""

    @property
    def device(self) -> str:
        return self.operands.device

    def statistic_verdict(self) -> Verdict | None:
        """Return the verdict where errors are larger than their roundings explain, and for which token counts."""
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
        """Return whether a new shape takes longer than the budget allows, noting why check `name` is left out."""
        if self.implementation.slow(self.device):
            self.not_asked[name] = "an interpreter takes too long"
        elif (took := self.new_shape_s) > _FIRST_CALL_MULTIPLE * self.budget_s:
            self.not_asked[name] = (f"a first call takes {took:.2g} s, and this profile has {self.budget_s:.2g} s for"
                                    " other shapes")
        return name in self.not_asked

    @cached_property
    def new_shape_s(self) -> float:
        """The seconds that the first call of a shape takes. The first one of a process loads libraries as well, so
        where it took long, and not so long that it must have compiled, one token more is asked."""
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
        """Return the end of a check that has `share` of the budget."""
        return Deadline(share * self.budget_s)

    def ask(self, name: str, check: Callable[[], Verdict | None]) -> tuple[bool, Verdict | None]:
        """Run one check of calls that an implementation may refuse; return whether it took them, and the verdict.

        A refusal (an exception) is noted and is not a mistake. ContractViolation and faults of the device are raised.
        """
        try:
            return True, check()
        except Exception as error:
            if not is_refusal(error):
                raise
            self.not_asked[name] = f"refused: {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
            return False, None


def is_refusal(error: Exception) -> bool:
    """Return whether an exception only refuses the call. A ContractViolation does not, nor does the loss of the CUDA
    context, after which no result of this process can be trusted."""
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

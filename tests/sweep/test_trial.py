"""One case, from request to result, in this process."""

from __future__ import annotations

import pytest
from small_implementations import Right

from fpxbench.checking import inputs
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial

pytestmark = pytest.mark.usefixtures("one_thread")


def request(n: int = 64, k: int = 104, **fields: object) -> TrialRequest:
    case = Case(implementation="right", scheme="e4m3fn-row", workload="small", m=2, n=n, k=k)
    return TrialRequest(case=case, seed=1, timing_budget_s=0.01, cache_bytes=4096, **fields)


def test_no_two_checked_calls_share_an_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result remembered for the timed activation must not pass as an answer to a checked one, nor to the
    diagnosis."""

    class WrongOnceTimed(Right):
        calls = 0

        def matmul(self, x, weight):
            self.calls += 1
            return super().matmul(x, weight) * (1 if (("after timing", 0), 2, 104) not in made else 3)

    made: list[object] = []
    original = inputs.make_activation

    def recorded(case, seed, purpose, device="cpu"):
        made.append((purpose, case.m, case.k))
        return original(case, seed, purpose, device)

    monkeypatch.setattr(inputs, "make_activation", recorded)
    assert diagnosed_trial(WrongOnceTimed(), request()).kind is Kind.NOT_REPEATABLE
    own = [purpose for purpose, m, k in made if (m, k) == (2, 104)]
    assert {0, "timing", "timing, again", ("after timing", 0)} <= set(own)
    # Observed for its kernels; judged by asking again; made anew for the reference of what was timed.
    again = {0, ("after timing", 0), "timing"}
    assert len([purpose for purpose in own if purpose not in again]) == len(set(own) - again)
    activations = [original(request().case, 1, purpose) for purpose in dict.fromkeys(own)]
    assert not any(a.equal(b) for i, a in enumerate(activations) for b in activations[:i])

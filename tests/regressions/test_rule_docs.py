"""docs/decision-rule.md states the numbers that the code uses."""

from __future__ import annotations

import pytest
from places import DOCS

from fpxbench.regressions import bisect, compare, confirm, decision_rule, events
from fpxbench.stats import fewest_pairs

PAGE = " ".join((DOCS / "decision-rule.md").read_text(encoding="utf-8").split())

STATED = [
    f"take the {decision_rule.BEFORE} builds before *b*",
    f"and at least {decision_rule.LEAST_BEFORE}.",
    f"at least {decision_rule.LEAST_NOISE:.1%}",
    f"further than **{decision_rule.CLIP}** σ₀",
    f"fewer than **{decision_rule.LEAST_FREEDOM}** degrees",
    f"**{', '.join(map(str, decision_rule.AFTER))}** builds",
    f"at **{decision_rule.CHANCE:.2%}** on one side",
    f"and must be **{decision_rule.LEAST_CHANGE:.0%}** or more",
    f"up to **{decision_rule.HISTORY}** builds before",
    f"With **{decision_rule.LEAST_HISTORY}** or more of them",
    f"by **{decision_rule.CONTROL:.0f}** standard errors or more",
    f"{events.SQNR_DB} dB for the same seed",
    f"a factor of e^{events.RELATIVE_ERROR:.2f}",
    f"more than {events.PEAK_BYTES:.0%}",
    f"within the {events.RECENT} builds before",
    f"where there are {events.LEAST_HISTORY} or more",
    f"level of {confirm.LEVEL:.2%}",
    f"**{fewest_pairs(confirm.LEVEL)} pairs** at least",
    f"at least {confirm.LEAST_CHANGE:.0%}",
    f"then every {confirm.PAIRS_BETWEEN_LOOKS}:",
    f"**{confirm.MOST_PAIRS} pairs** or the budget ({confirm.BUDGET_S / 60:.0f} minutes",
    f"{confirm.RUNS_OF_A_VERDICT} runs on each side",
    f"at most {confirm.CHANCE_OF_COUNTS:.0%} where both",
    f"to {confirm.MOST_RUNS_OF_A_VERDICT} runs on each side",
    f"run {bisect.RUNS_AT_THE_ENDS} times each",
    f"probability of at most {bisect.MISSED:.0%}, where",
    f"At most {bisect.MOST_RUNS}.",
    f"the {bisect.LEVEL:.0%} interval excludes the middle ({fewest_pairs(bisect.LEVEL)} pairs",
    f"at most {bisect.MOST_PAIRS} pairs",
    f"the {compare.LEVEL:.0%} bootstrap interval",
    f"widened by {compare.NOISE:.0%} on both",
]


@pytest.mark.parametrize("stated", STATED)
def test_the_page_states_the_constant(stated: str) -> None:
    assert stated in PAGE

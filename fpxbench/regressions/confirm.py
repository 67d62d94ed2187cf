"""Confirm a suspected change: run both builds, interleaved, in new processes, on one machine.

docs/decision-rule.md, "Confirmation", describes the rule. The caller passes `measure`, which runs one of the builds.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from fpxbench.records.case import Case
from fpxbench.records.record import Record, Timing
from fpxbench.records.verdict import Status
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome, ConfirmationRun, Interval, Metric, Side
from fpxbench.stats import Ratio, chance_of_counts, fewest_pairs, ratio_of_pairs

LEVEL = 0.9999
"""Level of the interval. It is tested several times, and a case is suspected without cause about once a year: at 0.999,
two of 1,000 such cases would be confirmed by chance; at this level, 0.3 (docs/decision-rule.md)."""
LEAST_CHANGE = 0.01
"""The smallest change in time that counts, as a logarithm."""
PAIRS_BETWEEN_LOOKS = 3
MOST_PAIRS = 40
RUNS_OF_A_VERDICT = 5
"""Initial runs per build; more if their verdicts differ."""
MOST_RUNS_OF_A_VERDICT = 20
CHANCE_OF_COUNTS = 0.01
BUDGET_S = 1800.0

Measure = Callable[[Side, int], Record]
"""(side, seed) -> record of one run of the case on that side's build, in a new process."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Question:
    """The suspected change."""

    case: Case
    metric: Metric
    """What to test; a case that is not timed is tested by verdict even for ``time``."""
    suspect: str | None = None
    size: float | None = None
    """The suspected change in time, as a logarithm; its sign is the direction. None: any, in either direction."""
    machine: str | None = None
    variant: str | None = None
    """The machine and the variant of the builds on which it was seen."""

    @property
    def least(self) -> float:
        """The smallest change to confirm: half of the suspected one, and at least `LEAST_CHANGE`."""
        return max(LEAST_CHANGE, abs(self.size or 0.0) / 2)


@dataclass
class _Runs:
    """The runs so far, in order, and the deadline for more."""

    measure: Measure
    deadline: float
    records: list[tuple[Side, Record]] = field(default_factory=list)

    def pair(self, number: int) -> None:
        """Run both builds on the same inputs, in alternating order (A B B A …), so that drift cancels."""
        sides: tuple[Side, Side] = ("good", "bad") if number % 2 == 0 else ("bad", "good")
        for side in sides:
            self.records.append((side, self.measure(side, _SEED + number)))

    def of(self, side: Side) -> list[Record]:
        return [record for each, record in self.records if each == side]

    @property
    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() >= self.deadline


_SEED = 1_000_000
"""First seed of every confirmation; no sweep uses it."""


def confirm(question: Question, measure: Measure, *, level: float = LEVEL, budget_s: float = BUDGET_S,
            say: Say = lambda line: None) -> Confirmation:
    """Run both builds, interleaved, until the outcome is clear or the budget is spent.

    If a case suspected for its time fails on a build, verdicts are compared instead. Raise what `measure` raises.
    """
    started = time.monotonic()
    runs = _Runs(measure, started + budget_s)
    answer = _times(question, runs, level, say) if question.metric == "time" else None
    if answer is None:
        answer = _verdicts(question, runs, say)
    bad = runs.of("bad")
    failing = next((record.verdict for record in reversed(bad) if record.verdict.status is not Status.OK), None)
    return Confirmation(
        suspect=question.suspect, case=question.case, machine=bad[-1].machine, good=runs.of("good")[-1].build,
        build=bad[-1].build, evidence=failing, good_counts=_counts(runs.of("good")), bad_counts=_counts(bad),
        runs=[_run(side, record) for side, record in runs.records], elapsed_s=round(time.monotonic() - started, 1),
        **answer,
    )


# ---- times


def _times(question: Question, runs: _Runs, level: float, say: Say) -> dict[str, object] | None:
    """Return the answer by times; None as soon as a run is not timed."""
    number, next_look = 0, fewest_pairs(level)
    while True:
        runs.pair(number)
        number += 1
        good, bad = ([record.timing for record in runs.of(side) if record.timing] for side in ("good", "bad"))
        if len(good) + len(bad) < len(runs.records):
            return None
        ratio, control = _ratios(good, bad, level)
        outcome = decided(ratio, question)
        say(f"pair {number}: {ratio}; the dense product {control or 'was not timed'}")
        if number >= next_look:
            if outcome is not None:
                return _answer(outcome, ratio, control, question)
            next_look += PAIRS_BETWEEN_LOOKS
        if number >= MOST_PAIRS or runs.out_of_time:
            return _answer(ConfirmationOutcome.UNDECIDED, ratio, control, question)


def decided(ratio: Ratio, question: Question) -> ConfirmationOutcome | None:
    """Return the outcome that the interval decides, or None if it is not clear yet.

    Confirmed: the whole interval lies on the suspected side, and the estimate is at least `question.least`. Refuted:
    the whole interval lies below that.
    """
    if not ratio.known:
        return None
    low, value, high = math.log(ratio.low), math.log(ratio.value), math.log(ratio.high)
    if question.size is None:
        sides = [(low, value, high), (-high, -value, -low)]
    else:
        sides = [(low, value, high)] if question.size > 0 else [(-high, -value, -low)]
    if any(low > 0 and value >= question.least for low, value, _ in sides):
        return ConfirmationOutcome.CONFIRMED
    if all(high < question.least for _, _, high in sides):
        return ConfirmationOutcome.REFUTED
    return None


def _ratios(good: list[Timing], bad: list[Timing], level: float) -> tuple[Ratio, Ratio | None]:
    """Return the ratio of the case's times, and of the dense product's; None if that was not timed."""
    ratio = ratio_of_pairs([timing.median_us for timing in bad], [timing.median_us for timing in good], level)
    new, old = ([timing.baseline_us for timing in side if timing.baseline_us is not None] for side in (bad, good))
    return ratio, ratio_of_pairs(new, old, level) if len(new) == len(bad) and len(old) == len(good) else None


def _answer(outcome: ConfirmationOutcome, ratio: Ratio, control: Ratio | None, question: Question) -> dict[str, object]:
    message = str(ratio)
    confirmed = ConfirmationOutcome.CONFIRMED
    if outcome is confirmed and control is not None and decided(control, question) is confirmed:
        message += f"; the dense product changed too, {control}: not only this implementation is affected"
    return {"metric": "time", "outcome": outcome, "message": message, "time": Interval.of(ratio),
            "control": Interval.of(control) if control else None, "least": question.least}


# ---- verdicts


def _verdicts(question: Question, runs: _Runs, say: Say) -> dict[str, object]:
    """Return the answer by verdicts: some runs per side, more if one side's verdicts differ."""
    number = len(runs.records) // 2
    enough = RUNS_OF_A_VERDICT
    while number < enough and not (number and runs.out_of_time):
        runs.pair(number)
        number += 1
        good, bad = (_counts(runs.of(side)) for side in ("good", "bad"))
        say(f"run {number} of each: {_described(good)} before, {_described(bad)} since")
        if len(good) > 1 or len(bad) > 1:
            # Tested after each run, so the threshold for stopping early is ten times stricter.
            enough = number if _told_apart(good, bad, number)[2] <= CHANCE_OF_COUNTS / 10 else MOST_RUNS_OF_A_VERDICT
    good, bad = (_counts(runs.of(side)) for side in ("good", "bad"))
    failed, outcome, chance = _told_apart(good, bad, number)
    not_answered = good.keys() == {Status.MISSING} or question.metric == "time" and good.keys() != {Status.OK}
    if outcome is ConfirmationOutcome.REFUTED and not_answered:     # it cannot be run here, or has no times
        outcome = ConfirmationOutcome.UNDECIDED
    flaky = len(good) > 1 or len(bad) > 1
    message = f"{_described(bad)} on the later build, {_described(good)} on the earlier"
    if flaky:
        message += f"; flaky: {failed} in {bad.get(failed, 0)} of {number}"
        message += f" and in {good.get(failed, 0)} of {number} runs"
    if good == bad:
        message = f"{_described(bad)} on both"
    return {"metric": "verdict", "outcome": outcome, "message": message, "chance": chance, "flaky": flaky}


def _told_apart(good: dict[str, int], bad: dict[str, int], runs: int) -> tuple[str, ConfirmationOutcome, float]:
    """Return the verdict that differs most between the builds, the outcome, and the probability of such counts if the
    builds do not differ."""
    # Sorted so that the failure is named if ok on one side and crash on the other have the same probability.
    names = sorted(good.keys() | bad.keys(), key=lambda name: name == "ok")
    chances = {name: min(chance_of_counts(good.get(name, 0), runs, bad.get(name, 0), runs),
                         chance_of_counts(bad.get(name, 0), runs, good.get(name, 0), runs)) for name in names}
    best = min(names, key=lambda name: round(chances[name], 12))     # ignores rounding errors
    if chances[best] <= CHANCE_OF_COUNTS:
        return best, ConfirmationOutcome.CONFIRMED, chances[best]
    alike = runs >= RUNS_OF_A_VERDICT and len(good) == 1 and good == bad
    return best, ConfirmationOutcome.REFUTED if alike else ConfirmationOutcome.UNDECIDED, chances[best]


def _counts(records: list[Record]) -> dict[str, int]:
    """Return headline, such as ``crash (compiler_abort)`` -> number of runs, most frequent first."""
    return dict(Counter(record.verdict.headline for record in records).most_common())


def _described(counts: dict[str, int]) -> str:
    runs = sum(counts.values())
    return ", ".join(f"{name} in {count} of {runs} runs" for name, count in counts.items())


def _run(side: Side, record: Record) -> ConfirmationRun:
    timing = record.timing
    return ConfirmationRun(side=side, status=record.verdict.status, kind=record.verdict.kind, seed=record.seed,
                           median_us=timing and timing.median_us, baseline_us=timing and timing.baseline_us)

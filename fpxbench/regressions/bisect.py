"""Find the first bad build between a good one and a bad one, by time or by verdict.

Like `git bisect`, over builds: each build tried rules out half of the rest. A build that does not install, or has
neither the good nor the bad build's verdict, is skipped; the result lists skipped builds that may be the first bad one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fpxbench.records.case import Case
from fpxbench.records.record import Build, Record
from fpxbench.regressions.confirmation import upstream_range
from fpxbench.stats import Ratio, fewest_pairs, percent, ratio_of_pairs

LEVEL = 0.95
"""Level of the interval that decides whether a build's time is good or bad."""
MOST_PAIRS = 24
PAIRS_BETWEEN_LOOKS = 2
RUNS_AT_THE_ENDS = 3
"""Runs of the good and of the bad build, to estimate how often the bad one fails."""
MISSED = 0.01
"""Largest probability of calling a build good that fails as often as the bad one."""
MOST_RUNS = 30

By = Literal["time", "verdict"]
Measure = Callable[[int, int], Record]
"""(build number, seed) -> record of one run in a new process. Raise Skipped for a build that cannot be run."""
Say = Callable[[str], None]


class Skipped(Exception):
    """This build cannot be judged; the message gives the reason."""


class NoDifference(ValueError):
    """The good and the bad build do not differ, so there is nothing to bisect."""


class Call(StrEnum):
    """The verdict on a build that was tried."""

    GOOD = "good"
    BAD = "bad"
    SKIPPED = "skipped"


class BisectStep(BaseModel):
    """A build that was tried, with the result."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    tag: str
    call: Call
    message: str = Field(alias="said")


class Bisection(BaseModel):
    """The first bad build, and the steps that found it."""

    model_config = ConfigDict(frozen=True)

    case: Case
    by: By
    last_good: Build
    first_bad: Build
    last_good_tag: str
    first_bad_tag: str
    maybe: list[str] = []
    """Skipped builds between these two, which may include the first bad one."""
    steps: list[BisectStep]

    @property
    def upstream(self) -> str | None:
        return upstream_range(self.last_good, self.first_bad)


def bisect(case: Case, builds: Sequence[Build], tags: Sequence[str], by: By | None, measure: Measure,
           say: Say = lambda line: None) -> Bisection:
    """Return the first bad build. `builds` are in order; the first is good and the last bad.

    `by` None: by verdict if the verdicts of these two differ, else by time. Raise NoDifference if they differ in
    neither, and Skipped if one of them cannot be run.
    """
    last = len(builds) - 1
    seen: dict[int, Build] = {}     # an installed build knows its upstream commit; the timeline may not

    def remembered(number: int, seed: int) -> Record:
        record = measure(number, seed)
        seen[number] = record.build
        return record

    good, bad = ([remembered(end, seed) for seed in range(RUNS_AT_THE_ENDS)] for end in (0, last))
    by = by or ("verdict" if _headlines(good) != _headlines(bad) else "time")
    judge = _by_verdict(good, bad, remembered) if by == "verdict" else _by_time(remembered, last)
    steps: list[BisectStep] = []

    def ask(number: int) -> Call:
        try:
            call, message = judge(number)
        except Skipped as skipped:
            call, message = Call.SKIPPED, str(skipped)
        steps.append(BisectStep(tag=tags[number], call=call, message=message))
        say(f"{tags[number]}: {call}: {message}")
        return call

    below, above, skipped = first_bad(last, ask)
    return Bisection(
        case=case, by=by, last_good=seen.get(below, builds[below]), first_bad=seen.get(above, builds[above]),
        last_good_tag=tags[below], first_bad_tag=tags[above], maybe=[tags[number] for number in skipped], steps=steps,
    )


def first_bad(last: int, ask: Callable[[int], Call]) -> tuple[int, int, list[int]]:
    """Return the last good number, the first bad one and the skipped ones between; 0 is good and `last` is bad."""
    good, bad = 0, last
    skipped: set[int] = set()
    while left := [number for number in range(good + 1, bad) if number not in skipped]:
        middle = (good + bad) / 2
        number = min(left, key=lambda number: abs(number - middle))
        call = ask(number)
        if call is Call.GOOD:
            good = number
        elif call is Call.BAD:
            bad = number
        else:
            skipped.add(number)
    return good, bad, sorted(number for number in skipped if good < number < bad)


Judge = Callable[[int], tuple[Call, str]]


def _by_verdict(good: list[Record], bad: list[Record], measure: Measure) -> Judge:
    """Judge by verdict: one failure like the bad build's is bad; good needs enough runs for `MISSED`."""
    right = _headlines(good)
    wrong = _headlines(bad) - right
    if not wrong:
        raise NoDifference(f"the good and the bad build are both {' or '.join(sorted(right))}, in {len(bad)} runs "
                           "each: there is no difference in verdicts to bisect")
    often = sum(record.verdict.headline in wrong for record in bad)
    # Laplace's rule of succession: three failures in three runs do not prove that it always fails.
    rate = (often + 1) / (len(bad) + 2)
    runs = min(MOST_RUNS, math.ceil(math.log(MISSED) / math.log(1 - rate)))

    def judge(number: int) -> tuple[Call, str]:
        for run in range(1, runs + 1):
            headline = measure(number, RUNS_AT_THE_ENDS + run).verdict.headline
            if headline in wrong:
                return Call.BAD, f"{headline} in run {run}"
            if headline not in right:
                return Call.SKIPPED, f"{headline}, neither the good nor the bad build's verdict"
        return Call.GOOD, f"{headline} in all of {runs} runs"

    return judge


def _by_time(measure: Measure, last: int) -> Judge:
    """Judge by time, interleaved with the good build: bad is more than half way from the good to the bad build."""
    whole = _interleaved(measure, last, lambda low, high: not low <= 1 <= high)
    if whole.low <= 1 <= whole.high:
        raise NoDifference(f"the time changes by {whole} from the good to the bad build: "
                           "there is no significant change to bisect")
    middle = math.sqrt(whole.value)

    def judge(number: int) -> tuple[Call, str]:
        found = _interleaved(measure, number, lambda low, high: not low <= middle <= high)
        bad = (found.value > middle) == (whole.value > 1)
        sure = "" if not found.low <= middle <= found.high else ", so it could be either"
        return Call.BAD if bad else Call.GOOD, f"{found} against the good build; half way is {percent(middle)}{sure}"

    return judge


def _interleaved(measure: Measure, number: int, clear: Callable[[float, float], bool]) -> Ratio:
    """Return the ratio of a build's time to the good one's; runs pairs until the interval is clear."""
    times: dict[int, list[float]] = {0: [], number: []}
    look = fewest_pairs(LEVEL)
    for pair in range(MOST_PAIRS):
        for build in (0, number) if pair % 2 == 0 else (number, 0):
            record = measure(build, RUNS_AT_THE_ENDS + MOST_RUNS + pair)
            if record.timing is None:
                why = record.verdict.summary or record.no_timing
                raise Skipped(f"not timed: {record.verdict.headline}: {why}")
            times[build].append(record.timing.median_us)
        if pair + 1 >= look:
            found = ratio_of_pairs(times[number], times[0], LEVEL)
            if clear(found.low, found.high):
                break
            look += PAIRS_BETWEEN_LOOKS
    return found


def _headlines(records: list[Record]) -> set[str]:
    return {record.verdict.headline for record in records}

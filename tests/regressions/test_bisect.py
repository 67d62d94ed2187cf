"""The first bad build is found, whatever does not install, crashes in its own way, or fails only now and then."""

import math
import random

import pytest

from fpxbench.records.case import Case
from fpxbench.records.record import Build, Machine, Record, Timing
from fpxbench.records.verdict import Status, Verdict
from fpxbench.regressions.bisect import Call, NoDifference, Skipped, bisect, first_bad

CASE = Case(implementation="some", scheme="e4m3fn-row", workload="llama3-8b.k", m=1, n=1024, k=4096)
MACHINE = Machine(name="here", device="Some GPU", arch="sm_90")
TAGS = [f"nightly-202611{day:02}" for day in range(1, 31)]
BUILDS = [
    Build(torch=f"2.15.0.dev202611{day:02}+cu130", channel="nightly", variant="cu130", git=f"{day:040x}",
          key=f"{day:040x}")
    for day in range(1, 31)
]


def record(number, us=None, status=Status.OK):
    timing = Timing(samples_us=[us], median_us=us, ci95_us=(us, us), baseline_us=100.0) if us else None
    return Record(case=CASE, build=BUILDS[number], machine=MACHINE, timing=timing, verdict=Verdict(status=status),
                  no_timing=None if us else "a canary")


class Runs:
    """Runs of builds that are bad from `first` on, counted."""

    def __init__(self, first, skipped=(), odd=(), rate=1.0, change=None, sigma=0.01, seed=0):
        self.first, self.skipped, self.odd, self.rate, self.change, self.sigma = (
            first, set(skipped), set(odd), rate, change, sigma
        )
        self.rng, self.asked = random.Random(seed), []

    def __call__(self, number, seed):
        self.asked.append(number)
        if number in self.skipped:
            raise Skipped("it does not install")
        if number in self.odd:
            return record(number, status=Status.ERROR)
        bad = number >= self.first
        if self.change is not None:
            return record(number, us=1000 * math.exp(self.change * bad + self.rng.gauss(0, self.sigma)))
        return record(number, status=Status.CRASH if bad and self.rng.random() < self.rate else Status.OK)

    def search(self, by=None):
        return bisect(CASE, BUILDS, TAGS, by, self)


@pytest.mark.parametrize("first", range(1, 30))
def test_every_first_bad_build_is_found_in_as_many_steps_as_halving_takes(first):
    found = Runs(first).search()
    assert (found.by, found.first_bad_tag, found.last_good_tag, found.maybe) == (
        "verdict", TAGS[first], TAGS[first - 1], []
    )
    assert len(found.steps) <= 5


def test_a_slowdown_is_found_by_time_with_its_range_of_commits():
    found = Runs(17, change=0.06).search()
    assert (found.by, found.first_bad_tag) == ("time", TAGS[17])
    assert found.upstream == f"https://github.com/pytorch/pytorch/compare/{17:040x}...{18:040x}"
    assert [step.call for step in found.steps].count(Call.SKIPPED) == 0


def test_an_improvement_is_found_as_well():
    assert Runs(5, change=-0.06).search().first_bad_tag == TAGS[5]


def test_builds_that_do_not_install_are_skipped_and_do_not_hide_the_first_bad_one():
    found = Runs(17, skipped=(14, 15, 20)).search()
    assert (found.first_bad_tag, found.maybe) == (TAGS[17], [])
    assert any(step.call is Call.SKIPPED and step.message == "it does not install" for step in found.steps)


def test_where_the_first_bad_one_may_be_among_the_skipped_it_is_said():
    found = Runs(17, skipped=(16, 17, 18)).search()
    assert (found.last_good_tag, found.first_bad_tag, found.maybe) == (
        TAGS[15], TAGS[19], [TAGS[16], TAGS[17], TAGS[18]]
    )


def test_another_failure_than_the_one_that_is_looked_for_is_skipped():
    found = Runs(17, odd=(14, 15)).search()
    assert found.first_bad_tag == TAGS[17]
    assert any("neither" in step.message for step in found.steps)


def test_by_time_a_build_on_which_the_case_fails_is_skipped():
    found = Runs(17, odd=(14, 15), change=0.1).search("time")
    assert found.first_bad_tag == TAGS[17] and any("not timed: error" in step.message for step in found.steps)


def test_a_flaky_failure_is_found_by_running_it_often_enough():
    right = sum(Runs(17, rate=0.5, seed=seed).search("verdict").first_bad_tag == TAGS[17]
                for seed in range(40) if _fails_at_the_end(seed))
    asked = sum(_fails_at_the_end(seed) for seed in range(40))
    assert asked > 25 and right >= asked - 2


def _fails_at_the_end(seed):
    """Return whether the bad end fails in at least one of its first runs: else there is nothing to look for, and that
    is said."""
    try:
        Runs(17, rate=0.5, seed=seed).search("verdict")
    except NoDifference:
        return False
    return True


def test_ends_that_do_not_differ_are_a_mistake():
    with pytest.raises(NoDifference, match="no difference in verdicts to bisect"):
        Runs(99).search("verdict")
    with pytest.raises(NoDifference, match="no significant change to bisect"):
        Runs(99, change=0.06).search("time")


def test_an_end_that_cannot_be_run_is_said():
    with pytest.raises(Skipped, match="does not install"):
        Runs(17, skipped=(0,)).search()


def test_neighbours_need_no_step():
    assert first_bad(1, lambda number: pytest.fail("nothing is between")) == (0, 1, [])

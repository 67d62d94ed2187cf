"""A confirmation confirms what is there, refutes what is not, and is undecided where it cannot tell."""

import math
import random

import numpy as np
import pytest

from fpxbench.cli import confirm_commands
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Build, Machine, Record, Timing
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.regressions.confirm import LEVEL, MOST_PAIRS, PAIRS_BETWEEN_LOOKS, Question, confirm, decided
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome, upstream_range
from fpxbench.regressions.rerun import CannotRun, rerun
from fpxbench.reports.history.issue_texts import confirmed, issues
from fpxbench.stats import Ratio, fewest_pairs, ratio_of_pairs

CASE = Case(implementation="some", scheme="e4m3fn-row", workload="llama3-8b.k", m=1, n=1024, k=4096)
GOOD = Build(
    torch="2.15.0.dev20261101+cu130", channel="nightly", variant="cu130", date="2026-11-01", git="a" * 40, key="1" * 40
)
BAD = Build(
    torch="2.15.0.dev20261102+cu130", channel="nightly", variant="cu130", date="2026-11-02", git="b" * 40, key="2" * 40
)
MACHINE = Machine(name="here", device="Some GPU", arch="sm_90")
TIMES = Question(CASE, "time")
VERDICTS = Question(CASE, "verdict")


def record(side, us=None, baseline_us=100.0, status=Status.OK, kind=None):
    timing = Timing(samples_us=[us], median_us=us, ci95_us=(us, us), baseline_us=baseline_us) if us else None
    return Record(
        case=CASE,
        build=GOOD if side == "good" else BAD,
        machine=MACHINE,
        timing=timing,
        verdict=Verdict(status=status, kind=kind, log_tail="its last words" if status is not Status.OK else ""),
        no_timing=None if us else "a canary",
    )


def noisy(change, sigma=0.01, baseline_change=0.0, seed=0, drift=0.0):
    """Return runs of builds of which the later is slower by `change`; each process is off by `sigma`, and the machine
    drifts."""
    rng, calls = random.Random(seed), []

    def measure(side, number):
        calls.append(side)
        later = side == "bad"
        common = drift * len(calls)
        return record(side, 1000 * math.exp(change * later + rng.gauss(0, sigma) + common),
                      100 * math.exp(baseline_change * later + rng.gauss(0, sigma) + common))

    measure.calls = calls
    return measure


def failing(good, bad, seed=0):
    """Return runs that end in a crash with these probabilities."""
    rng = random.Random(seed)
    return lambda side, number: record(
        side, status=Status.CRASH if rng.random() < (good if side == "good" else bad) else Status.OK
    )


# ---- times


def test_a_slowdown_is_confirmed_with_its_size():
    found = confirm(TIMES, noisy(math.log(1.06)))
    assert found.outcome is ConfirmationOutcome.CONFIRMED and found.direction == "worse"
    assert found.time.low < 1.06 < found.time.high and found.time.low > 1.01
    assert found.headline.startswith("confirmed +") and found.headline.endswith("]")


def test_builds_that_do_not_differ_refute_a_suspect():
    found = confirm(Question(CASE, "time", size=math.log(1.06)), noisy(0.0))
    assert found.outcome is ConfirmationOutcome.REFUTED


def test_a_change_smaller_than_half_of_what_was_suspected_refutes_it():
    found = confirm(Question(CASE, "time", size=math.log(1.10)), noisy(math.log(1.02), sigma=0.005))
    assert found.outcome is ConfirmationOutcome.REFUTED


def test_a_change_in_the_other_direction_refutes_a_suspect():
    found = confirm(Question(CASE, "time", size=math.log(1.06)), noisy(-0.06))
    assert found.outcome is ConfirmationOutcome.REFUTED


def test_an_improvement_is_confirmed_as_one():
    found = confirm(Question(CASE, "time", size=-0.06), noisy(-0.06))
    assert (found.outcome, found.direction) == (ConfirmationOutcome.CONFIRMED, "better")


def test_noise_that_hides_a_change_leaves_it_undecided():
    found = confirm(Question(CASE, "time", size=math.log(1.03)), noisy(math.log(1.03), sigma=0.15))
    assert found.outcome is ConfirmationOutcome.UNDECIDED and found.time.pairs == MOST_PAIRS


def test_a_spent_budget_leaves_it_undecided_after_one_pair():
    found = confirm(TIMES, noisy(0.5), budget_s=0.0)
    assert found.outcome is ConfirmationOutcome.UNDECIDED and found.time.pairs == 1 and found.time.low is None
    assert "too few pairs" in found.message
    assert Confirmation.model_validate_json(found.to_json()) == found


def test_a_drifting_machine_is_no_change():
    found = confirm(Question(CASE, "time", size=0.05), noisy(0.0, drift=0.005))
    assert found.outcome is ConfirmationOutcome.REFUTED
    measure = noisy(0.0)
    confirm(TIMES, measure)
    assert measure.calls[:8] == ["good", "bad", "bad", "good"] * 2


def test_a_dense_product_that_changed_as_well_is_said():
    found = confirm(TIMES, noisy(0.2, baseline_change=0.2))
    assert found.outcome is ConfirmationOutcome.CONFIRMED and "the dense product changed too" in found.message
    assert "dense" not in confirm(TIMES, noisy(0.2)).message


@pytest.mark.parametrize("low, value, high, size, outcome", [
    (0.05, 0.06, 0.07, 0.06, ConfirmationOutcome.CONFIRMED),
    (0.001, 0.06, 0.12, 0.06, ConfirmationOutcome.CONFIRMED),
    (-0.001, 0.06, 0.12, 0.06, None),
    (0.005, 0.02, 0.035, 0.06, None),           # a change, and half of what was suspected is still possible
    (0.005, 0.015, 0.025, 0.06, ConfirmationOutcome.REFUTED),
    (-0.02, 0.0, 0.02, 0.06, ConfirmationOutcome.REFUTED),
    (-0.07, -0.06, -0.05, 0.06, ConfirmationOutcome.REFUTED),
    (-0.07, -0.06, -0.05, None, ConfirmationOutcome.CONFIRMED),
    (-0.005, 0.0, 0.005, None, ConfirmationOutcome.REFUTED),
    (-0.02, 0.0, 0.005, None, None),
])
def test_the_decision_goes_by_the_whole_interval(low, value, high, size, outcome):
    ratio = Ratio(math.exp(value), math.exp(low), math.exp(high), LEVEL, 20)
    assert decided(ratio, Question(CASE, "time", size=size)) is outcome


def test_looking_again_and_again_confirms_next_to_nothing_that_is_not_there():
    """The decision rule as it runs, over 1,000 suspects that are none: 5% suspected, noise of 2% a process."""
    rng = np.random.default_rng(1)
    question = Question(CASE, "time", size=0.05)
    looks = range(fewest_pairs(LEVEL), MOST_PAIRS + 1, PAIRS_BETWEEN_LOOKS)
    wrong = 0
    for _ in range(1000):
        differences = rng.normal(0, 0.02 * math.sqrt(2), MOST_PAIRS)
        for pairs in looks:
            outcome = decided(ratio_of_pairs(np.exp(differences[:pairs]), np.ones(pairs), LEVEL), question)
            if outcome is not None:
                wrong += outcome is ConfirmationOutcome.CONFIRMED
                break
    assert wrong <= 2


# ---- verdicts


def test_a_crash_on_one_side_only_is_confirmed_with_counts_and_its_words():
    found = confirm(VERDICTS, failing(0.0, 1.0))
    assert found.outcome is ConfirmationOutcome.CONFIRMED and not found.flaky and found.direction == "worse"
    assert (found.good_counts, found.bad_counts) == ({"ok": 5}, {"crash": 5})
    assert found.headline == "confirmed crash in 5 of 5 runs on the later build, ok in 5 of 5 runs on the earlier"
    assert found.evidence.log_tail == "its last words"


def test_a_mended_crash_is_confirmed_as_better():
    found = confirm(VERDICTS, failing(1.0, 0.0))
    assert (found.outcome, found.direction) == (ConfirmationOutcome.CONFIRMED, "better")


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_same_verdict_on_both_sides_refutes(rate):
    found = confirm(VERDICTS, failing(rate, rate))
    assert found.outcome is ConfirmationOutcome.REFUTED and found.message.endswith("on both")


def test_a_flaky_crash_is_said_to_be_flaky_and_run_more_often():
    found = confirm(VERDICTS, failing(0.0, 0.5, seed=1))
    assert found.flaky and found.outcome is ConfirmationOutcome.CONFIRMED
    assert len(found.runs) > 10 and "flaky: crash in" in found.message and found.chance <= 0.001


def test_a_crash_that_is_as_frequent_before_is_not_confirmed():
    found = confirm(VERDICTS, failing(0.5, 0.5, seed=2))
    assert found.flaky and found.outcome is ConfirmationOutcome.UNDECIDED and len(found.runs) == 40


def test_a_suspected_time_of_a_case_that_fails_is_answered_as_a_verdict():
    found = confirm(TIMES, failing(0.0, 1.0))
    assert found.metric == "verdict" and found.outcome is ConfirmationOutcome.CONFIRMED


def test_a_case_that_cannot_be_run_here_answers_nothing():
    found = confirm(VERDICTS, lambda side, number: record(side, status=Status.MISSING))
    assert (found.outcome, found.message) == (ConfirmationOutcome.UNDECIDED, "missing in 5 of 5 runs on both")


def test_a_suspected_time_of_a_case_that_fails_on_both_builds_is_not_refuted():
    found = confirm(Question(CASE, "time", size=0.06), failing(1.0, 1.0))
    assert (found.outcome, found.message) == (ConfirmationOutcome.UNDECIDED, "crash in 5 of 5 runs on both")


def test_kinds_tell_failures_apart():
    found = confirm(
        VERDICTS,
        lambda side, number: record(
            side, status=Status.WRONG, kind=Kind.NIBBLE_SWAP if side == "bad" else Kind.SIGN_LOST
        ),
    )
    assert found.outcome is ConfirmationOutcome.CONFIRMED and found.bad_counts == {"wrong (nibble_swap)": 5}


# ---- what is kept, and told


def test_confirmations_are_kept_with_the_records_and_read_back(tmp_path):
    found = confirm(Question(CASE, "time", suspect="0123456789", size=0.06), noisy(0.06))
    Store(tmp_path, Confirmation).append(found)
    read, broken = Store(tmp_path, Confirmation).read_all()
    assert read == [found] and not broken
    assert list(tmp_path.glob("here/confirmations/2.15.0.dev20261102-cu130.jsonl"))


def test_the_upstream_range_is_known_where_both_builds_say_their_commit():
    assert upstream_range(GOOD, BAD) == f"https://github.com/pytorch/pytorch/compare/{'a' * 40}...{'b' * 40}"
    assert upstream_range(GOOD, BAD.model_copy(update={"git": None})) is None
    assert upstream_range(GOOD, GOOD) is None


def kept(tmp_path, *confirmations):
    for each in confirmations:
        Store(tmp_path, Confirmation).append(each)
    return issues(confirmed(tmp_path))


def test_an_issue_says_what_since_when_how_sure_how_to_reproduce_and_which_commits(tmp_path):
    (issue,) = kept(tmp_path, confirm(VERDICTS, failing(0.0, 1.0)))
    assert issue.title == f"some/e4m3fn-row/llama3-8b.k/m1/bf16: crash since 2.15.0.dev20261102 [fpx-{issue.id}]"
    for text in ("`crash`", "2.15.0.dev20261101+cu130", "Fisher",
                 "fpxbench confirm some/e4m3fn-row/llama3-8b.k/m1/bf16 2.15.0.dev20261101", "fpxbench bisect",
                 f"compare/{'a' * 40}...{'b' * 40}", "its last words", issue.id):
        assert text in issue.body, text
    (slower,) = kept(tmp_path / "times", confirm(TIMES, noisy(0.06)))
    assert (
        "slower since" in slower.title
        and "99.99% interval" in slower.body
        and "The dense 16-bit product" in slower.body
    )


def test_cases_of_one_cause_are_one_issue_whose_id_stays(tmp_path):
    first = confirm(VERDICTS, failing(0.0, 1.0))
    (alone,) = kept(tmp_path, first)
    another = first.model_copy(update={"case": CASE.model_copy(update={"m": 4})})
    (both,) = kept(tmp_path, another)
    assert both.id == alone.id and "and 1 more" in both.title and "/m4/" in both.body


def test_what_was_refuted_since_or_got_better_is_no_issue(tmp_path):
    assert kept(tmp_path, confirm(VERDICTS, failing(0.0, 1.0)), confirm(VERDICTS, failing(0.0, 0.0))) == []
    assert kept(tmp_path / "better", confirm(VERDICTS, failing(1.0, 0.0))) == []


def test_a_log_cannot_write_markup_into_an_issue(tmp_path):
    found = confirm(VERDICTS, failing(0.0, 1.0))
    verdict = Verdict(
        status=Status.CRASH, summary="`<script>` @everybody", log_tail="```\n</details><script>alert(1)</script>\n````"
    )
    (issue,) = kept(tmp_path, found.model_copy(update={"evidence": verdict}))
    block = issue.body.split("log</summary>")[1]
    assert "`````\n```\n</details><script>" in block, "the fence is longer than any in the log"
    assert "`<script> @everybody`" in issue.body.replace("  ", " ")


def test_a_weight_from_a_file_cannot_be_run_again_and_is_not_refuted():
    case = Case(implementation="some", scheme="mxfp4", workload="checkpoint.model.q.abcdef", m=1, n=64, k=64)
    with pytest.raises(CannotRun, match="comes from a file"):
        rerun(None, case, 1, None)


@pytest.mark.parametrize(("case_id", "experts", "n", "k"), [
    ("some/bf16/gpt-oss-20b.experts_gate_up.uniform/m64/bf16", 32, 5760, 2880),
    ("some/bf16/llama3-70b.down.tp8/m1/fp16", None, 8192, 3584),
])
def test_a_case_that_was_never_recorded_is_the_workloads(case_id, experts, n, k, tmp_path):
    case = confirm_commands._case(case_id, tmp_path)
    assert (case.id, case.experts, case.n, case.k) == (case_id, experts, n, k)

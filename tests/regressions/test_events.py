"""What changed from build to build: events at once, suspects by the rule, and `fpxbench regressions` that says so."""

import json

import pytest
from commands import command
from nights import EAGER, FUSED, nightly, nights, slower, timed
from pydantic import ValidationError
from sample_records import CPU, GPU, record

from fpxbench.records.kinds import Kind
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.regressions.change_report import Direction, State, Suspect
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome
from fpxbench.regressions.result_changes import find_changes

OK = Verdict(status=Status.OK)
CRASH = Verdict(status=Status.CRASH, kind=Kind.COMPILER_ABORT, summary="died by SIGABRT: size mismatch at 0x7ffd12")
HANG = Verdict(status=Status.TIMEOUT, summary="still running after 180 s")


def verdicts(*by_night):
    """Return an edit: the verdict of each night; None leaves the case out."""
    def edit(night, one):
        verdict = by_night[night]
        if verdict is None:
            return None
        return one if verdict is OK else record(one.case, verdict, machine=GPU, build=one.build)

    return edit


def with_traffic(**by_night):
    """Return an edit: metrics of traffic or accuracy, by night."""
    def edit(night, one):
        part = "traffic" if set(by_night) & set(type(one.traffic).model_fields) else "accuracy"
        return one.model_copy(
            update={
                part: getattr(one, part).model_copy(update={name: values[night] for name, values in by_night.items()})
            }
        )

    return edit


def events(results, builds, edit, **more):
    nights(results, builds, (FUSED,), edit=edit, **more)
    return find_changes(results).events


def told(found):
    return [
        (event.series.metric, event.first_bad.label[-2:], event.direction, event.before, event.after) for event in found
    ]


# ---- verdicts


def test_a_verdict_that_changes_is_an_event_at_once_with_kind_and_words(tmp_path):
    found, = events(tmp_path, 3, verdicts(OK, OK, CRASH))
    assert found.series.metric == "verdict" and found.direction is Direction.WORSE
    assert (found.last_good_tag, found.first_bad_tag) == ("nightly-20260602", "nightly-20260603")
    assert (found.before, found.after) == ("ok", "crash (compiler_abort): died by SIGABRT: size mismatch at 0x7ffd12")
    assert found.series.case == FUSED.id and found.first_bad.key and not found.implementation_changed


def test_what_works_again_is_an_event_too(tmp_path):
    found, = events(tmp_path, 2, verdicts(CRASH, OK))
    assert found.direction is Direction.BETTER


def test_the_same_failure_at_another_address_is_none(tmp_path):
    assert not events(
        tmp_path, 2, verdicts(CRASH, CRASH.model_copy(update={"summary": "died by SIGABRT: size mismatch at 0x1234"}))
    )


@pytest.mark.parametrize("change", [{"kind": None}, {"summary": "died by SIGABRT: LLVM ERROR: unknown intrinsic"}])
def test_another_kind_or_other_words_are_an_event(tmp_path, change):
    found, = events(tmp_path, 2, verdicts(CRASH, CRASH.model_copy(update=change)))
    assert found.direction is Direction.OTHER


def test_a_build_on_which_the_case_was_not_measured_is_passed_over(tmp_path):
    found, = events(tmp_path, 4, verdicts(OK, None, None, CRASH))
    assert (found.last_good_tag, found.first_bad_tag) == ("nightly-20260601", "nightly-20260604")


def test_what_comes_and_goes_says_how_often_it_did(tmp_path):
    found = events(tmp_path, 6, verdicts(OK, CRASH, OK, CRASH, OK, HANG))
    assert {event.first_bad.label[-2:]: event.changes_before for event in found} == {
        "02": 0,
        "03": 1,
        "04": 2,
        "05": 3,
        "06": 4,
    }


def test_a_crash_comes_before_a_refusal_and_what_is_worse_before_what_is_better(tmp_path):
    refused = Verdict(status=Status.UNSUPPORTED, summary="not any more")
    nights(tmp_path, 2, (FUSED,), edit=verdicts(CRASH, OK))
    nights(tmp_path, 2, (EAGER,), edit=verdicts(OK, refused))
    nights(tmp_path, 2, (FUSED.model_copy(update={"m": 16}),), edit=verdicts(OK, CRASH))
    assert [(event.direction, event.after.split(":")[0]) for event in find_changes(tmp_path).events] == [
        ("worse", "crash (compiler_abort)"), ("worse", "unsupported"), ("better", "ok")]


def test_an_implementation_that_was_edited_in_between_is_told(tmp_path):
    (found,) = events(
        tmp_path, 2, lambda night, one: verdicts(OK, CRASH)(night, one).model_copy(update={"source": f"{night:012}"})
    )
    assert found.implementation_changed


# ---- figures


@pytest.mark.parametrize(("name", "values", "direction", "before", "after"), [
    ("packed_bytes", (100, 100, 104), "worse", "100 bytes", "104 bytes"),
    ("kernels_launched", (3, 3, 1), "better", "3", "1"),
    ("kernels_launched", (1, None, 3), "worse", "1", "3"),
    ("peak_bytes", (0, 0, 33554432), "worse", "0 bytes", "33,554,432 bytes"),
    ("relative_error", (0.002, 0.00205, 0.004), "worse", "0.00205", "0.004"),
    ("sqnr_db", (31.5, 31.505, 31.2), "worse", "31.5 dB", "31.2 dB"),
])
def test_a_figure_that_ought_to_stay_and_does_not_is_an_event(tmp_path, name, values, direction, before, after):
    found = told(events(tmp_path, 3, with_traffic(**{name: values})))
    assert [(metric, night, way) for metric, night, way, _, _ in found] == [(name, "03", direction)]
    assert found[0][4] == after and found[0][3] in (before, "31.5 dB", "31.51 dB")


def test_another_random_weight_has_another_sqnr_and_that_is_no_event(tmp_path):
    small = FUSED.model_copy(update={"n": 32, "k": 32})

    def edit(night, one):
        one = with_traffic(sqnr_db=(31.5, 31.7))(night, one)
        return one.model_copy(update={"seed": night if other_seed else 7})

    for other_seed in (True, False):
        nights(tmp_path / str(other_seed), 2, (small,), edit=edit)
    assert not find_changes(tmp_path / "True").events
    assert [event.series.metric for event in find_changes(tmp_path / "False").events] == ["sqnr_db"]


def test_a_figure_that_always_moves_as_far_has_nothing_to_tell(tmp_path):
    wobbling = [100_000 + 10_000 * (night % 2) for night in range(20)] + [400_000]
    found = events(tmp_path, 21, with_traffic(peak_bytes=wobbling))
    assert {event.first_bad_tag[-2:] for event in found} == {f"{night:02}" for night in (*range(2, 12), 21)}


# ---- times


@pytest.fixture
def slowed(tmp_path):
    """Return records in which since the build of 5 July, the 35th, one case takes 8% more time."""
    nights(tmp_path, 40, edit=slower(1.08, 34), noise=0.015)
    return tmp_path


def test_a_planted_slowdown_is_one_suspect_at_its_build(slowed):
    suspect, = find_changes(slowed).suspects
    assert suspect.series.case == FUSED.id and suspect.direction is Direction.WORSE and suspect.state is State.OPEN
    assert (suspect.last_good_tag, suspect.first_bad_tag) == ("nightly-20260704", "nightly-20260705")
    low, high = suspect.interval
    assert low < 0.08 < high and low < suspect.change < high
    assert suspect.surely_good.date < suspect.last_good.date and suspect.first_bad.date <= suspect.raised_at.date
    assert abs(suspect.control) < 0.04 and suspect.noise == pytest.approx(0.015, rel=0.5)


def test_where_the_baseline_moved_too_it_is_the_machine_and_one_finding_for_all_cases(tmp_path):
    nights(
        tmp_path,
        40,
        edit=lambda night, one: (
            one if night < 34 else timed(one, one.timing.median_us * 1.1, one.timing.baseline_us * 1.1)
        ),
        noise=0.01,
    )
    found = find_changes(tmp_path)
    assert not found.suspects
    assert sum(move.cases for move in found.machine) == 2
    assert all(
        move.change == pytest.approx(0.1, abs=0.04) and move.control == pytest.approx(0.1, abs=0.04)
        for move in found.machine
    )


def test_one_slow_night_is_no_suspect(tmp_path):
    nights(
        tmp_path,
        45,
        edit=lambda night, one: timed(one, one.timing.median_us * 1.3, one.timing.baseline_us) if night == 36 else one,
    )
    assert not find_changes(tmp_path).suspects


def test_a_case_that_crashes_in_between_goes_on_where_it_was(tmp_path):
    def edit(night, one):
        return (
            record(one.case, CRASH, machine=GPU, build=one.build) if 20 <= night < 25 else slower(1.08, 34)(night, one)
        )

    nights(tmp_path, 40, (FUSED,), edit=edit, noise=0.015)
    assert [suspect.first_bad_tag for suspect in find_changes(tmp_path).suspects] == ["nightly-20260705"]


def test_a_suspect_that_is_mended_is_fixed_since_that_build(tmp_path):
    def edit(night, one):
        return slower(1.10, 34)(night, one) if night < 45 else one

    nights(tmp_path, 55, (FUSED,), edit=edit, noise=0.01)
    fixed, = [suspect for suspect in find_changes(tmp_path).suspects if suspect.direction is Direction.WORSE]
    assert fixed.state is State.FIXED and fixed.ended_at.date == "2026-07-16" and not fixed.stands


def test_a_suspect_has_the_same_id_on_every_night_and_comes_back_from_json(slowed, tmp_path):
    suspect, = find_changes(slowed).suspects
    nights(slowed, 5, edit=slower(1.08, 0), noise=0.015, first=40, seed=3)
    assert [later.id for later in find_changes(slowed).suspects] == [suspect.id]
    again = Suspect.model_validate_json(suspect.model_dump_json(by_alias=True))
    assert again == suspect and again.id == suspect.id
    with pytest.raises(ValidationError):
        Suspect.model_validate_json('{"series": 1}')


def confirmed(suspect, outcome):
    return Confirmation(suspect=suspect.id, case=FUSED, metric="time", machine=GPU, good=suspect.surely_good,
                        build=suspect.raised_at, outcome=outcome, said="+8.1% [7.0, 9.2]")


def test_what_was_looked_at_again_carries_its_outcome(slowed):
    suspect, = find_changes(slowed).suspects
    Store(slowed, Confirmation).append(confirmed(suspect, ConfirmationOutcome.UNDECIDED))
    assert find_changes(slowed).suspects[0].state is State.UNDECIDED
    Store(slowed, Confirmation).append(confirmed(suspect, ConfirmationOutcome.CONFIRMED))
    after, = find_changes(slowed).suspects
    assert after.state is State.CONFIRMED and after.message == "confirmed +8.1% [7.0, 9.2]" and after.id == suspect.id


def test_what_was_refuted_is_kept_and_stands_no_more(slowed):
    suspect, = find_changes(slowed).suspects
    Store(slowed, Confirmation).append(confirmed(suspect, ConfirmationOutcome.REFUTED))
    found = find_changes(slowed)
    assert {each.id: each.state for each in found.suspects}[suspect.id] is State.REFUTED
    assert suspect.id not in {other.id for other in found.of_newest_builds().suspects}


def test_a_machine_that_stopped_does_not_make_an_ended_failure_of_another_current(tmp_path):
    """The newest build is that of each series, not of all machines."""
    nights(tmp_path, 6, (FUSED,), edit=verdicts(OK, OK, OK, OK, CRASH, OK))
    for night in range(5):      # another machine, whose last build is the one that failed here
        Store(tmp_path).append(record(FUSED, machine=CPU, build=nightly(night)))
    found = find_changes(tmp_path)
    assert [event.state for event in found.events if event.direction is Direction.WORSE] == [State.FIXED]
    assert {event.direction for event in found.of_newest_builds().events} <= {Direction.BETTER}
    assert run(tmp_path, "--fail-on", "verdict").exit_code == 0


# ---- the command


def run(results, *args):
    return command("regressions --results", results, "--timeline", results / "none", *args)


def test_the_command_says_what_changed_worst_first_and_how_to_go_on(slowed):
    Store(slowed).append(record(EAGER, CRASH, machine=GPU, build=nightly(39)))
    said = run(slowed)
    assert said.exit_code == 0
    suspect, event = (
        find_changes(slowed).of_newest_builds().suspects[0],
        find_changes(slowed).of_newest_builds().events[0],
    )
    for words in (FUSED.id, "since nightly-20260705", f"fpxbench confirm {suspect.id}", EAGER.id,
                  "crash (compiler_abort)", f"fpxbench confirm {event.id}"):
        assert words in said.stdout
    assert said.stdout.index(FUSED.id) < said.stdout.index(EAGER.id)


def test_the_command_in_json_is_what_the_library_finds(slowed):
    said = json.loads(run(slowed, "--json").stdout)
    assert [Suspect.model_validate(one) for one in said["suspects"]] == find_changes(slowed).suspects
    assert said["troubles"] == []


def test_what_was_not_compared_is_not_called_unchanged(tmp_path):
    for builds, message in ((1, "nothing to compare: no machine has records of two builds"),
                            (3, "times were not compared: that takes 25 builds, and the longest series has 3")):
        nights(tmp_path / str(builds), builds, (FUSED,))
        said = run(tmp_path / str(builds)).stdout
        assert message in said and ("nothing changed" in said) == (builds == 3)


def test_older_events_are_shown_on_demand(tmp_path):
    nights(tmp_path, 3, (FUSED,), edit=verdicts(OK, CRASH, CRASH))
    assert "nothing changed with the newest builds" in run(tmp_path).stdout
    assert "crash" in run(tmp_path, "--all").stdout


@pytest.mark.slow
@pytest.mark.slow_core
def test_machines_that_are_looked_at_at_once_give_the_same_changes(slowed):
    nights(slowed, 5, (FUSED, EAGER), edit=verdicts(OK, CRASH, OK, CRASH, CRASH), machine=CPU)
    Store(slowed).file("nvidia-h100", nightly(3)).open("a").write("no record\n")
    printed = [run(slowed, "--all", "--json", "--jobs", jobs) for jobs in (1, 2)]
    assert json.loads(printed[0].stdout)["events"] and json.loads(printed[0].stdout)["suspects"]
    assert printed[0].stdout == printed[1].stdout and printed[0].stderr == printed[1].stderr


@pytest.mark.parametrize(("command_line", "module", "function"), [
    ("regressions", "fpxbench.regressions.result_changes", "in_processes"),
    ("report --output OUT", "fpxbench.reports.machine_pages", "in_processes")])
def test_the_commands_use_as_many_processes_as_they_are_told(slowed, monkeypatch, command_line, module, function):
    nights(slowed, 1, (FUSED,), machine=CPU)
    jobs = []
    monkeypatch.setattr(f"{module}.{function}", lambda work, machines, count: jobs.append(count) or map(work, machines))
    line = command_line.replace("OUT", str(slowed / "site"))
    assert command(line, "--results", slowed, "--timeline", slowed / "none", "--jobs", 3).exit_code == 0
    assert jobs == [3]


@pytest.mark.parametrize(("asked", "status"), [
    ("suspect", 1), ("verdict,suspect", 1), ("verdict", 0), ("figure", 0), ("confirmed", 0), ("", 0)])
def test_the_exit_status_is_for_a_job_to_fail_on(slowed, asked, status):
    assert run(slowed, "--fail-on", asked).exit_code == status


def test_a_new_crash_fails_a_job_that_asks_for_verdicts_and_an_improvement_does_not(tmp_path):
    nights(tmp_path / "worse", 2, (FUSED,), edit=verdicts(OK, CRASH))
    nights(tmp_path / "better", 2, (FUSED,), edit=verdicts(CRASH, OK))
    assert [run(tmp_path / way, "--fail-on", "verdict").exit_code for way in ("worse", "better")] == [1, 0]


def test_mistakes_are_a_sentence(tmp_path):
    assert "no such folder" in str(run(tmp_path / "nowhere").exception)
    nights(tmp_path, 1, (FUSED,))
    assert "there are nvidia-h100" in str(run(tmp_path, "--machine", "h100").exception)
    assert "--fail-on 'slow': choose from suspect, confirmed, verdict, figure" in str(
        run(tmp_path, "--fail-on", "slow").exception
    )


def test_a_broken_line_is_named_beside_the_findings(slowed):
    with open(Store(slowed).files()[3], "a") as file:
        file.write("{half")
    said = run(slowed)
    assert "skipped" in said.stderr and FUSED.id in said.stdout


# ---- over, or not yet
# ------------------------------------------------------------------------------------------------------

WRONG = Verdict(status=Status.WRONG, summary="half of every value")


def worse(folder, nights_measured, edit):
    """Return the first event for the worse in so many nights of one case."""
    nights(folder, nights_measured, (FUSED,), edit=edit)
    return [event for event in find_changes(folder).events if event.direction is Direction.WORSE][0]


def test_a_crash_that_becomes_a_wrong_result_is_not_fixed_until_it_is_right(tmp_path):
    edit = verdicts(OK, OK, CRASH, CRASH, WRONG, OK)
    assert worse(tmp_path / "now", 5, edit).state is State.OPEN
    later = worse(tmp_path / "later", 6, edit)
    assert (later.state, later.ended_at.torch) == (State.FIXED, nightly(5).torch)


def test_kernels_that_go_from_one_to_three_to_two_are_not_mended_until_they_are_one(tmp_path):
    edit = with_traffic(kernels_launched=[1, 1, 3, 2, 1])
    assert worse(tmp_path / "now", 4, edit).state is State.OPEN
    assert worse(tmp_path / "later", 5, edit).state is State.FIXED


def test_a_record_whose_build_cannot_be_is_named_and_the_others_count(tmp_path):
    nights(tmp_path, 2)
    Store(tmp_path).append(record(FUSED, machine=GPU, build=nightly(3).model_copy(update={"date": "<b>yesterday</b>"})))
    [trouble] = find_changes(tmp_path).troubles
    assert "build.date: Invalid isoformat string: '<b>yesterday</b>'" in trouble

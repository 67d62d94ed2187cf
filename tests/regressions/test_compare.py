"""Two builds are compared by their records: verdicts before times, the machine's doing apart, the worst first."""

import json

import numpy as np
import pytest
from commands import command

from fpxbench.cli.common import UsageError
from fpxbench.records.case import Case
from fpxbench.records.record import Build, Machine, Record, Timing
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.regressions.compare import ChangeClass, compare

BEFORE = Build(torch="2.13.0+cpu", channel="release", variant="cpu", key="1" * 40)
AFTER = Build(torch="2.14.1+cpu", channel="release", variant="cpu", key="2" * 40)


def record(build, name="some", us=None, dense_us=100.0, status=Status.OK, machine="here", seed=0, **more):
    case = Case(implementation=name, scheme="e4m3fn-row", workload="llama3-8b.k", m=1, n=1024, k=4096)
    timing = None
    if us:
        samples = [float(one) for one in us * np.exp(np.random.default_rng(seed).normal(0, 0.01, 30))]
        speedup = dense_us / us
        timing = Timing(samples_us=samples, median_us=float(np.median(samples)), ci95_us=(min(samples), max(samples)),
                        baseline_us=dense_us, speedup=speedup, speedup_ci95=(speedup * 0.99, speedup * 1.01))
    return Record(case=case, build=build, machine=Machine(name=machine, device="x", arch="y"), timing=timing,
                  verdict=Verdict(status=status, **more),
                  no_timing=None if us or status is not Status.OK else "a canary")


def changes(*pairs):
    rows = compare([old for old, _ in pairs if old], [new for _, new in pairs if new])
    return {row.case.split("/")[0]: row.change for row in rows}


@pytest.mark.parametrize(
    "old, new, change",
    [
        (dict(us=100), dict(us=110, seed=1), ChangeClass.SLOWER),
        (dict(us=100), dict(us=90, seed=1), ChangeClass.FASTER),
        (dict(us=100), dict(us=101, seed=1), ChangeClass.UNCHANGED),
        (dict(us=100), dict(us=110, dense_us=110, seed=1), ChangeClass.MACHINE),
        (dict(us=100), dict(us=115, dense_us=130, seed=1), ChangeClass.MACHINE),  # slower, and faster beside dense
        (dict(us=100), dict(us=85, dense_us=70, seed=1), ChangeClass.MACHINE),
        (dict(us=100), dict(us=115, dense_us=80, seed=1), ChangeClass.SLOWER),
        (dict(us=100), dict(status=Status.CRASH), ChangeClass.VERDICT_WORSE),
        (dict(status=Status.WRONG), dict(us=100), ChangeClass.VERDICT_BETTER),
        (dict(status=Status.WRONG, kind="sign_lost"), dict(status=Status.WRONG, kind="nibble_swap"),
         ChangeClass.VERDICT_OTHER),
        (dict(status=Status.UNSUPPORTED), dict(status=Status.UNSUPPORTED), ChangeClass.UNCHANGED),
        (dict(), dict(), ChangeClass.UNCHANGED),
    ],
)
def test_what_changed_is_named(old, new, change):
    assert changes((record(BEFORE, **old), record(AFTER, **new))) == {"some": change}


def test_the_same_samples_give_the_same_answer_twice():
    pair = [record(BEFORE, us=100)], [record(AFTER, us=103, seed=1)]
    assert compare(*pair) == compare(*pair)


def test_verdicts_come_first_and_the_worst_of_each_kind_before_the_others():
    rows = compare(
        [record(BEFORE, name, us=100) for name in ("same", "slow", "slower", "crashing", "erring")]
        + [record(BEFORE, "gone")],
        [record(AFTER, "same", us=100), record(AFTER, "slow", us=120), record(AFTER, "slower", us=150),
         record(AFTER, "erring", status=Status.ERROR), record(AFTER, "crashing", status=Status.CRASH)],
    )
    assert [row.case.split("/")[0] for row in rows] == ["crashing", "erring", "slower", "slow", "same", "gone"]


def test_machines_are_compared_each_with_itself():
    rows = compare([record(BEFORE, us=100, machine="one"), record(BEFORE, us=50, machine="two")],
                   [record(AFTER, us=50, machine="two"), record(AFTER, us=100, machine="one")])
    assert {row.change for row in rows} == {ChangeClass.UNCHANGED} and len(rows) == 2


def test_variants_are_compared_across_only_where_nothing_else_is_there_and_that_is_said():
    cuda = BEFORE.model_copy(update={"torch": "2.13.0", "variant": "cu130"})
    (row,) = compare([record(cuda, us=100)], [record(AFTER, us=100)])
    assert row.variants == ("cu130", "cpu")
    row, other = compare([record(cuda, us=50), record(BEFORE, us=100)], [record(AFTER, us=100)])
    assert row.variants is None and row.change is ChangeClass.UNCHANGED and other.change is ChangeClass.ONLY_ONE


def test_an_absurd_speedup_is_a_row():
    old, new = (one.model_copy(update={"timing": one.timing.model_copy(update={
        "speedup": speedup, "speedup_ci95": (speedup / 10, speedup * 10)})})
        for one, speedup in ((record(BEFORE, us=100), 1e-200), (record(AFTER, us=100), 1e200)))
    assert len(compare([old], [new])) == 1


# ---- fpxbench compare


@pytest.fixture
def folder(tmp_path):
    for each in (record(BEFORE, "slow", us=100), record(BEFORE, "same", us=100), record(BEFORE, "crashing", us=100),
                 record(AFTER, "slow", us=150), record(AFTER, "same", us=100),
                 record(AFTER, "crashing", status=Status.CRASH), record(AFTER, "slow", us=100, machine="elsewhere")):
        Store(tmp_path / "results").append(each)
    return tmp_path


def ask(folder, *arguments):
    done = command("compare", *arguments, "--results", folder / "results", "--timeline", folder / "timeline")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.output


def test_the_terminal_shows_what_changed_and_folds_the_rest(folder):
    shown = ask(folder, "2.13.0", "2.14.1")
    assert shown.index("crashing/") < shown.index("slow/") and "same/" not in shown
    assert "+50.0% [" in shown and "1 verdict worse; 1 slower; 1 unchanged; 1 on one build only" in shown
    assert "same/" in ask(folder, "2.13.0", "2.14.1", "--all")


def test_json_is_every_row_and_one_machine_can_be_asked_for(folder):
    rows = json.loads(ask(folder, "2.13.0", "2.14.1", "--machine", "here", "--json"))
    assert [row["change"] for row in rows] == ["verdict worse", "slower", "unchanged"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("2.13.0", "2.99"), "'2.99'.*it has records of 2.13.0, 2.14.1"),
        (("2.13.0", "2.14.1", "--machine", "nowhere"), "machine 'nowhere'"),
    ],
)
def test_what_was_never_measured_is_a_mistake_that_names_what_was(folder, arguments, said):
    with pytest.raises(UsageError, match=said):
        ask(folder, *arguments)


def test_rows_are_json():
    (row,) = compare([record(BEFORE, us=100)], [record(AFTER, us=110)])
    assert json.loads(row.model_dump_json())["change"] == "slower"


def test_builds_that_no_machine_has_both_of_are_said_to_be_that(tmp_path):
    store = Store(tmp_path / "results")
    store.append(record(BEFORE, machine="here", us=50.0))
    store.append(record(AFTER, machine="there", us=50.0))
    assert "no machine has records of both" in ask(tmp_path, "2.13.0", "2.14.1")
    store.append(record(AFTER, machine="here", us=50.0))
    assert "no machine has records of both" not in ask(tmp_path, "2.13.0", "2.14.1")

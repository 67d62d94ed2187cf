"""A sweep as a whole: what was measured is kept, whatever interrupts it, and nothing is measured twice."""

import io
import os
import shlex
import signal
import sys
import time

import numpy as np
import psutil
import pytest
import sample_records as sample
from safetensors.numpy import save_file
from swept import SCHEMES, lines, settings, start, verdicts, write

from fpxbench.checking.device_lock import device_lock
from fpxbench.cli import sweep_commands
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.sweep.isolation import CannotStart
from fpxbench.sweep.progress import Progress
from fpxbench.sweep.run import main_sweep


def sweep(results, impls, **more):
    said = io.StringIO()
    done = main_sweep(settings(results, impls, **more), Progress(0, said))
    return done, said.getvalue()


def test_a_sweep_records_resumes_and_measures_an_edited_implementation_again(tmp_path):
    impls, results = write(tmp_path / "impls", "swept_a"), tmp_path / "results"
    first, _ = sweep(results, impls)
    expected = {"swept_a/e4m3fn-row": Status.OK, "swept_a/e3m2-row": Status.OK, "swept_a/mxfp4": Status.UNSUPPORTED}
    assert verdicts(first.records) == expected and verdicts(Store(results).read_all()[0]) == expected
    right = first.records[0]
    assert right.seed == 1 and right.about == "Decodes the weight, then multiplies." and len(right.source) == 12
    assert right.machine.read_gb_per_s is None and right.build == first.build     # nothing is timed
    assert right.timing is None and right.no_timing and right.accuracy.relative_error <= right.accuracy.bound

    again, said = sweep(results, impls)
    assert verdicts(again.records) == expected and again.resumed == 3
    assert len(lines(results)) == 3 and "kept 3 cases that had been measured" in said

    write(impls, "swept_a", "x = x.clone()")
    write(impls, "swept_b")
    edited, _ = sweep(results, impls)
    assert edited.resumed == 0 and set(lines(results)[3:]) == {
        f"swept_{ab}/{scheme}/canary.seed/m1/bf16" for ab in "ab" for scheme in SCHEMES
    }

    fresh, _ = sweep(results, impls, fresh=True, implementation=("swept_b",))
    assert fresh.resumed == 0 and len(lines(results)) == 12


def test_a_record_that_answers_another_question_is_not_kept(tmp_path):
    impls, results = write(tmp_path / "impls", "swept_a"), tmp_path / "results"
    only = {"scheme": ("e4m3fn-row",)}
    first, _ = sweep(results, impls, **only)
    save_file({"x": np.ones((4, first.records[0].case.k), np.float32)}, tmp_path / "x.safetensors")
    given = only | {"activations": f"{tmp_path}/x.safetensors"}

    def resumed(**more):
        return sweep(results, impls, **more)[0].resumed

    assert resumed(**only) == 1 and resumed(seed=2, **only) == 0 and resumed(seed=2, **only) == 1
    assert resumed(seed=None, **only) == 1                                          # any seed will do
    assert resumed(seed=2, **given) == 0 and resumed(seed=2, **given) == 1 and resumed(seed=2, **only) == 0
    assert resumed(seed=2, timing_budget_s=0.01, **only) == 1                       # a canary is never timed

    [path] = Store(results).files()
    for field, other in (("device", "another device"), ("arch", "another arch")):
        record = Store(results).read_all()[0][-1]
        machine = record.machine.model_copy(update={field: other})
        Store(results).append(record.model_copy(update={"machine": machine}))
        assert resumed(seed=2, **only) == 0, field


def test_a_case_whose_timing_was_turned_off_is_measured_where_it_is_timed(tmp_path):
    impls, results = write(tmp_path / "impls", "swept_a"), tmp_path / "results"
    only = {"scheme": ("e4m3fn-row",), "workload": ("llama3-8b.k/m1",)}
    for timed, kept in ((0.0, 0), (0.0, 1), (0.01, 0), (0.01, 1), (0.0, 1)):
        assert sweep(results, impls, timing_budget_s=timed, **only)[0].resumed == kept


def test_what_breaks_is_a_record_and_the_rest_of_the_sweep_runs(tmp_path):
    impls = tmp_path / "impls"
    write(impls, "swept_a", "os.kill(os.getpid(), 11)")
    write(impls, "swept_b", "raise SystemExit(5)")
    write(impls, "swept_c", "raise KeyboardInterrupt")
    write(impls, "swept_d")
    (impls / "broken.py").write_text("import a_library_that_nobody_has")
    done, said = sweep(tmp_path / "results", impls, scheme=("e4m3fn-row",))
    assert list(verdicts(done.records).values()) == [Status.CRASH, Status.ERROR, Status.ERROR, Status.OK]
    assert done.records[0].verdict.signal == "SIGSEGV" and "matmul" in done.records[0].verdict.log_tail
    assert len(done.not_loaded) == 1 and "a_library_that_nobody_has" in done.not_loaded[0]
    assert "not loaded: " in said and "swept_a/e4m3fn-row/canary.seed/m1/bf16: crash" in said
    assert not done.interrupted


@pytest.mark.parametrize(("more", "says"), [
    ({"implementation": ("swept_z",)}, "no implementation 'swept_z'; did you mean swept_a"),
    ({"scheme": ("e4m3fn-rov",)}, "no scheme 'e4m3fn-rov'"),
    ({"workload": ("canary.sed",)}, "no workload 'canary.sed'; did you mean canary.seed"),
    ({"device": "gpu"}, "'gpu'"),
])
def test_a_sweep_that_cannot_start_says_why_in_one_sentence(tmp_path, more, says):
    impls = write(tmp_path / "impls", "swept_a")
    with pytest.raises((CannotStart, ValueError)) as refusal:
        sweep(tmp_path / "results", impls, **more)
    assert says in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "results").exists()


def test_a_sweep_waits_for_another_only_to_time(tmp_path):
    impls = write(tmp_path / "impls", "swept_a")
    with device_lock("cpu", "a case of another sweep"):
        out, said = start(settings(tmp_path / "results", impls)).communicate(timeout=600)
        assert out == "3 0 False\n" and "waiting" not in said
        timing = start(settings(tmp_path / "timed", impls, timing_budget_s=0.1))
        assert timing.stderr.readline() == (
            f"fpxbench: waiting to time on cpu, which is in use by process {os.getpid()} "
            f"({shlex.join(sys.argv)[:200]}), "
            "timing a case of another sweep\n"
        )
    assert timing.communicate(timeout=600)[0] == "3 0 False\n"


def test_a_folder_of_implementations_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="--impls .*absent: no such file or folder"):
        sweep(tmp_path / "results", tmp_path / "absent")


def test_two_sweeps_into_one_folder_at_once_lose_nothing(tmp_path):
    one, two = write(tmp_path / "one", "swept_a"), write(tmp_path / "two", "swept_b")
    running = [start(settings(tmp_path / "results", impls)) for impls in (one, two)]
    said = [process.communicate(timeout=600) for process in running]
    assert [out for out, _ in said] == ["3 0 False\n"] * 2, said
    records, broken = Store(tmp_path / "results").read_all()
    assert not broken
    assert sorted(record.case.id for record in records) == sorted(
        f"{name}/{s}/canary.seed/m1/bf16" for name in ("swept_a", "swept_b") for s in SCHEMES
    )


def start_and_hang(tmp_path):
    """Return a sweep whose second case hangs, and the process that hangs."""
    hanging = tmp_path / "hanging"
    impls = write(tmp_path / "impls", "swept_a")
    write(impls, "swept_b", f"open({str(hanging)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    process = start(settings(tmp_path / "results", impls, scheme=("e4m3fn-row",)))
    deadline = time.monotonic() + 600
    def ready():
        return hanging.exists() and hanging.read_text() and Store(tmp_path / "results").files()

    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process, psutil.Process(int(hanging.read_text()))


def test_ctrl_c_kills_the_running_case_and_keeps_what_was_measured(tmp_path):
    process, case = start_and_hang(tmp_path)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=600)
    assert out == "1 0 True\n" and "interrupted; kept 1 record in" in said
    assert lines(tmp_path / "results") == ["swept_a/e4m3fn-row/canary.seed/m1/bf16"]
    case.wait(600)


def test_a_sweep_that_is_killed_goes_on_where_it_stopped(tmp_path):
    impls, results = tmp_path / "impls", tmp_path / "results"
    process, case = start_and_hang(tmp_path)
    process.kill()
    process.communicate(timeout=600)
    with open(Store(results).files()[0], "ab") as file:
        file.write(b'{"schema":1,"case":{"implem')       # as if it had been writing
    case.wait(600)       # raises if the case's process outlives the sweep

    write(impls, "swept_b")
    resumed, _ = sweep(results, impls, scheme=("e4m3fn-row",))
    assert resumed.resumed == 1 and set(verdicts(resumed.records).values()) == {Status.OK}
    assert len(Store(results).read_all()[1]) == 1


def test_schemes_of_which_nothing_ran_are_counted_and_not_listed(capsys):
    refused = Verdict(status=Status.UNSUPPORTED)
    sweep_commands._print_matrix([sample.record(sample.case()),
                                  *(sample.record(sample.case("x", name), refused) for name in ("mxfp4", "nvfp4"))])
    printed = capsys.readouterr().out
    assert "e4m3fn-row" in printed and "mxfp4" not in printed and "2 schemes without a case that ran are" in printed


@pytest.mark.parametrize(("impls", "scheme", "said"), [
    (".", "e4m3fm-row", "did you mean"), ("nowhere.py", "e4m3fn-row", "no such file or folder")])
def test_a_mistaken_name_is_told_before_a_child_imports_pytorch(tmp_path, monkeypatch, impls, scheme, said):
    monkeypatch.setattr("fpxbench.sweep.run.Isolation", None)
    with pytest.raises(ValueError, match=said):
        sweep(tmp_path, tmp_path / impls, scheme=(scheme,))

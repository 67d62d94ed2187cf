"""Cases are prepared side by side and timed one by one; what one does to its child is no business of the others."""

import heapq
import io
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import sample_records
from swept import lines, settings, start, verdicts, write

from fpxbench.records.record import Machine
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status
from fpxbench.sweep import pool as pools
from fpxbench.sweep.gate import Gate, Stopwatch
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.lineup import Durations, Lineup
from fpxbench.sweep.live_report import LiveReport
from fpxbench.sweep.pool import Pool, Room
from fpxbench.sweep.progress import Progress
from fpxbench.sweep.run import main_sweep

GIB = 1 << 30

def sweep(results, impls, **more):
    printed = io.StringIO()
    chosen = settings(results, impls, scheme=("e4m3fn-row",), **more)
    return main_sweep(chosen, Progress(0, printed)), printed.getvalue()


def meet(folder, count):
    """Return a first call that returns only once `count` processes are in it at once."""
    folder.mkdir()
    return (f"open({str(folder)!r} + f'/{{os.getpid()}}', 'w').close()\n"
            f"        while len(os.listdir({str(folder)!r})) < {count}: time.sleep(0.01)")


def test_as_many_cases_as_jobs_are_in_their_calls_at_once(tmp_path):
    impls = tmp_path / "impls"
    together = meet(tmp_path / "met", 3)
    for name in ("swept_a", "swept_b", "swept_c"):
        write(impls, name, together)
    done, printed = sweep(tmp_path / "results", impls, jobs=3, timeout_s=170)
    assert set(verdicts(done.records).values()) == {Status.OK} and done.gate.most_at_once == 3
    assert "up to 3 cases are prepared at once" in printed


def test_one_job_runs_one_case_at_a_time(tmp_path):
    impls = tmp_path / "impls"
    for name in ("swept_a", "swept_b"):
        write(impls, name)
    done, _ = sweep(tmp_path / "results", impls, jobs=1)
    assert len(done.records) == 2 and done.gate.most_at_once == 1


def test_a_crash_and_a_hang_end_alone_and_leave_the_others(tmp_path):
    impls = tmp_path / "impls"
    write(impls, "swept_a", "os.kill(os.getpid(), 11)")
    write(impls, "swept_b", "time.sleep(600)")
    write(impls, "swept_c", "raise LookupError('no such kernel')")
    for name in ("swept_d", "swept_e"):
        write(impls, name)
    done, _ = sweep(tmp_path / "results", impls, jobs=3, timeout_s=40)
    assert list(verdicts(done.records).values()) == [
        Status.CRASH, Status.TIMEOUT, Status.ERROR, Status.OK, Status.OK]
    assert done.records[0].verdict.signal == "SIGSEGV" and "matmul" in done.records[0].verdict.log_tail
    assert sorted(lines(tmp_path / "results")) == sorted(record.case.id for record in done.records)


def test_timings_never_overlap_and_nothing_is_prepared_during_one(tmp_path):
    impls, enough, beats_at = tmp_path / "impls", tmp_path / "enough", str(tmp_path / "beats")
    # The beating case goes on until both others have been timed, which wait for its first beat.
    write(impls, "swept_a", f"clock = open({beats_at!r}, 'a', buffering=1)\n"
                            f"        while not os.path.exists({str(enough)!r}):\n"
                            "            clock.write(f'{time.monotonic()}\\n'); time.sleep(0.001)")
    for name in ("swept_b", "swept_c"):
        write(impls, name, f"while not os.path.exists({beats_at!r}): time.sleep(0.001)")

    class Ending(Progress):
        def finished(self, record):
            super().finished(record)
            if self._done == 2:
                enough.touch()

    done = main_sweep(
        settings(tmp_path / "results", impls, scheme=("e4m3fn-row",), workload=("llama3-8b.k.tp8/m1",), jobs=3,
                 timing_budget_s=0.3),
        Ending(0, io.StringIO()))
    assert {record.case.implementation for record in done.records if record.timing} == {"swept_a", "swept_b", "swept_c"}
    intervals = done.gate.intervals
    assert [one.purpose.split("/")[0] for one in intervals[2:]] == ["swept_a"] and len(intervals) == 3
    for before, after in zip(intervals, intervals[1:], strict=False):
        assert before.begin < before.end <= after.begin
    beats = [float(line) for line in Path(beats_at).read_text().split()]
    assert beats[0] < intervals[0].begin and beats[-1] > intervals[1].end       # it lived before and after
    during = [beat for beat in beats for one in intervals[:2] if one.begin <= beat <= one.end]
    assert not during


def test_the_time_that_a_case_stands_still_does_not_count_and_it_goes_on(tmp_path):
    gate = Gate(groups=True)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time\nwhile True: time.sleep(0.01)"],
                               start_new_session=True)
    try:
        with gate.member(sleeper.pid, "preparing") as stopped, gate.member(os.getpid(), "timed") as timed:
            gate.begin_timing(timed)
            assert psutil.Process(sleeper.pid).status() == psutil.STATUS_STOPPED
            before = stopped.watch.counted_s
            time.sleep(0.05)
            assert stopped.watch.counted_s == pytest.approx(before, abs=1e-3)
            gate.end_timing(timed)
            assert psutil.Process(sleeper.pid).status() != psutil.STATUS_STOPPED
            assert stopped.watch.waited_s >= 0.05
    finally:
        sleeper.kill()
        sleeper.wait()


def test_others_go_on_while_the_device_is_busy_until_one_is_found_to_hang(monkeypatch):
    gate = Gate(groups=False)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time\nwhile True: time.sleep(0.01)"])
    try:
        with gate.member(sleeper.pid, "hangs") as hung, gate.member(os.getpid(), "timed") as timed:
            gate.begin_timing(timed)
            states = []

            def cancelled():        # asked while the others go on
                states.append(psutil.Process(sleeper.pid).status())
                gate.note_hang()
                return False

            gate.let_others_end(timed, cancelled)
            assert states and psutil.STATUS_STOPPED not in states
            assert psutil.Process(sleeper.pid).status() == psutil.STATUS_STOPPED and hung.watch.waited_s > 0

            monkeypatch.setattr("fpxbench.sweep.gate.BUSY_PAUSE_S", 0.0)
            gate.let_others_end(timed)
            states.clear()
            gate.let_others_end(timed, cancelled)
            assert not states, "nothing of the sweep was found to hang: whoever uses the device is not waited for again"
            gate.end_timing(timed)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_timed_process_that_is_gone_gives_its_place_back():
    gate = Gate(groups=True)
    with gate.member(1 << 22, "killed while it was timed") as killed:
        gate.begin_timing(killed)
    with gate.member(1 << 22, "the next") as following:
        gate.begin_timing(following)
    assert [one.purpose for one in gate.intervals] == ["killed while it was timed", "the next"]


def test_a_process_begins_only_after_the_timing_that_goes_on():
    gate, order = Gate(groups=True), []

    def begin():
        with gate.member(1 << 22, "new"):
            order.append("began")

    with gate.member(1 << 22, "timed") as timed:
        gate.begin_timing(timed)
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join(0.1)
        order.append("timed")
    thread.join()
    assert order == ["timed", "began"]


def test_waiting_for_the_timing_that_goes_on_is_not_the_cases_own_time():
    gate, watch = Gate(groups=True), Stopwatch()

    def begin():
        with gate.member(1 << 22, "new", watch):
            pass

    with gate.member(1 << 22, "timed") as timed:
        gate.begin_timing(timed)
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and watch.waited_s > 0.8 * watch.elapsed_s
    thread.join()
    waited = watch.waited_s
    time.sleep(0.01)
    assert watch.waited_s == waited


def test_holds_of_a_stopwatch_nest():
    watch = Stopwatch()
    watch.hold()
    watch.hold()
    watch.release()
    time.sleep(0.02)
    watch.release()
    assert watch.waited_s >= 0.02 and watch.counted_s <= watch.elapsed_s - 0.02


def test_what_ran_out_of_memory_beside_others_runs_again_alone():
    calls = []
    both = threading.Barrier(2)

    def work(isolation, item):
        calls.append((item, isolation))
        if len(calls) <= 2:
            both.wait(600)
        return "oom" if item == "large" and calls.count((item, isolation)) + len(
            [one for one, _ in calls if one == "large"]) < 3 else "ok"

    workers = [Isolation(GIB), Isolation(GIB)]
    events = list(Pool(workers, work, lambda result: result == "oom").run(Lineup(["large", "small"])))
    assert [item for item, _ in calls] == ["large", "small", "large"] or [item for item, _ in calls] == [
        "small", "large", "large"]
    assert sorted((item, result) for event, item, result in events if event == "ended") == [
        ("large", "ok"), ("small", "ok")]


def test_what_runs_out_of_memory_alone_too_is_a_result():
    events = list(Pool([Isolation(GIB), Isolation(GIB)], lambda isolation, item: "oom",
                       lambda result: result == "oom").run(Lineup(["large"])))
    assert [(event, result) for event, _, result in events if event == "ended"] == [("ended", "oom")]


def test_a_mistake_in_the_pools_own_work_is_raised():
    def work(isolation, item):
        raise LookupError(item)

    with pytest.raises(LookupError, match="first"):
        list(Pool([Isolation(GIB)], work).run(Lineup(["first", "second"])))


def sized(weights, experts=None):
    return SimpleNamespace(n=weights, k=1, experts=experts)


def test_jobs_follow_cores_and_memory(monkeypatch):
    def jobs(cores, available, kind="cpu", memory=None, weights=1 << 20, limit=1 << 40, experts=None):
        monkeypatch.setattr(pools, "usable_cores", lambda: cores)
        monkeypatch.setattr(pools.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
        machine = Machine(name="m", device="d", arch="a", kind=kind, memory_bytes=memory)
        return Room(machine, limit).jobs([sized(weights, experts)])

    assert jobs(16, 128 * GIB) == 16
    assert jobs(16, 4 * GIB) == 3
    assert jobs(16, 128 * GIB, "cuda", 139 * GIB, 4096 * 14336) == 16
    assert jobs(16, 128 * GIB, "cuda", 139 * GIB, 5760 * 2880, experts=32) == 16
    assert jobs(16, 128 * GIB, "cuda", 12 * GIB, 4096 * 14336) == 2
    assert jobs(16, 128 * GIB, limit=6 * GIB) == 5
    assert jobs(2, GIB // 2) == 1


def test_small_cases_run_one_a_core_where_large_ones_would_not_fit(monkeypatch):
    monkeypatch.setattr(pools, "usable_cores", lambda: 16)
    monkeypatch.setattr(pools.psutil, "virtual_memory", lambda: SimpleNamespace(available=23 * GIB))
    room = Room(Machine(name="m", device="d", arch="a", kind="cuda", memory_bytes=139 * GIB), 1 << 40)
    canary, large = sized(32 * 512), sized(5760 * 2880, experts=32)
    assert room.jobs([large, canary]) == 16
    lineup = Lineup([canary] * 20 + [large] * 9, cost=room.cost, room=room.bytes)
    begun = []
    while (case := lineup.take()) is not None:
        begun.append(case)
    assert begun == [canary] * 20
    for case in begun:
        lineup.end(case)
    assert [lineup.take() for _ in range(5)] == [large] * 4 + [None], "4 of 5.6 GiB"


class Simulation:
    """Workers that run what a lineup gives them, for durations that are made up."""

    def __init__(self, lineup, workers, seconds, ended=lambda item, seconds: None):
        self.begun, now, running = [], 0.0, []
        while len(lineup) or running:
            while len(running) < workers and len(lineup) and (item := lineup.take()) is not None:
                self.begun.append(item)
                heapq.heappush(running, (now + seconds(item), len(self.begun), item))
            now, _, item = heapq.heappop(running)
            lineup.end(item)
            ended(item, seconds(item))
        self.makespan = now


@pytest.mark.parametrize("seed", range(20))
def test_no_long_case_is_left_alone_at_the_end(seed):
    """Longest first takes at most 4/3 of the best: with 16 workers no more than the work in equal parts and a third."""
    rng = random.Random(seed)
    took = {name: rng.uniform(0.5, 20.0) for name in "abcdefgh"}
    cases = [(stage, rng.choice("abcdefgh"), number) for stage in (0, 1, 2) for number in range(100)]
    durations = Durations()

    def sooner(case):
        return (1, -durations.expected(case[1])) if case[0] == 2 else (0, 0.0)

    run = Simulation(Lineup(cases, sooner), 16, lambda case: took[case[1]],
                     lambda case, seconds: durations.add(case[1], seconds))
    work = sum(took[name] for _, name, _ in cases)
    last = [case for case in run.begun if case[0] == 2]
    assert [case[0] for case in run.begun] == sorted(case[0] for case in cases), "what tells most comes first"
    assert [took[case[1]] for case in last] == sorted((took[case[1]] for case in last), reverse=True)
    assert run.makespan <= work / 16 + min(took[case[1]] for case in last) + 1e-6 or run.makespan <= 4 / 3 * work / 16


def test_a_long_case_at_the_end_of_the_plan_begins_before_short_ones():
    took = {"slow": 20.0, "fast": 1.0}
    cases = ["fast"] * 40 + ["slow"]
    known = Durations()
    for name, seconds in took.items():
        known.add(name, seconds)
    in_order = Simulation(Lineup(cases), 4, took.get)
    longest = Simulation(Lineup(cases, lambda case: -known.expected(case)), 4, took.get)
    assert in_order.makespan == 30.0 and longest.makespan == 20.0
    known.add("unknown", 0.5)
    assert known.expected("never ran") == float("inf"), "it may be long"


@pytest.mark.parametrize("seed", range(20))
def test_cases_that_run_at_once_fit_and_each_runs(seed):
    rng = random.Random(seed)
    cases = [(number, rng.choice((1, 2, 5, 30))) for number in range(60)]
    lineup = Lineup(cases, cost=lambda case: (case[1],), room=(8,))
    running, begun = [], []
    while len(lineup) or running:
        while len(lineup) and (case := lineup.take()) is not None:
            running.append(case)
            begun.append(case)
            assert len(running) == 1 or sum(size for _, size in running) <= 8, "more than there is only alone"
        ended = running.pop(rng.randrange(len(running)))
        lineup.end(ended)
    assert begun == cases, "none overtakes a larger one, which would never begin"


def test_a_worker_that_waits_for_room_gives_its_child_back_and_goes_on_later():
    both, given_back, calls = threading.Barrier(2), threading.Event(), []

    class Child(Isolation):
        def recycle(self):
            given_back.set()

    def work(isolation, item):
        calls.append(item)
        assert given_back.wait(600) if item == "large" else both.wait(600) < 2
        return "ok"

    lineup = Lineup(["large", "small", "small"], cost=lambda item: (3 if item == "large" else 1,), room=(3,))
    events = list(Pool([Child(GIB), Child(GIB)], work).run(lineup))
    assert calls == ["large", "small", "small"]
    assert [item for event, item, _ in events if event == "ended"] == calls


def test_a_parallel_sweep_that_is_killed_goes_on_and_nothing_is_lost_or_doubled(tmp_path):
    impls, results, folder = tmp_path / "impls", tmp_path / "results", tmp_path / "hang"
    folder.mkdir()
    for name in ("swept_a", "swept_b", "swept_c"):
        write(impls, name)
    hang = f"open({str(folder)!r} + f'/{{os.getpid()}}', 'w').close(); time.sleep(600)"
    for name in ("swept_x", "swept_y"):
        write(impls, name, hang)
    chosen = settings(results, impls, scheme=("e4m3fn-row",), jobs=3)
    process = start(chosen)
    deadline = time.monotonic() + 600
    while (len(os.listdir(folder)) < 2 or not Store(results).files() or len(lines(results)) < 3) \
            and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    cases = [psutil.Process(int(pid)) for pid in os.listdir(folder)]
    assert len(cases) == 2 and len(lines(results)) == 3
    process.kill()
    process.communicate(timeout=600)
    for case in cases:
        case.wait(600)       # raises if one outlives the sweep
    for name in ("swept_x", "swept_y"):
        write(impls, name)
    done = main_sweep(settings(results, impls, scheme=("e4m3fn-row",), jobs=3), Progress(0, io.StringIO()))
    assert set(verdicts(done.records).values()) == {Status.OK}
    ids = lines(results)
    assert len(set(ids)) == 5 and len(ids) == 5


def test_the_report_is_there_while_the_sweep_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("fpxbench.sweep.live_report.FIRST_AFTER_S", 0.0)
    impls, report, told, pages = tmp_path / "impls", tmp_path / "report", tmp_path / "told", []
    write(impls, "swept_a")
    for name in ("swept_b", "swept_c"):
        write(impls, name, f"while not os.path.exists({str(told)!r}): time.sleep(0.1)")

    class Telling(Progress):
        def say(self, line):
            if line.startswith("report so far, rebuilt as the sweep goes on: "):
                pages.append(line.rpartition("file://")[2])
                told.touch()

    done = main_sweep(settings(tmp_path / "results", impls, scheme=("e4m3fn-row",), report=report, jobs=2,
                               timeout_s=170), Telling(0, io.StringIO()))
    assert set(verdicts(done.records).values()) == {Status.OK}
    assert pages == [str(report / "index.html")] and "swept_a" in (report / "index.html").read_text()


@pytest.fixture
def builds(monkeypatch):
    """Return the commands of the reports' builds, each of which is replaced by one that ends at once."""
    begun, popen = [], subprocess.Popen

    def begin(command, **options):
        begun.append(command)
        return popen(["true"], **options)

    monkeypatch.setattr("fpxbench.sweep.live_report.subprocess.Popen", begin)
    monkeypatch.setattr("fpxbench.sweep.live_report.FIRST_AFTER_S", 0.0)
    monkeypatch.setattr("fpxbench.sweep.live_report.AGAIN_AFTER_S", 0.0)
    monkeypatch.setattr("fpxbench.sweep.live_report.SHARE", 1.0)
    return begun


def test_the_report_is_built_again_only_after_another_record(tmp_path, builds):
    with LiveReport(tmp_path / "report", tmp_path, Gate(groups=True), print) as live:
        for count, stored in ((1, False), (2, True)):
            live.update(stored)
            live._process.wait()
            live.update(stored=False)
            live.update(stored=False)
            assert len(builds) == live.builds == count
            assert builds[-1][-2:] == ["--output", str(tmp_path / "report")], "where the earlier one is"


def test_why_the_report_cannot_be_built_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("fpxbench.sweep.live_report.FIRST_AFTER_S", 0.0)
    (tmp_path / "report").write_text("a file")
    told = []
    with LiveReport(tmp_path / "report", tmp_path, Gate(groups=True), told.append) as live:
        live.update(stored=True)
        live._process.wait()
        live.update(stored=True)
        live.update(stored=True)
    assert len(told) == 1 and "is a file; give a folder for the report" in told[0] and live.builds == 0


def test_a_report_is_begun_only_after_the_timing_that_goes_on(tmp_path, builds):
    gate = Gate(groups=True)
    with LiveReport(tmp_path / "report", tmp_path, gate, print) as live, gate.member(1 << 22, "timed") as timed:
        gate.begin_timing(timed)
        thread = threading.Thread(target=live.update, args=(True,))
        thread.start()
        thread.join(0.1)
        assert builds == []
        gate.end_timing(timed)
        thread.join()
        assert len(builds) == 1


def test_a_case_that_ran_again_is_not_shown_as_running_once_it_has_ended():
    progress, ended = Progress(1, io.StringIO()), sample_records.record(sample_records.case())
    progress.starting(ended.id)
    progress.starting(ended.id)
    progress.finished(ended)
    assert progress.running() == "nothing"

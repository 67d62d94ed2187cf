"""A run that continues one whose driver was killed: what its workers still hold is fetched, not measured again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_here import Call, ClusterHere
from fake_builds import FakeBuilds, ids

from fpxbench.fleet import cluster, driver, roster
from fpxbench.fleet.fleet_messages import Seat, Task
from fpxbench.fleet.spool import FOLDER_VARIABLE, Spool
from fpxbench.fleet.state import FleetFolder, FleetState
from fpxbench.records.store import Store

WORKER = """
import sys, time
from fpxbench.fleet.device_worker import DeviceWorker
DeviceWorker(sys.argv[1]).start(sys.argv[2])
time.sleep(600)
"""


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBuilds:
    monkeypatch.setenv("FPX_ENVIRONMENTS", str(tmp_path / "environments"))
    return FakeBuilds(tmp_path, 1, 20)


class EarlierRun:
    """A worker, in a process of its own, of a driver that was killed."""

    def __init__(self, builds: FakeBuilds, folder: Path, seconds: float) -> None:
        (entry,) = builds.entries
        builds.behave(entry, seconds=seconds)
        of = FleetFolder(builds.root / "results")
        with of.locked() as fleet:
            of.write(FleetState())
        task = Task(id="earlier", purpose="measure", spec=builds.spec(entry), kind="m1", device="cpu",
                    cases=builds.cases[:8])
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, Seat(fleet=fleet, device="cpu", machine="m1").model_dump_json(),
             task.model_dump_json(by_alias=True)], env=os.environ | {FOLDER_VARIABLE: str(folder)})
        while builds.measured().total() < 2:
            assert self.process.poll() is None
            time.sleep(0.01)
        builds.behave(entry)        # whoever measures next is quick

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def earlier(builds: FakeBuilds, tmp_path: Path) -> Iterator[EarlierRun]:
    """On node a. It does not get to its end."""
    one = EarlierRun(builds, tmp_path / "nodes" / "a", seconds=0.5)
    yield one
    one.end()


def run(builds: FakeBuilds, **request: object) -> tuple[FleetState, list[str]]:
    said: list[str] = []
    asked = driver.Request(entries=builds.entries, results=builds.root / "results",
                           **{"device": "cpu", "patience_s": 60.0} | request)
    return driver.Driver(asked, builds.timeline, said.append, lambda state: None).run(), said


def stored(builds: FakeBuilds) -> Counter[str]:
    return Counter(each.case.id for each in Store(builds.root / "results").read_all()[0])


def test_a_worker_that_outlives_its_driver_is_waited_for_and_nothing_is_measured_twice(
        builds: FakeBuilds, earlier: EarlierRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ClusterHere(monkeypatch, tmp_path, {"a": "m1"})

    def end_at_the_third_hello(call: Call) -> None:
        if call.method == "hello" and here.returned.count(("a", 0, "hello")) == 2:
            earlier.end()

    here.before = end_at_the_third_hello
    state, said = run(builds)
    assert state.ended == "complete" and stored(builds) == Counter(ids(builds.cases))
    assert set(builds.measured().values()) == {1}
    assert any("waiting for the worker of an earlier run" in line for line in said)
    assert any("that an ended worker left there" in line for line in said)


def test_what_one_node_still_has_is_not_measured_by_another_of_its_kind(
        builds: FakeBuilds, earlier: EarlierRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Node a answers only when b has listed the cases and could begin."""
    earlier.end()
    here = ClusterHere(monkeypatch, tmp_path, {"a": "m1", "b": "m1"})
    here.holds = lambda call: (call.node, call.method) == ("a", "hello") and ("b", 0, "finish") not in here.returned
    state, _ = run(builds)
    assert state.ended == "complete" and stored(builds) == Counter(ids(builds.cases))
    assert set(builds.measured().values()) == {1}


def test_a_worker_that_does_not_end_is_named_and_the_rest_goes_on(
        builds: FakeBuilds, earlier: EarlierRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "MOST_HELLOS", 2)
    ClusterHere(monkeypatch, tmp_path, {"a": "m1"})
    state, said = run(builds)
    assert state.ended == "complete" and stored(builds) == Counter(ids(builds.cases))
    assert any("does not end" in line and "earlier" in line for line in said)


def test_a_device_that_does_not_answer_is_waited_for_within_bounds(
        builds: FakeBuilds, earlier: EarlierRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray may never have it free."""
    monkeypatch.setattr(driver, "COLLECT_WITHIN_S", 0.2)
    here = ClusterHere(monkeypatch, tmp_path, {"a": "m1", "b": "m1"})
    here.holds = lambda call: (call.node, call.method) == ("a", "hello")
    state, said = run(builds, patience_s=0.1)
    assert stored(builds) == Counter(ids(builds.cases)) and state.stored == len(builds.cases)
    assert any(line.startswith("a (a) cpu: no records of the earlier run arrived") for line in said)


def test_a_runs_own_workers_are_not_waited_for(builds: FakeBuilds, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """The second GPU's worker starts while the first one's has a spool locked."""
    here = ClusterHere(monkeypatch, tmp_path, {"a": "m1"}, gpus=2)
    here.holds = lambda call: ((call.share, call.method) == (1, "hello")
                               and here.returned.count(("a", 0, "start")) < 2)      # the first lists the cases
    state, said = run(builds, device="cuda")
    assert state.ended == "complete" and stored(builds) == Counter(ids(builds.cases)) and said == []
    assert here.returned.count(("a", 1, "hello")) == 1


def test_a_list_of_cases_that_an_earlier_run_did_not_finish_is_made_again(
        builds: FakeBuilds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver was killed while the only node of the kind listed the cases: that node can measure the build."""
    here, (entry,) = ClusterHere(monkeypatch, tmp_path, {"a": "m1"}), builds.entries
    with FleetFolder(builds.root / "results").locked() as fleet:
        FleetFolder(builds.root / "results").write(FleetState())
    with monkeypatch.context() as patch:
        patch.setenv(FOLDER_VARIABLE, str(here.folder("a")))
        Spool.create(fleet, Task(id="earlier", purpose="plan", spec=builds.spec(entry), kind="m1", device="cpu")
                     ).release()
    state, said = run(builds)
    assert state.ended == "complete" and stored(builds) == Counter(ids(builds.cases)), said
    assert set(builds.measured().values()) == {1} and said == []
    assert not list((here.folder("a") / "spool" / fleet).iterdir())


def test_a_list_of_cases_whose_worker_ended_is_made_again(
        builds: FakeBuilds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, ended = ClusterHere(monkeypatch, tmp_path, {"a": "m1"}), []

    def end_at_the_first_poll(call: Call) -> None:
        if call.method == "poll" and not ended:
            ended.append(call)
            raise cluster.WorkerEnded("killed")

    here.before = end_at_the_first_poll
    state, said = run(builds)
    assert state.ended == "complete" and stored(builds) == Counter(ids(builds.cases)), said
    assert set(builds.measured().values()) == {1} and said == []


def test_a_second_run_measures_nothing_and_a_node_that_offers_nothing_is_asked_nothing(
        builds: FakeBuilds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ClusterHere(monkeypatch, tmp_path, {"a": "m1", "b": "m2"})
    for stored_in_this_run in (2 * len(builds.cases), 0):
        state, said = run(builds)
        assert state.ended == "complete" and said == [] and state.stored == stored_in_this_run
        assert len(builds.measured()) == 2 * len(builds.cases) and set(builds.measured().values()) == {1}
        assert state.repeated == state.superseded == state.refused == 0
    assert {node for node, _, _ in here.returned} == {"a", "b"}

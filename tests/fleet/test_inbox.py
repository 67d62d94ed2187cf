"""Records from other machines are checked, and stored once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_builds import FakeBuilds
from sample_records import CPU, record

from fpxbench.fleet.fleet_messages import Task
from fpxbench.fleet.inbox import Arrival, Asked, Inbox
from fpxbench.records.record import TIMING_OFF, Record
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict

SOURCES = {"triton_fused": "0123456789ab"}
NODE = {"device": {"uuid": "GPU-1"}, "fleet": {"clock_offset_s": 3.5}}


@pytest.fixture
def builds(tmp_path: Path) -> FakeBuilds:
    return FakeBuilds(tmp_path, 2, 3)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


def asked(builds: FakeBuilds) -> Asked:
    return Asked.by(Task(id="t", purpose="measure", spec=builds.spec(builds.entries[0]), kind="m", device="cpu",
                         cases=builds.cases))


def made(builds: FakeBuilds, number: int = 0, **changes: object) -> Record:
    machine = CPU.model_copy(update={"name": "m"})
    one = record(builds.cases[number], machine=machine, build=builds.build(builds.entries[0]))
    return one.model_copy(update=changes)


def test_a_record_is_stored_with_what_the_driver_knows_of_its_device(builds: FakeBuilds, store: Store) -> None:
    arrival, _, _ = Inbox(store).take(made(builds).to_json(), asked(builds), NODE)
    (kept,), _ = store.read_all()
    assert arrival is Arrival.STORED and kept.machine.facts == CPU.facts | NODE


def test_the_same_record_is_stored_once(builds: FakeBuilds, store: Store) -> None:
    inbox = Inbox(store)
    arrivals = [inbox.take(made(builds).to_json(), asked(builds), NODE)[0] for _ in range(3)]
    assert arrivals == [Arrival.STORED, Arrival.REPEATED, Arrival.REPEATED]
    assert Inbox(store).take(made(builds).to_json(), asked(builds), {})[0] is Arrival.REPEATED, "a new driver knows it"
    assert len(store.read_all()[0]) == 1


def test_a_case_that_was_measured_again_meanwhile_keeps_its_first_record(builds: FakeBuilds, store: Store) -> None:
    inbox = Inbox(store)
    inbox.take(made(builds).to_json(), asked(builds), {})
    assert inbox.take(made(builds, seed=8).to_json(), asked(builds), {})[0] is Arrival.SUPERSEDED
    assert inbox.take(made(builds, seed=8, source="edited").to_json(), asked(builds), {})[0] is Arrival.STORED


def test_what_was_missing_is_measured_again(builds: FakeBuilds, store: Store) -> None:
    inbox, build = Inbox(store), builds.build(builds.entries[0])
    missing = made(builds, verdict=Verdict(status=Status.MISSING, summary="no triton"), no_timing=None)
    inbox.take(missing.to_json(), asked(builds), {})
    inbox.take(made(builds, 1).to_json(), asked(builds), {})
    cases = [case.id for case in builds.cases]
    assert Inbox(store).measured("m", build, SOURCES, cases) == {builds.cases[1].id}
    assert Inbox(store).measured("m", build, {"triton_fused": "edited"}, cases) == set()


@pytest.mark.parametrize(("change", "reason"), [
    ({"machine": CPU}, "not of m"), ({"build": "other"}, "not of"), ({"case": "other"}, "does not have")
])
def test_a_record_that_was_not_asked_for_is_refused(builds: FakeBuilds, store: Store, change: dict,
                                                    reason: str) -> None:
    if change.get("build"):
        change = {"build": builds.build(builds.entries[1])}
    if change.get("case"):
        change = {"case": builds.cases[0].model_copy(update={"m": 7})}
    arrival, _, why = Inbox(store).take(made(builds, **change).to_json(), asked(builds), {})
    assert arrival is Arrival.REFUSED and reason in why and not store.files()


@pytest.mark.parametrize("line", ["", "{}", "[]", "nonsense", '{"schema": 99}', "x" * (5 << 20)])
def test_a_line_that_is_no_record_is_refused(builds: FakeBuilds, store: Store, line: str) -> None:
    arrival, found, why = Inbox(store).take(line, asked(builds), {})
    assert arrival is Arrival.REFUSED and found is None and why and not store.files()


def test_a_name_that_leaves_the_folder_is_refused(builds: FakeBuilds, store: Store) -> None:
    line = json.loads(made(builds).to_json())
    line["machine"]["name"] = "../../elsewhere"
    assert Inbox(store).take(json.dumps(line), asked(builds), {})[0] is Arrival.REFUSED


def test_a_case_whose_timing_was_turned_off_is_measured_again_where_it_is_timed(builds: FakeBuilds,
                                                                                store: Store) -> None:
    build, case = builds.build(builds.entries[0]), builds.cases[0].id
    untimed, timed = made(builds, no_timing=TIMING_OFF), made(builds, seed=8, no_timing="a canary")
    assert Inbox(store, timing=False).take(untimed.to_json(), asked(builds), {})[0] is Arrival.STORED
    assert Inbox(store, timing=False).measured("m", build, SOURCES, [case]) == {case}
    inbox = Inbox(store)
    assert inbox.measured("m", build, SOURCES, [case]) == set()
    assert inbox.take(timed.to_json(), asked(builds), {})[0] is Arrival.STORED
    assert inbox.measured("m", build, SOURCES, [case]) == {case}

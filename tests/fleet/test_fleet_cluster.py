"""A fleet on a cluster of several local nodes: everything measured once, whatever ends meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_builds import FakeBuilds, ids

from fpxbench.fleet.state import FleetState
from fpxbench.records.record import Record
from fpxbench.records.store import Store

ray = pytest.importorskip("ray", reason="the fleet needs Ray: pip install 'fpxbench[fleet]'")

from local_cluster import LocalCluster  # noqa: E402  (imports Ray)

from fpxbench.fleet import cluster, driver  # noqa: E402

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes of two kinds, for all tests of this file; a test that ends one adds another."""
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as local:
        for name, machine in (("a", "m1"), ("b", "m1"), ("c", "m2")):
            local.add(name, machine=machine)
        yield local


@pytest.fixture
def builds(nodes: LocalCluster) -> Iterator[FakeBuilds]:
    number = len(list(nodes.root.glob("builds-*")))
    yield FakeBuilds(nodes.root / f"builds-{number}", 2, 20, environments=nodes.root / "environments")


def run(nodes: LocalCluster, builds: FakeBuilds, *, watch: Callable[[FleetState], None] = lambda state: None,
        **request: object) -> tuple[FleetState, list[str]]:
    """One driver, and what it said."""
    said: list[str] = []
    asked = driver.Request(entries=builds.entries, results=builds.root / "results",
                           **{"device": "cpu", "patience_s": 20.0} | request)
    cluster.connect(nodes.address)
    try:
        return driver.Driver(asked, builds.timeline, said.append, watch).run(), said
    finally:
        cluster.disconnect()


def stored(builds: FakeBuilds) -> Counter[tuple[str, str, str]]:
    """How many records the store has of each (machine, build, case)."""
    records: list[Record] = []
    for path in Store(builds.root / "results").files():
        records += Store(builds.root / "results").read(path)[0]
    return Counter((each.machine.name, each.build.torch, each.case.id) for each in records)


def once(builds: FakeBuilds, machines: tuple[str, ...] = ("m1", "m2")) -> Counter[tuple[str, str, str]]:
    return Counter({(machine, builds.build(entry).torch, case): 1
                    for machine in machines for entry in builds.entries for case in ids(builds.cases)})


def test_every_case_is_measured_once_on_every_kind(nodes: LocalCluster, builds: FakeBuilds) -> None:
    state, said = run(nodes, builds)
    assert state.ended == "complete" and said == []
    assert stored(builds) == once(builds)
    assert set(builds.measured().values()) == {1}, "nodes of one kind share the work"
    assert state.stored == 80 and state.repeated == state.superseded == state.refused == 0


def test_a_second_run_measures_nothing(nodes: LocalCluster, builds: FakeBuilds) -> None:
    run(nodes, builds)
    state, _ = run(nodes, builds)
    assert state.ended == "complete" and state.stored == 0
    assert set(builds.measured().values()) == {1}


def test_a_node_that_is_killed_under_load_loses_and_doubles_nothing(nodes: LocalCluster, builds: FakeBuilds) -> None:
    for entry in builds.entries:
        builds.behave(entry, seconds=0.2)
    killed = threading.Event()

    def kill(state: FleetState) -> None:
        if state.stored >= 6 and not killed.is_set():
            killed.set()
            nodes.kill("b")

    state, said = run(nodes, builds, watch=kill)
    nodes.add("b", machine="m1")
    assert killed.is_set() and any("is gone" in line for line in said)
    assert state.ended == "complete" and stored(builds) == once(builds)


def test_what_has_no_device_left_waits_for_one_that_joins(nodes: LocalCluster, builds: FakeBuilds) -> None:
    for entry in builds.entries:
        builds.behave(entry, seconds=0.2)
    joining: list[threading.Thread] = []

    def kill(state: FleetState) -> None:
        if state.stored >= 4 and not joining:
            nodes.kill("c")
            joining.append(threading.Thread(target=nodes.add, args=("c",), kwargs={"machine": "m2"}))
            joining[0].start()

    state, _ = run(nodes, builds, watch=kill, patience_s=60.0)
    joining[0].join()
    assert state.ended == "complete" and stored(builds) == once(builds)

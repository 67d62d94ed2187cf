"""A fleet on a cluster of several local nodes: everything measured once, whatever ends meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from fake_builds import FakeBuilds, ids
from places import CHECKOUT

import fpxbench
from fpxbench.builds.environments import Installation
from fpxbench.fleet.spread import DeviceSpread
from fpxbench.fleet.state import FleetState
from fpxbench.records.record import Record
from fpxbench.records.store import Store

ray = pytest.importorskip("ray", reason="the fleet needs Ray: pip install 'fpxbench[fleet]'")

from local_cluster import LocalCluster  # noqa: E402  (imports Ray)

from fpxbench.fleet import cluster, driver, roster  # noqa: E402

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path_factory.mktemp("cluster")) as local:
        yield local


@pytest.fixture
def nodes(local: LocalCluster) -> LocalCluster:
    """Three nodes of two kinds, for all tests of this file; those that a test ended are started again."""
    for name, machine in (("a", "m1"), ("b", "m1"), ("c", "m2")):
        if name not in local.nodes:
            local.add(name, machine=machine)
    return local


@pytest.fixture
def builds(nodes: LocalCluster) -> Iterator[FakeBuilds]:
    number = len(list(nodes.root.glob("builds-*")))
    yield FakeBuilds(nodes.root / f"builds-{number}", 2, 20, environments=nodes.root / "environments")


def run(nodes: LocalCluster, builds: FakeBuilds, *, watch: Callable[[FleetState], None] = lambda state: None,
        **request: object) -> tuple[FleetState, list[str]]:
    """One driver, and what it said."""
    said: list[str] = []
    asked = driver.Request(entries=builds.entries, results=builds.root / "results",
                           **{"device": "cpu", "patience_s": 120.0} | request)
    cluster.connect(nodes.address)
    try:
        return driver.Driver(asked, builds.timeline, said.append, watch).run(), said
    finally:
        cluster.disconnect()


def why(state: FleetState) -> str:
    """Return what the driver said, and each build that is not complete on a machine."""
    return "\n".join([*state.messages, *(each.model_dump_json() for each in state.cells if each.done != each.total)])


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
    assert state.ended == "complete" and said == [], why(state)
    assert stored(builds) == once(builds)
    assert set(builds.measured().values()) == {1}, "nodes of one kind share the work"
    assert state.stored == 80 and state.repeated == state.superseded == state.refused == 0


def test_a_driver_that_is_killed_is_continued_and_nothing_is_measured_twice(nodes: LocalCluster,
                                                                            builds: FakeBuilds) -> None:
    for entry in builds.entries:
        builds.behave(entry, seconds=0.2)
    first, last = builds.entries[0].tag, builds.entries[-1].tag
    command = [sys.executable, "-m", "fpxbench", "fleet", "run", "--builds", f"{first}..{last}", "--device", "cpu",
               "--address", nodes.address, "--results", str(builds.root / "results"),
               "--timeline", str(builds.root / "timeline")]
    one = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while one.poll() is None and (builds.measured().total() < 10):
        time.sleep(0.05)
    one.kill()
    _, complaints = one.communicate()
    assert one.returncode == -signal.SIGKILL, complaints
    state, _ = run(nodes, builds)
    assert state.ended == "complete" and stored(builds) == once(builds), why(state)
    assert set(builds.measured().values()) == {1}
    assert state.stored < 80, "the first driver had stored some"


def test_nodes_that_are_killed_under_load_lose_and_double_nothing(nodes: LocalCluster, builds: FakeBuilds) -> None:
    """One of a pair, whose cases go to the other; and the only one of its kind, whose cases wait for one that joins."""
    for entry in builds.entries:
        builds.behave(entry, seconds=0.2)
    killed = False

    def kill(state: FleetState) -> None:
        nonlocal killed
        if state.stored >= 6 and not killed:
            killed = True
            nodes.kill("b")
            nodes.kill("c")
        if len(gone(state.messages)) == 2 and len(nodes.nodes) == 1:
            nodes.add("c", machine="m2")

    state, said = run(nodes, builds, watch=kill)
    assert len(gone(said)) == 2
    assert state.ended == "complete" and stored(builds) == once(builds), why(state)


def gone(said: list[str]) -> list[str]:
    return [line for line in said if "is gone" in line]


@pytest.mark.slow
@pytest.mark.slow_core
def test_after_ctrl_c_what_was_measured_is_stored_and_the_next_run_goes_on(nodes: LocalCluster,
                                                                           builds: FakeBuilds) -> None:
    for entry in builds.entries:
        builds.behave(entry, seconds=0.2)

    def interrupt(state: FleetState) -> None:
        if state.stored >= 6 and not state.ended:
            raise KeyboardInterrupt

    state, _ = run(nodes, builds, watch=interrupt)
    assert state.ended == "interrupted", why(state)
    assert builds.measured().total() <= stored(builds).total() < 80
    state, _ = run(nodes, builds)
    assert state.ended == "complete" and stored(builds) == once(builds), why(state)
    assert set(builds.measured().values()) == {1}


@pytest.mark.slow
@pytest.mark.slow_core
def test_each_trouble_is_a_sentence_and_the_rest_goes_on(nodes: LocalCluster, builds: FakeBuilds,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, another fpxbench, a build that does not install on one kind, a clock that differs."""
    for entry in builds.entries:
        builds.behave(entry, full_on="nodes/a/")
    own, refused = nodes.root / f"own-{builds.root.name}", builds.entries[0]
    for entry in builds.entries:
        shutil.copytree(builds.folder(entry), own / builds.folder(entry).name, symlinks=True)
    state_file = own / builds.folder(refused).name / "environment.json"
    state_file.write_text(state_file.read_text().replace('"ready"', '"failed"').replace(
        '"why":""', '"why":"no wheel for aarch64"').replace('"log_tail":""', '"log_tail":"ERROR: no wheel"'))
    stale = nodes.root / "stale"        # not a package: Ray puts the driver's paths before a node's own
    stale.mkdir()
    (stale / "sitecustomize.py").write_text("import sys, types\nfpxbench = sys.modules['fpxbench'] = "
                                            "types.ModuleType('fpxbench')\nfpxbench.__version__ = '0.0.9'")
    monkeypatch.setattr(roster, "driver_clock", lambda: time.time() - 90)
    nodes.add("d", machine="m3", FPX_ENVIRONMENTS=str(own))
    nodes.add("old", machine="m4", PYTHONPATH=f"{stale}:{os.environ.get('PYTHONPATH', '')}")
    try:
        state, said = run(nodes, builds)
    finally:
        nodes.kill("d")
        nodes.kill("old")

    assert state.ended == "incomplete", f"a build is not measured on m3; {why(state)}"
    expected = once(builds, ("m1", "m2", "m3"))
    assert stored(builds) == Counter({key: 1 for key in expected if key[:2] != ("m3", builds.build(refused).torch)})

    assert [line for line in said if "gets no more tasks" in line and "disk of" in line]
    (line,) = [line for line in said if "left out" in line]
    assert "0.0.9" in line and fpxbench.__version__ in line and "pip install" in line
    assert any("no wheel for aarch64" in line for line in said)
    (kept,), _ = Store(builds.root / "results", Installation).read_all()
    assert (kept.machine.name, kept.status, kept.log_tail) == ("m3", "failed", "ERROR: no wheel")
    assert "default" in builds.timeline.find(refused.key).failures
    assert len([line for line in said if "90.0 s ahead of the driver's" in line]) == 4
    offsets = {one.machine.facts["fleet"]["clock_offset_s"] for one in Store(builds.root / "results").read_all()[0]}
    assert all(abs(offset - 90) < 1 for offset in offsets)


@pytest.mark.slow
@pytest.mark.slow_core
def test_two_gpus_of_one_node_share_the_work_are_told_apart_and_compared(nodes: LocalCluster) -> None:
    """Ray reserves the GPUs; there are none."""
    builds = FakeBuilds(nodes.root / "builds-of-gpus", 1, 24, environments=nodes.root / "environments", timed=True,
                        seconds=0.1)
    nodes.add("g", gpus=2, accelerator="H100")
    try:
        state, said = run(nodes, builds, device="cuda")
        again, _ = run(nodes, builds, device="cuda")
    finally:
        nodes.kill("g")
    assert len([line for line in said if "it has no GPU that Ray may use" in line]) == 3, "the other nodes"
    assert state.ended == again.ended == "complete", (why(state), why(again))
    assert stored(builds) == once(builds, ("h100",))
    records, _ = Store(builds.root / "results").read_all()
    assert Counter(each.machine.facts["device"]["index"] for each in records).keys() == {0, 1}
    (found,), _ = Store(builds.root / "results", DeviceSpread).read_all()
    assert {each.device.index for each in found.devices} == {0, 1} and state.spreads == [found.message()]
    assert again.spreads == [], "the same devices are compared once for a build"


@pytest.mark.slow
@pytest.mark.slow_core
@pytest.mark.parametrize(("asked", "words"), [({"device": "cuda"}, "no GPU"), ({"machines": ("nvidia-*",)}, "m1, m2")])
def test_a_device_that_there_is_not_is_named_with_those_that_there_are(nodes: LocalCluster, builds: FakeBuilds,
                                                                       asked: dict, words: str) -> None:
    with pytest.raises(driver.NoMatchingDevice, match=words):
        run(nodes, builds, **asked)
    assert not builds.measured()


@pytest.mark.slow
@pytest.mark.slow_core
def test_the_check_of_two_gpus_times_each_beside_an_idle_and_a_busy_neighbour(
        nodes: LocalCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its steps, on reserved GPUs that are not there; whether two GPUs disturb each other only two GPUs can show."""
    monkeypatch.syspath_prepend(str(CHECKOUT / "tools"))
    import two_gpus

    builds = FakeBuilds(nodes.root / "builds-of-the-check", 1, 1, environments=nodes.root / "environments", timed=True)
    monkeypatch.setattr(two_gpus, "installed_build", lambda: builds.build(builds.entries[0]))
    monkeypatch.setattr(two_gpus, "LOAD", "import time\n"
                        "while True: print(700, time.monotonic(), flush=True); time.sleep(0.01)")
    times = json.dumps({case.id: 10.0 for case in two_gpus.CASES})
    monkeypatch.setattr(two_gpus, "TIME_CASES", [
        sys.executable, "-c", "import sys; print('ready', flush=True)\n"
                              f"for _ in sys.stdin: print('{times}', flush=True)"])
    monkeypatch.setattr(two_gpus, "SETTLED_S", 0.0)
    monkeypatch.setattr(sys, "argv", ["two_gpus.py", "--address", nodes.address, "--rounds", "4"])
    nodes.add("pair", gpus=2, accelerator="H100")
    try:
        assert two_gpus.main() == 0
    finally:
        nodes.kill("pair")
    shown, steps = capsys.readouterr()
    assert shown.count("both at once") == 2 * len(two_gpus.CASES) == shown.count("beside a busy neighbour +0.00%")
    assert "4 pairs each" in shown and "allowed 2%" in shown and shown.count("reached 700 TFLOP/s") == 2
    assert set(builds.measured().values()) == {2}, "one task on each"
    assert "pair" not in steps


def test_the_check_of_two_gpus_fails_where_the_neighbour_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "tools"))
    import two_gpus

    gpus = [SimpleNamespace(device=SimpleNamespace(index=index)) for index in range(2)]
    equal = {(index, case.id): [0.97, 1.0, 1.03] for index in range(2) for case in two_gpus.CASES}
    one = (1, two_gpus.CASES[0].id)
    assert two_gpus.report(gpus, equal) == 0
    assert two_gpus.report(gpus, {**equal, one: [1.019] * 3}) == 0
    assert two_gpus.report(gpus, {**equal, one: [1.021] * 3}) == 1
    assert two_gpus.report(gpus, {key: found for key, found in equal.items() if key != one}) == 1, (
        "a case that was not timed is no success")


def test_the_check_of_two_gpus_fails_where_the_neighbour_was_not_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CHECKOUT / "tools"))
    import two_gpus

    gpu = SimpleNamespace(number=1, device=SimpleNamespace(index=1, uuid="", label="a GPU 1"))
    monkeypatch.setattr(two_gpus, "LOAD", "raise SystemExit(3)")
    with pytest.raises(SystemExit, match="a GPU 1: what ran there ended with exit status 3"):
        two_gpus.Neighbour(gpu)

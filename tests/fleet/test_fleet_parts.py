"""Which builds, which variant, how far apart, how long: what a fleet decides without a cluster."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import command
from fake_builds import CPU, FakeBuilds
from few_targets import write_few_targets
from places import CHECKOUT
from rich.console import Console
from sample_records import BUILD, GPU, case, record, varied, write

from fpxbench.builds.timeline import Timeline, TimelineError
from fpxbench.builds.timeline.entry import Entry, IndexedBuild, Wheel
from fpxbench.fleet import cluster
from fpxbench.fleet.builds import builds_named, spec_for
from fpxbench.fleet.devices import device_of, kinds_here
from fpxbench.fleet.fleet_messages import Device, Seat, Task
from fpxbench.fleet.fleet_progress import FleetProgress, duration, rendered, summary
from fpxbench.fleet.rates import Rates
from fpxbench.fleet.schedule import Cell, Schedule
from fpxbench.fleet.seats import clock_difference
from fpxbench.fleet.spread import cases_to_compare, spreads
from fpxbench.fleet.state import AnotherRun, CellState, FleetFolder, FleetState, SeatState
from fpxbench.integrations.asv_results import write_results
from fpxbench.records.record import Build
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status

NVIDIA = Device(kind="nvidia-h200", type="cuda", name="NVIDIA H200", node="n", index=1, uuid="GPU-1")


# Builds.

@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    held = Timeline(tmp_path / "timeline")
    held.add([Build(torch=f"2.1{n}.0", channel="release", variant="cpu", date=f"2026-0{n + 1}-10") for n in range(4)])
    held.add([Build(torch="2.13.0.dev20260215", channel="nightly", variant="cpu", date="2026-02-15")])
    return held


@pytest.mark.parametrize(("text", "tags"), [
    ("2.11.0..2.13.0", ["2.11.0", "2.12.0", "2.13.0"]), ("2.12.0..", ["2.12.0", "2.13.0"]),
    ("2.13.0, 2.10.0", ["2.10.0", "2.13.0"]), ("nightly,2.13.0..2.13.0", ["nightly-20260215", "2.13.0"])
])
def test_a_range_of_builds_is_of_one_channel_and_in_order(timeline: Timeline, text: str, tags: list[str]) -> None:
    assert [entry.tag for entry in builds_named(text, timeline)] == tags


@pytest.mark.parametrize(("text", "error"), [("2.13.0..2.11.0", ValueError), ("", ValueError), ("9.9", TimelineError)])
def test_builds_that_there_are_not_are_named(timeline: Timeline, text: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=re.escape(text.partition("..")[0]) or "builds"):
        builds_named(text, timeline)


def entry(*variants: str) -> Entry:
    wheels = tuple(Wheel(filename=f"torch-2.13.0{'+' + name if name else ''}-cp311-cp311-linux_x86_64.whl")
                   for name in variants)
    return Entry(channel="release", torch="2.13.0", date="2026-04-10", sources={"pypi": IndexedBuild(wheels=wheels)})


@pytest.mark.parametrize(("device", "asked", "variant"), [
    (CPU, (), "cpu"), (NVIDIA, (), "cu130"), (NVIDIA, ("cpu", "cu126"), "cu126"), (CPU, ("cu126", "cpu"), "cpu"),
    (NVIDIA.model_copy(update={"name": "AMD Instinct MI300X"}), (), "rocm7.2"),
])
def test_each_device_gets_the_variant_that_is_made_for_it(device: Device, asked: tuple[str, ...], variant: str) -> None:
    assert spec_for(entry("cpu", "cu126", "cu130", "rocm7.2"), device, asked).variant == variant


def test_what_pip_chooses_is_preferred_on_an_nvidia_gpu() -> None:
    assert spec_for(entry("", "cu126"), NVIDIA).variant == "default"


# Devices.

NVIDIA_SMI = """#!/bin/sh
case "$*" in
    *--id=1*) echo "1, GPU-b, NVIDIA H200" ;;
    *) echo "0, GPU-a, NVIDIA H200" ;;
esac
"""


def test_a_gpu_is_named_by_nvidias_tool_and_told_from_its_equal(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    seat = Seat(fleet="f", device="cuda")
    one, two = device_of(seat, "0"), device_of(seat, "1")
    assert one.kind == two.kind == "nvidia-h200" and (one.uuid, two.uuid, two.index) == ("GPU-a", "GPU-b", 1)
    assert device_of(seat.model_copy(update={"machine": "bench-a"}), "1").kind == "bench-a"
    assert kinds_here(2, None, "H200") == "nvidia-h200 ×2" and kinds_here(2, "bench-a", "") == "bench-a ×2"
    assert kinds_here(0, None, "") == device_of(Seat(fleet="f", device="cpu")).kind


def test_without_a_tool_a_gpu_is_called_as_ray_calls_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = device_of(Seat(fleet="f", device="cuda", accelerator_type="AMD-Instinct-MI300X-OAM"), "3")
    assert (found.kind, found.index, found.uuid) == ("amd-instinct-mi300x-oam", 3, "")


def test_the_name_of_a_cpu_is_the_one_that_a_sweep_gives_it() -> None:
    from fpxbench.checking.machine import describe

    assert device_of(Seat(fleet="f", device="cpu")).kind == describe("cpu").name


def test_the_clock_is_compared_over_the_shortest_round_trip() -> None:
    local = iter([0.0, 10.0, 20.0, 20.2, 30.0, 31.0])
    remote = iter([100.0, 125.1, 200.0])
    assert clock_difference(lambda: next(remote), lambda: next(local)) == (pytest.approx(105.0), pytest.approx(0.1))


# Spread.

def test_devices_are_compared_on_timed_cases_of_several_implementations() -> None:
    records = varied(GPU, BUILD)
    chosen = cases_to_compare(records)
    timed = {each.case.id for each in records if each.timing is not None}
    assert len({each.implementation for each in chosen}) == len(chosen) == 3
    assert {each.id for each in chosen} <= timed


def test_the_spread_names_the_slowest_device() -> None:
    quick, slow = (record(case(), speedup=speedup, machine=GPU) for speedup in (2.0, 1.9))
    other = NVIDIA.model_copy(update={"index": 0, "uuid": "GPU-0"})
    (found,) = spreads({"a": (NVIDIA, [quick]), "b": (other, [slow])})
    assert found.spread == pytest.approx(slow.timing.median_us / quick.timing.median_us - 1)
    assert "n GPU 0" in found.message() and "2 devices" in found.message()
    assert spreads({"a": (NVIDIA, [quick])}) == []


# How long.

def test_the_time_left_is_the_slowest_kinds(tmp_path: Path) -> None:
    builds, now = FakeBuilds(tmp_path, 2, 10), [0.0]
    schedule, rates = Schedule(), Rates(lambda: now[0])
    cells = {(kind, number): Cell(builds.spec(each), kind, "cpu") for kind in ("m1", "m2")
             for number, each in enumerate(builds.entries)}
    for cell in cells.values():
        schedule.add(cell)
    assert rates.seconds_left(schedule) is None
    for kind, seconds in (("m1", 1.0), ("m2", 5.0)):
        cells[kind, 0].plan(builds.cases, set())
        for number in range(3):
            now[0] += seconds if number else 0.0
            rates.stored(kind)
            cells[kind, 0].measured(builds.cases[number].id)
    assert rates.seconds_left(schedule) == pytest.approx((7 + 10) * 5.0), "an unplanned build is as long"


# What is shown.

def state(**changes: object) -> FleetState:
    cells = [CellState(build="2.13.0", machine="nvidia-h200", total=100, done=100, statuses={Status.WRONG: 2}),
             CellState(build="2.14.0", machine="nvidia-h200", total=100, done=40),
             CellState(build="2.13.0", machine="l4", failure="no wheel for Python 3.11"),
             CellState(build="2.14.0", machine="l4")]
    seats = [SeatState(device="gpu-1 GPU 0", machine="nvidia-h200", activity="working", doing="measuring",
                       build="2.14.0", clock_offset_s=12.0),
             SeatState(device="gpu-2 GPU 0", machine="l4", activity="not used", doing="the disk of /fleet is full")]
    return FleetState(builds=["2.13.0", "2.14.0"], cells=cells, seats=seats, seconds_left=150.0, **changes)


def text(thing: object) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_the_terminal_shows_machines_by_builds_and_what_runs_where() -> None:
    shown = text(rendered(state()))
    for words in ("100/100 ✓ 2✗", "40/100", "cannot be measured", "waiting", "gpu-1 GPU 0", "clock +12.0 s", "disk of"):
        assert words in shown, words


def test_a_line_says_what_is_done_found_running_and_left() -> None:
    assert summary(state()) == ("140 of 200+ cases, 2 wrong | devices: 1 working, 1 not used | 1 build that cannot be "
                                "measured on a machine | about 2 min left")


def test_many_builds_are_counted(tmp_path: Path) -> None:
    cells = [CellState(build=f"b{n}", machine="m", total=10, done=10 if n < 7 else 3) for n in range(12)]
    shown = text(rendered(FleetState(builds=[f"b{n}" for n in range(12)], cells=cells)))
    assert re.search(r"m +7 +5 +0 +85/120", shown), shown


def test_where_there_is_no_terminal_lines_come_now_and_then() -> None:
    console = Console(width=200, record=True, file=io.StringIO(), force_terminal=False)
    with FleetProgress(console) as progress:
        for _ in range(5):
            progress.show(state())
        progress.say("node n is gone")
    assert console.export_text().count("140 of 200+") == 1


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 s"), (150, "2 min"), (5400, "90 min"), (12000, "3 h 20 min")])
def test_durations_are_short(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# Folder, commands, asv.

def test_two_drivers_do_not_write_into_one_folder(tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    assert not folder.running()
    with folder.locked() as fleet:
        assert folder.running()
        with pytest.raises(AnotherRun, match="another"), FleetFolder(tmp_path).locked():
            pass
    with folder.locked() as again:
        assert again == fleet, "spools are delivered to the fleet that they were measured for"


def fleet(*arguments: str) -> object:
    return command("fleet", *arguments)


def test_status_shows_the_latest_run_and_says_if_its_driver_is_gone(tmp_path: Path) -> None:
    folder = FleetFolder(tmp_path)
    with folder.locked():
        folder.write(state())
        assert "process" in fleet("status", "--results", str(tmp_path)).output
    shown = fleet("status", "--results", str(tmp_path)).output
    assert "40/100" in shown and "continues" in shown
    assert json.loads(fleet("status", "--results", str(tmp_path), "--json").output)["running"] is False


@pytest.mark.parametrize(("address", "words"), [
    ("127.0.0.1:1", "nothing answers"), ("ray://127.0.0.1:1", "nothing answers"), ("somewhere", "an address is"),
    ("http://x:1", "an address is"), ("x:99999999", "an address is"),
])
def test_a_cluster_that_cannot_be_reached_is_named_at_once(address: str, words: str) -> None:
    pytest.importorskip("ray", reason="the fleet needs Ray: pip install 'fpxbench[fleet]'")
    with pytest.raises(cluster.NoCluster, match=words):
        cluster.connect(address)


def test_without_ray_the_command_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(cluster.NoRay, match=re.escape("pip install 'fpxbench[fleet]'")):
        cluster.connect(None)


def test_only_one_module_imports_ray() -> None:
    found = {path.name for path in (CHECKOUT / "fpxbench").rglob("*.py")
             if re.search(r"^\s*(import ray|from ray)", path.read_text(), re.MULTILINE)}
    assert found == {"cluster.py"}


def test_a_task_survives_its_way_as_json(tmp_path: Path) -> None:
    builds = FakeBuilds(tmp_path, 1, 3)
    task = Task(id="t", purpose="measure", spec=builds.spec(builds.entries[0]), kind="m", device="cpu",
                cases=builds.cases)
    assert Task.model_validate_json(task.model_dump_json(by_alias=True)) == task


def test_asv_shows_and_publishes_what_other_machines_measured(tmp_path: Path) -> None:
    results, held = tmp_path / "results", Timeline(tmp_path / ".timeline")
    older = BUILD.model_copy(update={"torch": "2.12.0+cpu", "date": "2026-08-14", "key": ""})
    write(results, [*varied(GPU, BUILD), *varied(GPU, older)])
    assert write_results(results, held) == 2
    shutil.copy(CHECKOUT / "asv.conf.json", tmp_path)
    shutil.copytree(CHECKOUT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    write_few_targets(results)

    def asv(*arguments: str) -> str:
        own = {name: value for name, value in os.environ.items() if not name.startswith(("FPX_", "ASV"))}
        done = subprocess.run([sys.executable, "-m", "asv", *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env=own | {"HOME": str(tmp_path / "home")})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    timed = next(each for each in varied(GPU, BUILD) if each.timing is not None)
    assert timed.case.id in asv("show", "2.13.0", "--machine", GPU.name, "--bench", "track_latency")
    assert timed.case.id in asv("compare", "2.12.0", "2.13.0", "--machine", GPU.name)
    asv("publish")
    index = json.loads((tmp_path / ".asv/html/index.json").read_text())
    assert GPU.name in index["machines"] and "matmul.track_speedup" in index["benchmarks"]
    (file,) = (tmp_path / ".asv/html/graphs").rglob(f"machine-{GPU.name}/**/matmul.track_latency.json")
    assert len(json.loads(file.read_text())) == 2, "both builds are points of the graph"


def test_asvs_files_have_the_medians_and_keep_what_asv_measured(tmp_path: Path) -> None:
    results, held = tmp_path / "results", Timeline(tmp_path / "timeline")
    records = varied(GPU, BUILD)
    write(results, records)
    write_results(results, held)
    (path,) = [each for each in (results / GPU.name).glob("*.json") if each.name != "machine.json"]
    stored = json.loads(path.read_text())
    stored["results"]["numerics.track_status"] = [[1], [["'cast'"]], "1", 1, 1.0]
    path.write_text(json.dumps(stored))
    write_results(results, held, Store(results).files())
    stored = json.loads(path.read_text())
    row = dict(zip(stored["result_columns"], stored["results"]["matmul.track_latency"], strict=False))
    values = dict(zip((name.strip("'") for name in row["params"][0]), row["result"], strict=True))
    timed = [each for each in records if each.timing is not None]
    assert all(values[each.case.id] == pytest.approx(each.timing.median_us / 1e6) for each in timed)
    assert all(math.isnan(value) for case_id, value in values.items() if case_id not in {e.case.id for e in timed})
    assert "numerics.track_status" in stored["results"]

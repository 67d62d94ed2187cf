"""A worker runs a task in a build's Python, delivers its records, and says how it ended. No Ray here."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest
from fake_builds import FakeBuilds, ids

from fpxbench.fleet.device_worker import DeviceWorker, share
from fpxbench.fleet.fleet_messages import Delivery, Hello, Seat, Task, TaskEnd
from fpxbench.fleet.spool import node_folder
from fpxbench.records.record import Record

FLEET = "f1"


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBuilds:
    monkeypatch.setenv("FPX_FLEET_FOLDER", str(tmp_path / "node"))
    monkeypatch.setenv("FPX_ENVIRONMENTS", str(tmp_path / "environments"))
    return FakeBuilds(tmp_path, 1, 4)


def worker(**seat: object) -> DeviceWorker:
    return DeviceWorker(Seat(**{"fleet": FLEET, "device": "cpu", "machine": "m"} | seat).model_dump_json())


def task(builds: FakeBuilds, purpose: str = "measure", name: str = "t1") -> Task:
    return Task(id=name, purpose=purpose, spec=builds.spec(builds.entries[0]), kind="m", device="cpu",
                cases=builds.cases if purpose != "plan" else [])


def started(one: DeviceWorker, of: Task) -> str:
    one.start(of.model_dump_json(by_alias=True))
    return of.id


def delivered(one: DeviceWorker, task_id: str, offset: int = 0) -> tuple[list[str], TaskEnd]:
    """Everything that a task delivers, and its end."""
    lines: list[str] = []
    while True:
        delivery = Delivery.model_validate_json(one.poll(task_id, offset, 5.0))
        lines, offset = lines + delivery.lines, delivery.offset
        if delivery.end is not None:
            return lines, delivery.end


def cases_of(lines: list[str]) -> list[str]:
    return [Record.model_validate_json(line).case.id for line in lines]


def test_a_plan_is_the_list_of_the_builds_own_python(builds: FakeBuilds) -> None:
    one = worker()
    _, end = delivered(one, started(one, task(builds, "plan")))
    assert end.status == "done" and ids([each.case for each in end.plan.cases]) == ids(builds.cases)
    assert end.build == builds.build(builds.entries[0])


def test_records_are_delivered_in_order_with_the_name_that_the_driver_gave(builds: FakeBuilds) -> None:
    one = worker()
    lines, end = delivered(one, started(one, task(builds)))
    assert end == TaskEnd(status="done") and cases_of(lines) == ids(builds.cases)
    assert {Record.model_validate_json(line).machine.name for line in lines} == {"m"}


def test_what_was_delivered_is_kept_until_the_driver_has_stored_it(builds: FakeBuilds) -> None:
    one = worker()
    name = started(one, task(builds))
    first, _ = delivered(one, name)
    again, _ = delivered(one, name)
    assert first == again
    one.finish(name)
    assert not list((node_folder() / "spool" / FLEET).iterdir())


def test_an_offset_skips_what_came_before(builds: FakeBuilds) -> None:
    one = worker()
    name = started(one, task(builds))
    lines, _ = delivered(one, name)
    rest, _ = delivered(one, name, offset=len(lines[0]) + 1)
    assert rest == lines[1:]


def test_a_worker_delivers_what_one_that_ended_left_behind(builds: FakeBuilds) -> None:
    builds.behave(builds.entries[0], ends_after=2)
    one = worker()
    name = started(one, task(builds))
    delivered(one, name)
    assert Hello.model_validate_json(worker().hello()).leftovers == [], "it is held by the first, which lives"
    one._spools.pop(name).release()     # what the kernel does when a process ends
    second = worker()
    (left,) = Hello.model_validate_json(second.hello()).leftovers
    assert left == task(builds)
    lines, end = delivered(second, left.id)
    assert cases_of(lines) == ids(builds.cases)[:2] and end.status == "ended"


def test_a_spool_is_not_delivered_while_its_process_lives(builds: FakeBuilds) -> None:
    """The process that measures holds the lock too: what it still writes would be missed."""
    builds.behave(builds.entries[0], seconds=1.0)
    one = worker()
    name = started(one, task(builds))
    assert Delivery.model_validate_json(one.poll(name, 0, 10.0)).lines
    one._spools.pop(name).release()
    assert Hello.model_validate_json(worker().hello()).leftovers == []
    one.stop()


def test_another_fleets_spools_are_left_alone(builds: FakeBuilds) -> None:
    one = worker()
    name = started(one, task(builds))
    delivered(one, name)
    one._spools.pop(name).release()
    assert Hello.model_validate_json(worker(fleet="f2").hello()).leftovers == []


@pytest.mark.parametrize(("how", "status", "message"), [
    ({"ends_after": 2, "status": 3}, "ended", "exit status 3"),
    ({"kills": "triton_fused/e4m3fn-row/layer2.o/m1/bf16"}, "ended", "SIGKILL"),
    ({"ends_after": 0, "status": 2, "message": "fpxbench: no device 'cuda': this PyTorch sees no GPU"}, "cannot_start",
     "sees no GPU"),
    ({"ends_after": 1, "message": "OSError: [Errno 28] No space left on device"}, "disk_full", "disk of"),
])
def test_how_a_task_ended_is_told_apart(builds: FakeBuilds, how: dict, status: str, message: str) -> None:
    builds.behave(builds.entries[0], **how)
    one = worker()
    _, end = delivered(one, started(one, task(builds)))
    assert end.status == status and message in end.message


def test_a_build_that_cannot_list_its_cases_cannot_start(builds: FakeBuilds) -> None:
    builds.behave(builds.entries[0], refuses_to_plan="RuntimeError: no kernel image is available")
    one = worker()
    _, end = delivered(one, started(one, task(builds, "plan")))
    assert end.status == "cannot_start" and "no kernel image" in end.message


def test_a_build_that_was_refused_brings_its_log(builds: FakeBuilds) -> None:
    folder = builds.folder(builds.entries[0])
    state = (folder / "environment.json").read_text().replace('"ready"', '"failed"').replace(
        '"why":""', '"why":"no wheel for this Python"').replace('"log_tail":""', '"log_tail":"ERROR: no wheel"')
    (folder / "environment.json").write_text(state)
    one = worker()
    _, end = delivered(one, started(one, task(builds)))
    assert end.status == "not_installed" and "no wheel for this Python" in end.message
    assert end.installation.log_tail == "ERROR: no wheel"


def test_a_node_without_room_takes_no_task(builds: FakeBuilds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpxbench.fleet.device_worker.ROOM_BYTES", 1 << 62)
    one = worker()
    _, end = delivered(one, started(one, task(builds)))
    assert end.status == "disk_full" and "MB left" in end.message and not builds.measured()


def test_a_folder_that_cannot_be_made_is_the_nodes_trouble(builds: FakeBuilds, monkeypatch: pytest.MonkeyPatch,
                                                           tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FPX_FLEET_FOLDER", str(tmp_path / "file"))
    one = worker()
    _, end = delivered(one, started(one, task(builds)))
    assert end.status == "unavailable"


def test_stop_ends_the_process(builds: FakeBuilds) -> None:
    builds.behave(builds.entries[0], seconds=60.0)
    one = worker()
    name = started(one, task(builds))
    while not (node_folder() / "spool" / FLEET / name / "results").exists():
        time.sleep(0.02)
    one.stop()
    _, end = delivered(one, name)
    assert end.status == "ended"
    with open(node_folder() / "spool" / FLEET / name / "lock") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)    # by the worker; the process is gone
    one._spools.pop(name).release()
    with open(node_folder() / "spool" / FLEET / name / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_lines_too_long_or_no_text_are_delivered_as_no_record(builds: FakeBuilds) -> None:
    one = worker()
    name = started(one, task(builds))
    delivered(one, name)
    (file,) = one._spools[name].results.glob("*/records/*.jsonl")
    with open(file, "ab") as out:
        out.write(b"\xff\xfe\n" + b"x" * (5 << 20) + b"\n" + b'{"half')
    lines, _ = delivered(one, name)
    assert lines[4:] == ["{}", "{}"]


def test_devices_of_a_node_get_disjoint_shares_of_its_cores() -> None:
    cores = list(range(10))
    parts = [share(cores, number, 3) for number in range(3)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert share([0, 1], 5, 8) == [0, 1], "with fewer cores than devices, each may use all"


def test_a_measuring_process_has_only_its_share(builds: FakeBuilds, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    script = builds.folder(builds.entries[0]) / "venv/bin/python"
    script.write_text(script.read_text().replace("import json, os", "import os; print(sorted(os.sched_getaffinity(0)), "
                                                 "file=__import__('sys').stderr)\nimport json, os"))
    one = worker(share=1, shares=len(cores))
    name = started(one, task(builds))
    delivered(one, name)
    assert one._spools[name].log.read_text().strip() == str([cores[1]])

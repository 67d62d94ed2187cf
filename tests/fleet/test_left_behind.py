"""What an ended worker left on its node does not end the driver that finds it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from sample_records import BUILD, CPU, case, record

from fpxbench.builds.environments.specification import EnvironmentSpec
from fpxbench.builds.timeline import Timeline
from fpxbench.fleet import cluster
from fpxbench.fleet.driver import Driver, Request
from fpxbench.fleet.fleet_messages import Delivery, Device, Hello, Seat, Task, TaskEnd
from fpxbench.fleet.seats import SeatRun


class Worker:
    """Notes the calls that the driver makes."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def call(self, method: str, *arguments: object) -> object:
        self.called.append(method)
        return object()

    def end(self) -> None:
        pass


def test_records_of_a_comparison_that_an_ended_worker_left_are_dropped(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "result", lambda call, timeout=None: time.time())      # the node's clock
    driver = Driver(Request(entries=[], results=tmp_path), Timeline(tmp_path / "timeline"), print, lambda state: None)
    seat = SeatRun("s0", cluster.Node("n" * 20, "host", 0, 4, "", None), "cpu", Seat(fleet="f", device="cpu"))
    seat.worker = Worker()
    driver._seats["s0"] = seat
    one = record(case(), speedup=1.5)
    spec = EnvironmentSpec(key=BUILD.key, tag=BUILD.torch, variant="cpu", requirements=(), build=BUILD)
    left = Task(id="old-1", purpose="spread", spec=spec, kind=CPU.name, device="cpu", cases=[one.case])
    device = Device(kind=CPU.name, type="cpu", name="x", node="host")
    driver._said_hello(seat, Hello(device=device, leftovers=[left]).model_dump_json(by_alias=True))
    assert seat.running is not None and seat.running.left_behind
    for end in (None, TaskEnd(status="done")):
        delivery = Delivery(lines=[one.to_json()], offset=10, end=end)
        driver._delivered(seat, delivery.model_dump_json(by_alias=True))
    assert seat.worker.called[-1] == "finish" and not list(tmp_path.rglob("*.jsonl"))

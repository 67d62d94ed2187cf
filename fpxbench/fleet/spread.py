"""The spread of devices of one kind: the same cases, measured on all of them at the same time."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fpxbench.fleet.fleet_messages import Device
from fpxbench.records.case import Case
from fpxbench.records.fields import Microseconds, Moment
from fpxbench.records.record import Build, Machine, Record, RecordPart, StoredRecord, Timing, now
from fpxbench.records.verdict import Status, Verdict

CASES = 3


class DeviceTime(RecordPart):
    """One device's time of the case."""

    device: Device
    median_us: Microseconds
    ci95_us: tuple[Microseconds, Microseconds]


class DeviceSpread(StoredRecord):
    """One line of ``RESULTS/<machine>/spread/<build>-<variant>.jsonl``: a case on several devices of one kind."""

    FOLDER: ClassVar[str] = "spread"

    at: Moment = Field(default_factory=now)
    machine: Machine
    build: Build
    case: Case
    devices: Annotated[list[DeviceTime], Field(min_length=2, max_length=10_000)]

    @property
    def id(self) -> str:
        return self.case.id

    @property
    def verdict(self) -> Verdict:
        return Verdict(status=Status.OK, summary=self.message())

    @property
    def spread(self) -> float:
        """The slowest device's median time over the fastest's, minus 1."""
        times = [each.median_us for each in self.devices]
        return max(times) / min(times) - 1

    def message(self) -> str:
        """Return ``4 devices differ by up to 1.3% on CASE; the slowest is node-b GPU 2``."""
        slowest = max(self.devices, key=lambda each: each.median_us)
        return (f"{self.machine.name}: {len(self.devices)} devices differ by up to {self.spread:.1%} on "
                f"{self.case.id}; the slowest is {slowest.device.label}")


def cases_to_compare(records: list[Record]) -> list[Case]:
    """Return up to `CASES` cases of different implementations, whose times have the narrowest confidence intervals."""
    def width(timing: Timing) -> float:
        low, high = timing.ci95_us
        return (high - low) / timing.median_us

    chosen: dict[str, Case] = {}
    timed = [(width(record.timing), record.case) for record in records if record.timing is not None]
    for _, case in sorted(timed, key=lambda pair: pair[0]):
        chosen.setdefault(case.implementation, case)
    return list(chosen.values())[:CASES]


def spreads(measured: dict[str, tuple[Device, list[Record]]]) -> list[DeviceSpread]:
    """Return the spread of each case that two or more devices timed. measured : each device and its records, by seat"""
    first: dict[str, Record] = {}
    times: dict[str, list[DeviceTime]] = {}
    for device, records in measured.values():
        for record in records:
            if record.timing is not None:
                first.setdefault(record.case.id, record)
                times.setdefault(record.case.id, []).append(DeviceTime(
                    device=device, median_us=record.timing.median_us, ci95_us=record.timing.ci95_us))
    return [
        DeviceSpread(machine=first[case].machine, build=first[case].build, case=first[case].case, devices=devices)
        for case, devices in times.items() if len(devices) > 1
    ]

"""A table of the spread of equal devices: the same cases, measured on all devices of a kind at the same time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fpxbench.fleet.fleet_messages import Device
from fpxbench.fleet.spread import DeviceSpread, DeviceTime
from fpxbench.records.case import Case
from fpxbench.records.record import Build
from fpxbench.records.store import BrokenLine, Store

MOST_DEVICES = 32


@dataclass(frozen=True)
class SpreadCell:
    """One device's time of one case, relative to the fastest device.

    interval : of `ratio`, from the 95% intervals of the two medians; None for the fastest
    """

    median_us: float
    ratio: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class DeviceRow:
    """One device. cells : by case, None if it did not time the case; ratio : the median over its cases"""

    device: Device
    cells: tuple[SpreadCell | None, ...]
    ratio: float


@dataclass(frozen=True)
class SpreadTable:
    """Devices of one kind on one build.

    worst : by case, the slowest device and its ratio; more : number of devices that are not shown
    """

    build: Build
    at: str
    cases: tuple[Case, ...]
    rows: tuple[DeviceRow, ...]
    worst: tuple[tuple[Device, SpreadCell], ...]
    more: int


def newest_spread(results: Path, machine: str, stems: Iterable[str]) -> tuple[SpreadTable | None, list[BrokenLine]]:
    """Return the table of the first build (by the stems of their files) on which devices were compared, if any, and
    broken lines."""
    store, broken = Store(results, DeviceSpread), list[BrokenLine]()
    for stem in stems:
        path = results / machine / DeviceSpread.FOLDER / f"{stem}.jsonl"
        if path.is_file():
            records, wrong = store.read_newest(path)
            broken += wrong
            if records:
                return spread_table(records), broken
    return None, broken


def spread_table(spreads: Sequence[DeviceSpread]) -> SpreadTable:
    """Return the table of one or more cases of one build, each compared on any set of devices."""
    devices = {_key(each.device): each.device for spread in spreads for each in spread.devices}
    by_case = [{_key(each.device): _cell(each, spread.devices) for each in spread.devices} for spread in spreads]
    rows = []
    for key, device in sorted(devices.items()):
        cells = tuple(of_case.get(key) for of_case in by_case)
        rows.append(DeviceRow(device, cells, statistics.median(cell.ratio for cell in cells if cell)))
    slowest = [max(of_case.items(), key=lambda item: item[1].ratio) for of_case in by_case]
    worst = tuple((devices[key], cell) for key, cell in slowest)
    newest = max(spreads, key=lambda one: one.at)
    return SpreadTable(newest.build, newest.at, tuple(spread.case for spread in spreads), tuple(rows[:MOST_DEVICES]),
                       worst, len(rows[MOST_DEVICES:]))


def _key(device: Device) -> tuple[str, int, str]:
    return device.node, device.index, device.uuid


def _cell(one: DeviceTime, all_of_case: Sequence[DeviceTime]) -> SpreadCell:
    fastest = min(all_of_case, key=lambda each: each.median_us)
    if one is fastest:
        return SpreadCell(one.median_us, 1.0, None)
    (low, high), (fastest_low, fastest_high) = one.ci95_us, fastest.ci95_us
    return SpreadCell(one.median_us, one.median_us / fastest.median_us, (low / fastest_high, high / fastest_low))

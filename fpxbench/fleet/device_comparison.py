"""Compare the devices of one kind once the kind has nothing left to measure, when all of them are free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from fpxbench.fleet.fleet_messages import Device
from fpxbench.fleet.schedule import Cell, Schedule
from fpxbench.fleet.seats import SeatRun
from fpxbench.fleet.spread import DeviceSpread, cases_to_compare, spreads
from fpxbench.records.case import Case
from fpxbench.records.record import Record
from fpxbench.records.store import Store


class DeviceComparison:
    """Chooses the tasks that compare devices, and collects their records, which are stored only as spreads."""

    def __init__(self, results: Path) -> None:
        self._results = results
        self._seen: dict[str, set[str]] = {}
        """By kind, the seats whose tasks are running. Empty: the kind was compared, or does not need to be."""
        self._records: dict[str, dict[str, tuple[Device, list[Record]]]] = {}

    def next_tasks(self, schedule: Schedule, seats: Iterable[SeatRun]) -> Iterator[tuple[SeatRun, Cell, list[Case]]]:
        """Yield the tasks of every kind that is finished and whose devices are all idle, so that they run
        simultaneously."""
        by_kind: dict[str, list[SeatRun]] = {}
        for seat in seats:
            if seat.kind and not seat.out:
                by_kind.setdefault(seat.kind, []).append(seat)
        for kind, of_kind in by_kind.items():
            cells = schedule.of_kind(kind)
            if kind in self._seen or not all(cell.finished for cell in cells) or not all(seat.idle for seat in of_kind):
                continue
            cell = next((cell for cell in cells if cell.build is not None and cell.done), None)
            cases = self._cases(cell, of_kind) if cell is not None and len(of_kind) > 1 else []
            self._seen[kind] = {seat.id for seat in of_kind if cases}
            self._records[kind] = {seat.id: (seat.device, []) for seat in of_kind if seat.device is not None}
            yield from ((seat, cell, cases) for seat in of_kind if cases)

    def add(self, seat: SeatRun, record: Record) -> None:
        """Take a record of a seat's task."""
        self._records[seat.kind][seat.id][1].append(record)

    def ended(self, seat: SeatRun) -> None:
        """Note that a seat's task, or its device, ended."""
        self._seen.get(seat.kind, set()).discard(seat.id)

    def is_over(self, kind: str) -> bool:
        """Return whether a kind was compared, or does not need to be."""
        return kind in self._seen and not self._seen[kind]

    def results(self) -> list[DeviceSpread]:
        """Return the spreads of the kinds whose comparison is over, each once."""
        over = [kind for kind in self._records if self.is_over(kind)]
        return [found for kind in over for found in spreads(self._records.pop(kind))]

    def _cases(self, cell: Cell, seats: list[SeatRun]) -> list[Case]:
        """Return the cases to compare on; none if these same devices were compared on this build."""
        known, store = Store(self._results, DeviceSpread), Store(self._results)
        if cell.build is None:
            return []
        devices = {seat.device.model_dump_json() for seat in seats if seat.device is not None}
        path = known.file(cell.kind, cell.build)
        if path.exists() and any({each.device.model_dump_json() for each in spread.devices} == devices
                                 for spread in known.read(path)[0]):
            return []
        path = store.file(cell.kind, cell.build)
        return cases_to_compare(store.read(path)[0]) if path.exists() else []

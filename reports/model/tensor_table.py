"""The operations that quantized tensor classes support on one build, and changes since the build before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fpxbench.model.tensor_record import OperationOutcome, TensorOperationRecord
from fpxbench.records.record import Build, Machine

FILE = "tensors.html"

BADGES = {OperationOutcome.OK: "ok", OperationOutcome.WRONG: "wrong", OperationOutcome.PLAIN: "flag",
          OperationOutcome.REFUSED: "unsupported", OperationOutcome.ERROR: "error", OperationOutcome.CRASH: "crash",
          OperationOutcome.MISSING: "missing"}
"""The CSS class of each outcome's badge."""


@dataclass(frozen=True)
class OutcomeChange:
    """An operation on a class with another outcome on the build before."""

    tensor: str
    operation: str
    before: OperationOutcome
    after: OperationOutcome


@dataclass(frozen=True)
class TensorTable:
    """Outcomes on one build by class and operation, in the order in which they were checked."""

    cells: dict[tuple[str, str], TensorOperationRecord]

    @property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(tensor for tensor, _ in self.cells))

    @property
    def operations(self) -> list[str]:
        return list(dict.fromkeys(operation for _, operation in self.cells))

    def outcome(self, tensor: str, operation: str) -> OperationOutcome | None:
        """Return the outcome of an operation on a class; None if it was not checked."""
        record = self.cells.get((tensor, operation))
        return record.result.outcome if record is not None else None

    def library(self, tensor: str) -> str:
        """Return the class's library with its version; "" for fpxbench's own."""
        return next((record.result.library or "" for (name, _), record in self.cells.items() if name == tensor), "")

    def needed_by(self, operation: str) -> str:
        return next((record.result.needed_by for (_, name), record in self.cells.items()
                     if name == operation and record.result.needed_by), "")

    def done(self, tensor: str) -> str:
        """Return the number of correct operations out of those checked: ``36 of 39``."""
        of_class = [record.result.outcome for (name, _), record in self.cells.items() if name == tensor]
        return f"{of_class.count(OperationOutcome.OK)} of {len(of_class)}"

    def refusals(self) -> dict[str, str]:
        """Return the classes that refuse every operation, with the reason for the first."""
        found = {}
        for tensor in self.classes:
            results = [record.result for (name, _), record in self.cells.items() if name == tensor]
            if all(result.outcome is OperationOutcome.REFUSED for result in results):
                found[tensor] = results[0].message
        return found

    def notable(self) -> list[TensorOperationRecord]:
        """Return the records that are neither correct nor refused nor missing, worst first."""
        order = (OperationOutcome.CRASH, OperationOutcome.WRONG, OperationOutcome.ERROR, OperationOutcome.PLAIN)
        found = [record for record in self.cells.values() if record.result.outcome in order]
        return sorted(found, key=lambda record: order.index(record.result.outcome))


@dataclass(frozen=True)
class TensorPage:
    """The table of one machine and build.

    earlier : the build measured before it on the machine, None for the first; changes : those since `earlier`
    """

    folder: tuple[str, str]
    machine: Machine
    build: Build
    as_of: str
    table: TensorTable
    earlier: Build | None = None
    changes: Sequence[OutcomeChange] = ()

    @property
    def path(self) -> str:
        return f"machines/{self.folder[0]}/{self.folder[1]}/{FILE}"


def tensor_table(records: Iterable[TensorOperationRecord]) -> TensorTable:
    """Return the table of the newest record of each class and operation."""
    return TensorTable({(record.result.tensor, record.result.operation): record for record in records})


def tensor_pages(newest: dict[tuple[str, str], list[TensorOperationRecord]]) -> list[TensorPage]:
    """Return a page for each machine and build, each compared with the build before it on the same machine.

    newest : the newest records, at least one, by the names of the machine's folder and of the file
    """
    pages: list[TensorPage] = []
    for folder, records in sorted(newest.items(), key=lambda item: (item[0][0], build_age(item[1][-1].build))):
        last, table = records[-1], tensor_table(records)
        before = pages[-1] if pages and pages[-1].folder[0] == folder[0] else None
        pages.append(TensorPage(folder, last.machine, last.build, last.started_at, table,
                                before.build if before else None, _changes(before.table, table) if before else ()))
    return pages


def build_age(build: Build) -> tuple[str, str]:
    """Return a sort key for builds, oldest first."""
    return build.date or "", build.torch


def _changes(before: TensorTable, after: TensorTable) -> list[OutcomeChange]:
    both = {key: old for key in after.cells if (old := before.outcome(*key)) is not None}
    return [OutcomeChange(*key, old, new) for key, old in both.items()
            if (new := after.cells[key].result.outcome) is not old]

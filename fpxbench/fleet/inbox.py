"""Check the records that other machines deliver, and store each once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from fpxbench.builds.environments.specification import EnvironmentSpec
from fpxbench.fleet.fleet_messages import Task
from fpxbench.records.record import Build, Record
from fpxbench.records.store import MAX_LINE_BYTES, Store, first_mistake

Identity = tuple[str, str, int | None]
"""Case, start and seed, which identify a record of one build and machine."""


class Arrival(Enum):
    """How a delivered line was handled."""

    STORED = "stored"
    REPEATED = "repeated"
    """The same record is already in the store."""
    SUPERSEDED = "superseded"
    """Its case was measured again before it arrived."""
    REFUSED = "refused"
    """It is not a record that the task asked for."""


@dataclass(frozen=True)
class Asked:
    """The cases, build and machine that a node was asked to measure."""

    machine: str
    spec: EnvironmentSpec
    cases: frozenset[str]

    @classmethod
    def by(cls, task: Task) -> Asked:
        return cls(task.kind, task.spec, frozenset(case.id for case in task.cases))

    def read(self, line: str) -> Record:
        """Return the record of a line. Raise ValueError if the line is not a record, or was not asked for."""
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"a line of {len(line)} characters")
        record = Record.model_validate_json(line)
        if record.machine.name != self.machine:
            raise ValueError(f"a record of the machine {record.machine.name}, not of {self.machine}")
        if record.build.key != self.spec.key:
            raise ValueError(f"a record of PyTorch {record.build.torch}, not of {self.spec.tag}")
        if record.case.id not in self.cases:
            raise ValueError(f"a record of {record.case.id}, which the task does not have")
        return record


@dataclass
class _Known:
    """The stored records of one build on one machine."""

    identities: set[Identity] = field(default_factory=set)
    sources: dict[str, str] = field(default_factory=dict)
    """By case, the digest of the implementation that was measured. Cases to measure again are left out."""


class Inbox:
    """Appends records to `store`.

    timing : whether cases are timed: then one whose timing was turned off is to be measured again
    """

    def __init__(self, store: Store, *, timing: bool = True) -> None:
        self._store, self._timing = store, timing
        self._known: dict[tuple[str, str, str], _Known] = {}

    def measured(self, machine: str, build: Build, sources: dict[str, str], cases: Iterable[str]) -> set[str]:
        """Return those of `cases` that have a record of this build by the present implementation.

        Cases whose record does not answer the question (`Record.answers`) are left out.
        sources : digest of each implementation
        """
        known = self._of(machine, build).sources
        return {case for case in cases
                if case in known and known[case] == sources.get(case.partition("/")[0], known[case])}

    def take(self, line: str, asked: Asked, metadata: dict[str, object]) -> tuple[Arrival, Record | None, str]:
        """Store a line if it is a new record that was asked for; return the record, or why it is refused.

        metadata : the driver's facts about the device, added to the machine's facts
        """
        try:
            record = asked.read(line)
        except ValueError as error:
            return Arrival.REFUSED, None, first_mistake(error)
        machine = record.machine.name
        known, identity = self._of(machine, record.build), _identity(record)
        if identity in known.identities:
            return Arrival.REPEATED, record, ""
        if known.sources.get(record.case.id) == record.source:
            return Arrival.SUPERSEDED, record, ""
        facts = record.machine.facts | metadata
        record = record.model_copy(update={"machine": record.machine.model_copy(update={"facts": facts})})
        self._store.append(record)
        self._note(known, record)
        return Arrival.STORED, record, ""

    def flush(self, machine: str, build: Build) -> None:
        """Flush the stored records to disk. Afterwards the node may remove its copy."""
        path = self._store.file(machine, build)
        if path.exists():
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    def _of(self, machine: str, build: Build) -> _Known:
        key = machine, build.stem, build.key
        if key not in self._known:
            known = self._known[key] = _Known()
            path = self._store.file(machine, build)
            for record in self._store.read(path)[0] if path.exists() else []:
                if record.build.key == build.key:
                    self._note(known, record)
        return self._known[key]

    def _note(self, known: _Known, record: Record) -> None:
        known.identities.add(_identity(record))
        known.sources.pop(record.case.id, None)
        if record.answers(timed=self._timing):
            known.sources[record.case.id] = record.source


def _identity(record: Record) -> Identity:
    return record.case.id, record.started_at, record.seed

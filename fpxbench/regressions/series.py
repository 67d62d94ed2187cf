"""Series: a metric of one case on one machine over the builds of one channel and variant, in the timeline's order.

Two devices of one machine name are two machines. Releases and nightlies are two histories: a release is cut from a
branch that left the nightlies' weeks before, and its neighbours in time are not its neighbours in code. No machine's
clock takes part in the order: builds have dates of their own, and one without a date stands before the next version.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from fpxbench.builds.timeline import Entry, Timeline, in_order
from fpxbench.records.record import Build
from fpxbench.records.verdict import SEVERITY, Status
from fpxbench.regressions.series_index import METRICS, discard_index, machines, open_index

UNKNOWN_DAY = "9999-12-31"
PIECE = 50_000
"""Points that are read from the index at a time."""


@dataclass(frozen=True)
class Verdicts:
    """What a number in `Panel.verdicts` stands for."""

    status: str
    kind: str
    message: str
    """The summary without what varies from run to run."""
    summary: str

    @property
    def headline(self) -> str:
        return f"{self.status} ({self.kind})" if self.kind else self.status


@dataclass(frozen=True)
class Panel:
    """The series of every case on one device, for one channel and variant: arrays are `[cases, builds]`."""

    machine: str
    device: str
    variant: str
    channel: str
    cases: list[str]
    builds: list[Build]
    """Oldest first; each with its key and, where the timeline knows it, its date."""
    tags: list[str]
    metrics: dict[str, NDArray[np.float64]]
    """By name (`series_index.METRICS`); NaN where a case has none on a build."""
    verdict: NDArray[np.intp]
    """Key into `verdicts`; -1 where the case was not measured. A failure is a point as well as a success."""
    verdicts: dict[int, Verdicts]
    source: NDArray[np.intp]
    """Which source of the implementation; -1 where the case was not measured."""
    seed: NDArray[np.float64]
    outputs: NDArray[np.float64]
    """M·N of each case."""
    weights: NDArray[np.float64]
    """N·K of each case."""

    @cached_property
    def row(self) -> dict[str, int]:
        """By case."""
        return {case: number for number, case in enumerate(self.cases)}

    @cached_property
    def column(self) -> dict[str, int]:
        """By the key of the build."""
        return {build.key: number for number, build in enumerate(self.builds)}

    def tag_of(self, build: Build) -> str:
        """Return the tag of one of its builds."""
        return self.tags[self.column[build.key]]

    @cached_property
    def severity(self) -> NDArray[np.intp]:
        """Return each status's place in the order of severity [cases, builds]: 0 the worst, -1 where not measured."""
        places = np.full(max(self.verdicts, default=0) + 2, -1)
        for number, verdict in self.verdicts.items():
            places[number] = SEVERITY[Status(verdict.status)]
        return places[self.verdict]   # -1 picks the last, which is no verdict's


def panels(
    results: Path, timeline: Timeline | None = None, machine: str | None = None,
) -> Iterator[tuple[list[Panel], list[str]]]:
    """Yield the panels of each machine, or of one machine, and messages about its records.

    Raise ValueError if there is no such machine.
    """
    known = machines(results)
    if machine is not None and machine not in known:
        raise ValueError(f"no records of machine {machine!r} in {results}: there are {', '.join(known) or 'none'}")
    held = {entry.key: entry for entry in timeline.entries()} if timeline else {}
    for name in known if machine is None else [machine]:
        try:
            yield _of_machine(results, name, held)
        except sqlite3.DatabaseError:
            discard_index(results, name)
            yield _of_machine(results, name, held)


def _of_machine(results: Path, machine: str, held: dict[str, Entry]) -> tuple[list[Panel], list[str]]:
    with open_index(results, machine) as (connection, troubles):
        devices = [device for (device,) in connection.execute(
            "SELECT DISTINCT devices.name FROM points JOIN devices ON devices.id = device ORDER BY 1")]
        if len(devices) > 1:
            troubles.append(f"{machine} is the name of {len(devices)} machines: {', '.join(devices)}; "
                            "each has its own series. FPX_MACHINE or --machine gives one another name")
        return list(_panels(connection, machine, held, troubles)), troubles


def _panels(
    connection: sqlite3.Connection, machine: str, held: dict[str, Entry], troubles: list[str],
) -> Iterator[Panel]:
    verdicts = {row[0]: Verdicts(*row[1:])
                for row in connection.execute("SELECT id, status, kind, message, summary FROM verdicts")}
    builds = {number: Build.model_validate_json(build)
              for number, build in connection.execute("SELECT id, build FROM builds")}
    order, tags, dates = _order(builds, held, troubles)
    groups: dict[tuple[int, str, str], list[int]] = {}
    for device, number in connection.execute("SELECT DISTINCT device, build FROM points"):
        if number in order:
            groups.setdefault((device, builds[number].variant, builds[number].channel), []).append(number)
    names = dict(connection.execute("SELECT id, name FROM devices"))
    in_order = sorted(groups.items(), key=lambda group: (names[group[0][0]], *group[0][1:]))
    for (device, variant, channel), numbers in in_order:
        numbers.sort(key=order.__getitem__)
        yield _panel(connection, (machine, names[device], variant, channel), device, numbers,
                     [builds[n].model_copy(update={"date": dates[n]}) for n in numbers], [tags[n] for n in numbers],
                     verdicts)


def _order(
    builds: dict[int, Build], held: dict[str, Entry], troubles: list[str],
) -> tuple[dict[int, int], dict[int, str], dict]:
    """Return place, tag and date of each build by its number; a build whose version is none has no place."""
    entries = dict(held)
    for build in builds.values():
        try:
            Version(build.label)
            if build.key not in entries:
                entries[build.key] = Entry.of(build, UNKNOWN_DAY)
        except InvalidVersion:
            troubles.append(f"{build.torch!r} is no version, so its records have no place in time: left out")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            troubles.append(f"PyTorch {build.torch}: {first['loc'][0]} {first['input']!r} cannot be, "
                            "so its records have no place in time: left out")
    placed = {entry.key: (place, entry) for place, entry in enumerate(in_order(entries.values()))}
    known = {number: placed[build.key] for number, build in builds.items() if build.key in placed}
    return ({number: place for number, (place, _) in known.items()},
            {number: entry.tag for number, (_, entry) in known.items()},
            {number: entry.date for number, (_, entry) in known.items()})


def _panel(connection: sqlite3.Connection, names: tuple[str, str, str, str], device: int, numbers: list[int],
           builds: list[Build], tags: list[str], verdicts: dict[int, Verdicts]) -> Panel:
    column = {number: index for index, number in enumerate(numbers)}
    marks = ", ".join("?" * len(numbers))
    rows = connection.execute(
        f'SELECT build, "case", verdict, source, seed, {", ".join(METRICS)} FROM points '
        f'WHERE device = ? AND build IN ({marks})',
        (device, *numbers))
    # In pieces: a million points as Python numbers are half a gigabyte.
    table = np.concatenate([np.array(piece, dtype=np.float64) for piece in iter(lambda: rows.fetchmany(PIECE), [])])
    case_numbers, row = np.unique(table[:, 1].astype(np.intp), return_inverse=True)
    columns = np.array([column[int(number)] for number in table[:, 0]])
    shape = len(case_numbers), len(numbers)

    def laid_out(values: NDArray[np.float64], missing: float) -> NDArray:
        array = np.full(shape, missing)
        array[row, columns] = values
        return array

    known = {number: (name, outputs, weights)
             for number, name, outputs, weights in connection.execute("SELECT id, name, outputs, weights FROM cases")}
    cases = [known[number] for number in case_numbers]
    return Panel(
        *names, cases=[name for name, _, _ in cases], builds=builds, tags=tags,
        metrics={name: laid_out(table[:, 5 + index], np.nan) for index, name in enumerate(METRICS)},
        verdict=laid_out(table[:, 2], -1).astype(np.intp), verdicts=verdicts,
        source=laid_out(table[:, 3], -1).astype(np.intp),
        seed=laid_out(table[:, 4], np.nan), outputs=np.array([outputs for _, outputs, _ in cases], dtype=float),
        weights=np.array([weights for _, _, weights in cases], dtype=float),
    )

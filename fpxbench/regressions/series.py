"""Series: a metric of one case on one machine over the builds of one channel and variant, in the timeline's order.

Two devices under one machine name are two machines. Releases and nightlies are separate histories: a release is cut
from a branch that diverged weeks before, so its neighbours in time are not its neighbours in code. The order does not
depend on a machine's clock: builds have their own dates, and one without a date precedes the next version.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from fpxbench.builds.timeline import Entry, Timeline, in_order
from fpxbench.records.record import Build
from fpxbench.records.store import Store
from fpxbench.records.verdict import SEVERITY, Status

if TYPE_CHECKING:       # imports polars, which most importers of this module do not need
    from fpxbench.regressions.index_points import Points

UNKNOWN_DAY = "9999-12-31"


@dataclass(frozen=True)
class Verdicts:
    """A verdict that `Panel.verdict` refers to by index."""

    status: str
    kind: str
    message: str
    """The summary without the parts that vary from run to run."""
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
    """Oldest first; each with its key and, if the timeline knows it, its date."""
    tags: list[str]
    metrics: dict[str, NDArray[np.float64]]
    """Name (`series_index.METRICS`) -> values; NaN where a case has none on a build."""
    verdict: NDArray[np.int32]
    """Index into `verdicts`; -1 where the case was not measured. Failures are points too."""
    verdicts: list[Verdicts]
    source: NDArray[np.int32]
    """Number of the implementation's source; -1 where the case was not measured."""
    seed: NDArray[np.float64]
    outputs: NDArray[np.float64]
    """M·N of each case."""
    weights: NDArray[np.float64]
    """N·K of each case."""

    @cached_property
    def row(self) -> dict[str, int]:
        """Case -> row."""
        return {case: number for number, case in enumerate(self.cases)}

    @cached_property
    def column(self) -> dict[str, int]:
        """Build key -> column."""
        return {build.key: number for number, build in enumerate(self.builds)}

    def tag_of(self, build: Build) -> str:
        """Return the tag of one of the panel's builds."""
        return self.tags[self.column[build.key]]

    @cached_property
    def severity(self) -> NDArray[np.intp]:
        """Rank of each status [cases, builds] by severity: 0 is the worst, -1 not measured."""
        places = np.array([*(SEVERITY[Status(verdict.status)] for verdict in self.verdicts), -1])
        return places[self.verdict]   # -1 picks the last


def panels(
    results: Path, timeline: Timeline | None = None, machine: str | None = None,
) -> Iterator[tuple[list[Panel], list[str]]]:
    """Yield the panels of each machine, or of one, and messages about its records.

    Raise ValueError for a machine without records.
    """
    entries = timeline.entries() if timeline else []
    for name in machine_names(results, machine):
        yield panels_of(results, name, entries)


def machine_names(results: Path, machine: str | None = None) -> list[str]:
    """Return the machines with records, or only `machine`. Raise ValueError if that one has none."""
    store = Store(results)
    if machine is None:
        return store.machines()
    if not store.files(machine):
        there = ", ".join(store.machines()) or "none"
        raise ValueError(f"no records of machine {machine!r} in {results}: there are {there}")
    return [machine]


def panels_of(results: Path, machine: str, entries: Iterable[Entry] = ()) -> tuple[list[Panel], list[str]]:
    """Return the panels of one machine and messages about its records. `entries` are the timeline's."""
    from fpxbench.regressions.series_index import DamagedIndexError, discard_index

    known = {entry.key: entry for entry in entries}
    try:
        return _of_machine(results, machine, known)
    except DamagedIndexError as error:
        discard_index(results, machine)
        found, troubles = _of_machine(results, machine, known)
        return found, [f"the series index of {machine} is damaged and was rebuilt from the records: {error}",
                       *troubles]


def _of_machine(results: Path, machine: str, held: dict[str, Entry]) -> tuple[list[Panel], list[str]]:
    from fpxbench.regressions.index_points import Points
    from fpxbench.regressions.series_index import open_index, reading_parts

    with open_index(results, machine) as (parts, troubles), reading_parts():
        points = Points.read(parts)
        if len(points.devices) > 1:
            troubles.append(f"{machine} is the name of {len(points.devices)} machines: {', '.join(points.devices)}; "
                            "each has its own series. Rename one with FPX_MACHINE or --machine")
        return list(_panels(points, machine, held, troubles)), troubles


def _panels(points: Points, machine: str, held: dict[str, Entry], troubles: list[str]) -> Iterator[Panel]:
    order, tags, dates = _order(dict(enumerate(points.builds)), held, troubles)
    groups: dict[tuple[int, str, str], list[int]] = {}
    for device, number in points.measured():
        if number in order:
            build = points.builds[number]
            groups.setdefault((device, build.variant, build.channel), []).append(number)
    layouts = []
    for (device, _, _), numbers in sorted(groups.items()):
        numbers.sort(key=order.__getitem__)
        layouts.append((numbers, points.layout(device, numbers)))
    # One column of the index in memory at a time.
    arrays = [points.arranged([layout for _, layout in layouts], name) for name in points.NUMBERS]
    for (device, variant, channel), (numbers, layout), *columns in zip(sorted(groups), layouts, *arrays, strict=True):
        numbers_of = dict(zip(points.NUMBERS, columns, strict=True))
        seed, outputs, weights = (numbers_of.pop(name) for name in ("seed", "outputs", "weights"))
        yield Panel(
            machine, points.devices[device], variant, channel, cases=[points.cases[case] for case in layout.cases],
            builds=[points.builds[n].model_copy(update={"date": dates[n]}) for n in numbers],
            tags=[tags[n] for n in numbers], metrics=numbers_of,
            verdict=layout.arranged(points.verdict, -1), verdicts=points.verdicts,
            source=layout.arranged(points.source, -1), seed=seed,
            outputs=np.nanmax(outputs, axis=1), weights=np.nanmax(weights, axis=1))


def _order(
    builds: dict[int, Build], held: dict[str, Entry], troubles: list[str],
) -> tuple[dict[int, int], dict[int, str], dict]:
    """Return place, tag and date of each build by its number; a build without a valid version is left out."""
    entries = dict(held)
    for build in builds.values():
        try:
            Version(build.label)
            if build.key not in entries:
                entries[build.key] = Entry.of(build, UNKNOWN_DAY)
        except InvalidVersion:
            troubles.append(f"{build.torch!r} is not a version, so its records have no place in time: left out")
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            troubles.append(f"PyTorch {build.torch}: {first['loc'][0]} {first['input']!r} is invalid, "
                            "so its records have no place in time: left out")
    placed = {entry.key: (place, entry) for place, entry in enumerate(in_order(entries.values()))}
    known = {number: placed[build.key] for number, build in builds.items() if build.key in placed}
    return ({number: place for number, (place, _) in known.items()},
            {number: entry.tag for number, (_, entry) in known.items()},
            {number: entry.date for number, (_, entry) in known.items()})

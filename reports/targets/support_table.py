"""The support matrix: operations and formats on GPU architectures, over Triton builds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from fpxbench.records.kinds import Kind
from fpxbench.records.store import BrokenLine
from fpxbench.records.verdict import Status
from fpxbench.reports.targets.support_cell import SupportCell, cell_of
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.matrix import Matrix, OperationSummary, Probe, read_matrix
from fpxbench.targets.version_spans import rows

FILE = "targets.json"
SHIPPED = Path(__file__).with_name(FILE)
INDEX = "support/index.html"
MOST_KERNELS_NAMED = 3

_FORMAT_CONFUSED = frozenset({Kind.FNUZ_AS_FN, Kind.FN_AS_FNUZ, Kind.GIBBERISH})


def chosen_matrix(results: Path) -> tuple[Matrix, Path, list[BrokenLine]]:
    """Return the newer of the package's matrix and the results folder's, and its file. A file without a valid matrix is
    returned as a broken line."""
    shipped, own = read_matrix(SHIPPED), results / FILE
    if not own.is_file():
        return shipped, SHIPPED, []
    try:
        matrix = read_matrix(own)
        if all(build.unusable for build in matrix.builds):
            raise ValueError("has no usable build")
    except (OSError, ValueError) as error:
        return shipped, SHIPPED, [BrokenLine(own, 1, str(error).removeprefix(f"{own} "))]
    return (matrix, own, []) if _utc(matrix.generated) >= _utc(shipped.generated) else (shipped, SHIPPED, [])


def _utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


@dataclass(frozen=True)
class SupportRow:
    """An operation with a format: a line of the table, with a page of its own."""

    operation: OperationSummary
    format: str
    probes: tuple[Probe, ...]
    cells: Mapping[str, SupportCell]
    """Cells of the tested architectures, by name."""
    page: str
    """File name, in the folder of the table."""


@dataclass(frozen=True)
class Miscompile:
    """One way in which kernels are miscompiled, on all affected architectures."""

    format: str
    kind: Kind | None
    cause: str
    evidence: str
    """The evidence of one of the cells."""
    what: tuple[str, ...]
    """Titles of operations, with their kernels if not all are affected: ``decode (bf16)``."""
    builds: Mapping[str, frozenset[int]]
    """Indices of builds, by architecture."""
    versions: tuple[str, ...]
    """Versions of all builds."""
    page: str
    """Page of its first row."""

    @property
    def lasts(self) -> bool:
        """Whether the newest build is affected."""
        return any(len(self.versions) - 1 in at for at in self.builds.values())

    def made_by(self, triton: str, architecture: str) -> bool:
        """Return whether that version of Triton is affected on `architecture`."""
        return any(self.versions[at] == triton for at in self.builds.get(architecture, ()))

    def message(self, architecture: str = "") -> str:
        """Return the cause, architectures and builds as text, for one `architecture` or all."""
        where = defaultdict(list)
        for name, at in self.builds.items():
            if architecture in ("", name):
                where[self._when(at)].append(name)
        places = "; ".join(f"{', '.join(names)} with {when}" for when, names in where.items())
        return f"{' and '.join(self.what)} of {self.format}: {self.cause}: {places}."

    def _when(self, positions: Iterable[int]) -> str:
        ranges: list[list[int]] = []
        for at in sorted(positions):
            if ranges and ranges[-1][1] == at - 1:
                ranges[-1][1] = at
            else:
                ranges.append([at, at])
        return "Triton " + " and ".join(map(self._range, ranges))

    def _range(self, of: Sequence[int]) -> str:
        first, last = self.versions[of[0]], self.versions[of[1]]
        if of[1] == len(self.versions) - 1:
            return f"{first} and later" if of[0] < of[1] else first
        return first if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class _MiscompiledCell:
    """A miscompiled kernel in one cell."""

    row: SupportRow
    probe: Probe
    architecture: str
    builds: range
    message: str


def detail(probe: Probe) -> str:
    """Return a probe's name without operation and format: ``bf16-rtne`` of ``encode/e5m2/bf16-rtne``."""
    return probe.id.removeprefix(f"{probe.operation}/{probe.format}/")


def _some_of(row: SupportRow, kernels: list[str]) -> str:
    if len(kernels) == len(row.probes):
        return row.operation.title
    named = ", ".join(kernels) if len(kernels) <= MOST_KERNELS_NAMED else f"{len(kernels)} of {len(row.probes)} kernels"
    return f"{row.operation.title} ({named})"


@dataclass(frozen=True)
class Gpu:
    """A GPU in the report's records."""

    device: str
    triton: str
    """Version of Triton in the newest records; may be empty."""


@dataclass(frozen=True)
class SupportMatrix:
    """A matrix, and the GPUs of the report that shows it."""

    matrix: Matrix
    shipped: bool
    """Whether it is the package's own."""
    gpus: Mapping[str, Gpu]
    """By architecture."""

    @property
    def own(self) -> list[Architecture]:
        """Architectures of the matrix that are among the report's machines."""
        return [architecture for architecture in self.matrix.architectures if architecture.name in self.gpus]

    @property
    def versions(self) -> list[str]:
        return [build.triton for build in self.matrix.builds if not build.unusable]

    @cached_property
    def rows(self) -> list[SupportRow]:
        summaries = {operation.name: operation for operation in self.matrix.operations}
        found, used = [], {"index"}
        for operation, fmt, probes in rows(self.matrix):
            cells = {name: cell for architecture in self.matrix.architectures
                     if (cell := cell_of(self.matrix, probes, name := architecture.name))}
            summary = summaries.get(operation) or OperationSummary(name=operation, title=operation, about="")
            found.append(SupportRow(summary, fmt, tuple(probes), cells,
                                    f"{file_name(f'{operation}-{fmt}', used)}.html"))
        return found

    @property
    def sections(self) -> list[tuple[OperationSummary, list[SupportRow]]]:
        grouped: dict[str, list[SupportRow]] = defaultdict(list)
        for row in self.rows:
            grouped[row.operation.name].append(row)
        return [(of[0].operation, of) for of in grouped.values()]

    @cached_property
    def miscompiles(self) -> list[Miscompile]:
        """Confused formats first, then those on the newest build, then the most widespread."""
        groups: dict[tuple[str, Kind | None, str], list[_MiscompiledCell]] = defaultdict(list)
        for row in self.rows:
            for probe in row.probes:
                for architecture, runs in probe.cells.items():
                    for run in runs:
                        if (outcome := self.matrix.outcomes[run.outcome]).status is Status.WRONG:
                            at = range(run.builds[0], run.builds[1] + 1)
                            groups[row.format, outcome.kind, outcome.cause].append(
                                _MiscompiledCell(row, probe, architecture, at, outcome.message))
        found = [self._miscompile(fmt, kind, cause, seen) for (fmt, kind, cause), seen in groups.items()]
        return sorted(found, key=lambda one: (one.kind not in _FORMAT_CONFUSED, not one.lasts,
                                              -sum(map(len, one.builds.values()))))

    def _miscompile(self, fmt: str, kind: Kind | None, cause: str, seen: Sequence[_MiscompiledCell]) -> Miscompile:
        builds: dict[str, set[int]] = defaultdict(set)
        kernels: dict[str, dict[str, None]] = defaultdict(dict)
        rows = {one.row.page: one.row for one in seen}
        for one in seen:
            builds[one.architecture].update(one.builds)
            kernels[one.row.page][detail(one.probe)] = None
        ordered = {a.name: frozenset(builds[a.name]) for a in self.matrix.architectures if a.name in builds}
        what = tuple(_some_of(rows[page], list(some)) for page, some in kernels.items())
        return Miscompile(fmt, kind, cause, seen[0].message, what, ordered,
                          tuple(build.triton for build in self.matrix.builds), seen[0].row.page)

    def miscompiles_on(self, architecture: str) -> list[Miscompile]:
        """Return the miscompiles on `architecture`, those of the Triton version in the report's records first."""
        triton = self.gpus[architecture].triton
        found = [miscompile for miscompile in self.miscompiles if architecture in miscompile.builds]
        return sorted(found, key=lambda miscompile: not miscompile.made_by(triton, architecture))


def file_name(text: str, used: set[str]) -> str:
    """Return `text` as a file name that is not in `used`, and add it."""
    stem = re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")[:80] or "row"
    name, number = stem, 1
    while name in used:
        number += 1
        name = f"{stem}-{number}"
    used.add(name)
    return name

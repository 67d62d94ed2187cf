"""Which GPU takes what, since when: the matrix of targets as the support page shows it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from fpxbench.store import BrokenLine
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.history import SOME, Span, in_words, rows, spans, states
from fpxbench.targets.matrix import Matrix, OperationSummary, Outcome, Probe, read_matrix
from fpxbench.verdict import BROKEN, Kind, Status

FILE = "targets.json"
SHIPPED = Path(__file__).with_name("support") / FILE
INDEX = "support/index.html"
MOST_EARLIER = 2
"""Lines of a cell about earlier builds. Wrong ones are never left out."""

MOST_KERNELS_NAMED = 3

_MISREAD = frozenset({Kind.FNUZ_AS_FN, Kind.FN_AS_FNUZ, Kind.GIBBERISH})


def chosen_matrix(results: Path) -> tuple[Matrix, Path, list[BrokenLine]]:
    """The newer of the matrix that comes with the package and that of the results folder, and its file; what is no matrix is a broken line."""
    shipped, own = read_matrix(SHIPPED), results / FILE
    if not own.is_file():
        return shipped, SHIPPED, []
    try:
        matrix = read_matrix(own)
        if all(build.unusable for build in matrix.builds):
            raise ValueError("has no build that could be asked")
    except (OSError, ValueError) as error:
        return shipped, SHIPPED, [BrokenLine(own, 1, str(error).removeprefix(f"{own} "))]
    return (matrix, own, []) if _utc(matrix.generated) >= _utc(shipped.generated) else (shipped, SHIPPED, [])


def _utc(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Cell:
    """An operation with a format on an architecture."""

    history: tuple[Span, ...]
    """Not empty."""
    changed: tuple[str, ...]
    """Builds on which the status of any of its probes became another. That a build knows the architecture at last is no change."""
    wrong: bool
    """On any build: compiles, and computes something else."""
    checked: int
    """Of the probes that are ok on the newest build: those of which more is known than that they compile."""

    @property
    def now(self) -> Span:
        return self.history[-1]

    @property
    def unchecked(self) -> bool:
        return self.now.state.status is Status.OK and self.checked < self.now.state.ok

    @property
    def some(self) -> bool:
        """Whether some of its probes are ok on the newest build and others are not, none of them wrong."""
        return self.now.state.sign == SOME

    @property
    def word(self) -> str:
        """What the newest build's sign needs beside it: ``wrong``, ``3 of 10``, ``never``; nothing where the sign says it all."""
        state = self.now.state
        if self.some:
            return f"{state.ok} of {state.asked}"
        if state.status in (Status.OK, Status.WRONG):
            return "" if state.status is Status.OK else "wrong"
        return "" if self._worked else "never"

    @property
    def since(self) -> str:
        """``since 3.3.1`` of what is ok or wrong, ``until 3.4`` of what was ok; nothing if it was always as it is."""
        *before, now = self.history
        if now.state.status in (Status.OK, Status.WRONG):
            return f"since {_short(now.first)}" if before else ""
        return f"until {_short(self._worked[-1].last)}" if self._worked else ""

    @property
    def _worked(self) -> list[Span]:
        return [span for span in self.history if span.state.status is Status.OK]

    @property
    def earlier(self) -> list[str]:
        """What was broken on earlier builds, newest first: ``3.0–3.1 wrong``."""
        broken = [span for span in reversed(self.history[:-1]) if span.state.status in BROKEN]
        kept = [span for at, span in enumerate(broken) if span.state.status is Status.WRONG or at < MOST_EARLIER]
        return [f"{_range(span)} {span.state.status}" for span in kept] + ["…"] * (len(kept) < len(broken))

    @property
    def title(self) -> str:
        compiled_only = f"; {self.now.state.ok - self.checked} of {self.now.state.ok} ok only compiled, not checked" if self.unchecked else ""
        return in_words(self.history) + compiled_only


def _short(version: str) -> str:
    return version.removesuffix(".0")


def _range(span: Span) -> str:
    return _short(span.first) if span.first == span.last else f"{_short(span.first)}–{_short(span.last)}"


@dataclass(frozen=True)
class Row:
    """An operation with a format: a line of the table, with a page of its own."""

    operation: OperationSummary
    format: str
    probes: tuple[Probe, ...]
    cells: Mapping[str, Cell]
    """By architecture, those that were asked."""
    page: str
    """File name, beside the table's."""


@dataclass(frozen=True)
class Mistake:
    """One way in which what compiles computes something else, wherever it does."""

    format: str
    kind: Kind | None
    cause: str
    evidence: str
    """Of one of the cells."""
    what: tuple[str, ...]
    """Operations by title, with the kernels if only some of an operation's do it: ``decode (bf16)``."""
    builds: Mapping[str, frozenset[int]]
    """Positions of the builds, by architecture."""
    versions: tuple[str, ...]
    """Of all builds."""
    page: str
    """Of the first of its rows."""

    @property
    def lasts(self) -> bool:
        """Whether the newest build makes it."""
        return any(len(self.versions) - 1 in at for at in self.builds.values())

    def made_by(self, triton: str, architecture: str) -> bool:
        """Whether that version of Triton makes it there."""
        return any(self.versions[at] == triton for at in self.builds.get(architecture, ()))

    def sentence(self, architecture: str = "") -> str:
        """What is wrong, where and since when; on one architecture only if one is given."""
        where = defaultdict(list)
        for name, at in self.builds.items():
            if architecture in ("", name):
                where[self._when(at)].append(name)
        said = "; ".join(f"{', '.join(names)} with {when}" for when, names in where.items())
        return f"{' and '.join(self.what)} of {self.format}: {self.cause}: {said}."

    def _when(self, positions: Iterable[int]) -> str:
        ranges: list[list[int]] = []
        for at in sorted(positions):
            if ranges and ranges[-1][1] == at - 1:
                ranges[-1][1] = at
            else:
                ranges.append([at, at])
        return "Triton " + " and ".join(map(self._said, ranges))

    def _said(self, of: Sequence[int]) -> str:
        first, last = self.versions[of[0]], self.versions[of[1]]
        if of[1] == len(self.versions) - 1:
            return f"{first} and later" if of[0] < of[1] else first
        return first if first == last else f"{first} to {last}"


@dataclass(frozen=True)
class _Seen:
    """A mistake in one cell."""

    row: Row
    probe: Probe
    architecture: str
    builds: range
    words: str


def detail(probe: Probe) -> str:
    """What a probe has beside operation and format: ``bf16-rtne`` of ``encode/e5m2/bf16-rtne``."""
    return probe.id.removeprefix(f"{probe.operation}/{probe.format}/")


def _some_of(row: Row, kernels: list[str]) -> str:
    if len(kernels) == len(row.probes):
        return row.operation.title
    return f"{row.operation.title} ({', '.join(kernels) if len(kernels) <= MOST_KERNELS_NAMED else f'{len(kernels)} of {len(row.probes)} kernels'})"


@dataclass(frozen=True)
class Gpu:
    """One that the report has records of."""

    device: str
    triton: str
    """Version, of the newest records; empty if there is none."""


@dataclass(frozen=True)
class Support:
    """A matrix, and the GPUs of the report that it is shown in."""

    matrix: Matrix
    shipped: bool
    """Whether it is the one that comes with the package."""
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
    def rows(self) -> list[Row]:
        summaries = {operation.name: operation for operation in self.matrix.operations}
        found, taken = [], {"index"}
        for operation, fmt, probes in rows(self.matrix):
            cells = {name: cell for architecture in self.matrix.architectures if (cell := _cell(self.matrix, probes, name := architecture.name))}
            summary = summaries.get(operation) or OperationSummary(name=operation, title=operation, about="")
            found.append(Row(summary, fmt, tuple(probes), cells, f"{file_name(f'{operation}-{fmt}', taken)}.html"))
        return found

    @property
    def sections(self) -> list[tuple[OperationSummary, list[Row]]]:
        grouped: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            grouped[row.operation.name].append(row)
        return [(of[0].operation, of) for of in grouped.values()]

    @cached_property
    def mistakes(self) -> list[Mistake]:
        """Formats taken for others first, then what the newest build still does, then what is wrong in most places."""
        groups: dict[tuple, list[_Seen]] = defaultdict(list)
        for row in self.rows:
            for probe in row.probes:
                for architecture, runs in probe.cells.items():
                    for run in runs:
                        if (outcome := self.matrix.outcomes[run.outcome]).status is Status.WRONG:
                            at = range(run.builds[0], run.builds[1] + 1)
                            groups[row.format, outcome.kind, outcome.cause].append(_Seen(row, probe, architecture, at, outcome.words))
        found = [self._mistake(*key, seen) for key, seen in groups.items()]
        return sorted(found, key=lambda one: (one.kind not in _MISREAD, not one.lasts, -sum(map(len, one.builds.values()))))

    def _mistake(self, fmt: str, kind: Kind | None, cause: str, seen: Sequence[_Seen]) -> Mistake:
        builds: dict[str, set[int]] = defaultdict(set)
        kernels: dict[str, dict[str, None]] = defaultdict(dict)
        rows = {one.row.page: one.row for one in seen}
        for one in seen:
            builds[one.architecture].update(one.builds)
            kernels[one.row.page][detail(one.probe)] = None
        ordered = {a.name: frozenset(builds[a.name]) for a in self.matrix.architectures if a.name in builds}
        what = tuple(_some_of(rows[page], list(some)) for page, some in kernels.items())
        return Mistake(fmt, kind, cause, seen[0].words, what, ordered, tuple(build.triton for build in self.matrix.builds), seen[0].row.page)

    def mistakes_on(self, architecture: str) -> list[Mistake]:
        """Those of the Triton that the report's records were made with first."""
        triton = self.gpus[architecture].triton
        found = [mistake for mistake in self.mistakes if architecture in mistake.builds]
        return sorted(found, key=lambda mistake: not mistake.made_by(triton, architecture))


def _cell(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> Cell | None:
    history = tuple(spans(matrix, probes, architecture))
    if not history:
        return None
    newest = max(at for at, state in enumerate(states(matrix, probes, architecture)) if state)
    runs = [matrix.outcomes[run.outcome] for probe in probes for run in probe.cells.get(architecture, ())]
    return Cell(
        history, _changed(matrix, probes, architecture), any(outcome.status is Status.WRONG for outcome in runs),
        checked(matrix, probes, architecture, newest))


def checked(matrix: Matrix, probes: Sequence[Probe], architecture: str, build: int) -> int:
    """How many probes are ok on the build at that position and known better than that they compile."""
    outcomes = (matrix.outcome_of(probe, architecture, build) for probe in probes)
    return sum(outcome is not None and outcome.status is Status.OK and outcome.check != "none" for outcome in outcomes)


def _changed(matrix: Matrix, probes: Sequence[Probe], architecture: str) -> tuple[str, ...]:
    positions = set()
    for probe in probes:
        before = Status.MISSING
        for run in probe.cells.get(architecture, ()):
            status = matrix.outcomes[run.outcome].status
            if before not in (Status.MISSING, status):
                positions.add(run.builds[0])
            before = status
    return tuple(matrix.builds[at].triton for at in sorted(positions))


def file_name(text: str, taken: set[str]) -> str:
    """`text` as a file's name that is not taken yet."""
    stem = re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-.")[:80] or "row"
    name, number = stem, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name

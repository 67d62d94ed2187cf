"""One sweep as the pages show it: a small row for each case, the matrix, and the choice of schemes.

After the pages of the records are written, only the rows stay in memory.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, zip_longest
from statistics import median
from urllib.parse import quote, urlencode

from packaging.version import InvalidVersion, Version

from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.record import Build, Flag, Machine, Record
from fpxbench.records.verdict import BROKEN, SEVERITY, Status
from fpxbench.reports.history.status_history import StatusHistory
from fpxbench.reports.sweep.case_row import DENSE_SCHEMES, SLOW_BELOW, CaseRow

LEAST_GAIN_DB = 0.5
"""SQNR in dB that a slower scheme must gain over a faster one to be recommended too."""


def _element_bits(scheme: str) -> int:
    """Return the bits of a stored element, without scales; 0 for an unknown scheme."""
    try:
        fmt = scheme_named(scheme).format
    except ValueError:
        return 0
    return fmt.bits if fmt else 16


@dataclass(frozen=True)
class MatrixCell:
    """All cases of one implementation with one scheme."""

    rows: tuple[CaseRow, ...]

    @cached_property
    def worst(self) -> Status:
        """The worst status of the cases that ran, or of all cases if none did."""
        ran = [row.status for row in self.rows if row.status not in (Status.UNSUPPORTED, Status.MISSING)]
        return min(ran or [row.status for row in self.rows], key=SEVERITY.__getitem__)

    @cached_property
    def as_bad(self) -> int:
        """Number of cases with the worst status."""
        return sum(row.status is self.worst for row in self.rows)

    @cached_property
    def speedup(self) -> float | None:
        """Median over the timed cases, without those hidden by noise; None if none is left, and for dense, which would
        be compared with itself."""
        speedups = [row.times_dense for row in self._timed if not row.hidden_by_noise]
        return median(speedups) if speedups else None

    @property
    def noisy(self) -> bool:
        """Whether cases were timed, but noise hides every speedup."""
        return bool(self._timed) and self.speedup is None

    @property
    def _timed(self) -> list[CaseRow]:
        return [row for row in self.rows if row.speedup is not None and row.quantized]

    @cached_property
    def since(self) -> str:
        """``since 2.12.0 (3 builds)`` for the case that has had the worst status longest; empty if none is broken."""
        histories = [row.status_history for row in self.rows if row.status is self.worst and row.broken
                     and row.status_history]
        return max(histories, key=lambda history: history.builds).summary if histories else ""

    @cached_property
    def recent(self) -> list[tuple[Status | None, int]]:
        """Runs of the worst status of its cases, oldest build first: (status, number of builds), None if none was
        measured. Empty if the status never changed."""
        # Aligned at the newest build: records of one file may be of builds on several timelines.
        recents = [reversed(row.status_history.recent) for row in self.rows if row.status_history]
        worst = [min((status for status in column if status), key=SEVERITY.__getitem__, default=None)
                 for column in zip_longest(*recents)]
        runs = [(status, len(list(run))) for status, run in groupby(reversed(worst))]
        return runs if any(status not in (None, self.worst) for status, _ in runs) else []

    @property
    def slow(self) -> bool:
        """Whether it is correct, but slower than dense in the median."""
        fast = self.speedup is None or self.speedup >= SLOW_BELOW
        return self.worst is Status.OK and not fast and self.rows[0].quantized

    @cached_property
    def over_roofline(self) -> bool:
        return any(Flag.OVER_ROOFLINE in row.flags for row in self.rows)


@dataclass(frozen=True)
class SchemeChoice:
    """One scheme with its size, accuracy and fastest cases, for choosing a scheme."""

    scheme: str
    bits_per_weight: float | None
    """The fewest that a correct implementation stores."""
    sqnr_db: float | None
    of_canaries: bool
    """Whether size and SQNR were measured only on canaries, which are small shapes."""
    right: tuple[str, ...]
    """Implementations that are correct in all their cases of this scheme."""
    broken: tuple[str, ...]
    """Implementations that fail in some case."""
    fastest: dict[int, CaseRow]
    """By M, the correct case with the largest `ranking_speedup`."""
    slower: frozenset[int] = frozenset()
    """Each M at which every correct case is slower than dense by more than its noise."""


@dataclass(frozen=True)
class NotMeasured:
    """Cases that were not run or not timed, for one reason."""

    status: Status
    """``ok`` for correct cases without a timing."""
    reason: str
    rows: tuple[CaseRow, ...]

    @property
    def implementations(self) -> list[str]:
        return sorted({row.case.implementation for row in self.rows})

    @property
    def schemes(self) -> list[str]:
        return sorted({row.case.scheme for row in self.rows})


@dataclass(frozen=True)
class SweepHeading:
    """A sweep without its cases, as lists of sweeps show it."""

    folder: tuple[str, str]
    """Names of its machine's folder and of its records file in the results folder."""
    machine: Machine
    build: Build
    as_of: str
    """When its newest record was started."""
    counts: dict[Status, int]
    """Number of cases by status, in order of severity, without zeros."""

    def heading(self) -> SweepHeading:
        """Return the sweep without its cases."""
        return SweepHeading(self.folder, self.machine, self.build, self.as_of, self.counts)

    @property
    def path(self) -> str:
        """URL of its folder, relative to the site's root, with a trailing slash."""
        machine, build = self.folder
        return f"machines/{quote(machine)}/{quote(build)}/"

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def not_run(self) -> int:
        """Number of cases that were not run (unsupported or missing)."""
        return self.counts.get(Status.UNSUPPORTED, 0) + self.counts.get(Status.MISSING, 0)

    @property
    def broken(self) -> int:
        return sum(count for status, count in self.counts.items() if status in BROKEN)

    @property
    def series(self) -> tuple[str, str, str]:
        """Machine's folder, channel and variant, which successive builds have in common."""
        return self.folder[0], self.build.channel, self.build.variant

    @property
    def age(self) -> tuple:
        """Sort key for the sweeps of a series, oldest first."""
        try:
            version = Version(self.build.torch)
        except InvalidVersion:
            version = Version("0")
        return self.build.date or "", version, self.as_of


@dataclass(frozen=True)
class SweepTable(SweepHeading):
    """A sweep with its cases: the newest record of each case of one records file."""

    rows: tuple[CaseRow, ...]

    @cached_property
    def implementations(self) -> list[str]:
        return sorted({row.case.implementation for row in self.rows})

    @cached_property
    def schemes(self) -> list[str]:
        """Schemes by descending bits of an element, then by name, so that every machine has the same order."""
        return sorted({row.case.scheme for row in self.rows}, key=lambda name: (-_element_bits(name), name))

    @cached_property
    def workloads(self) -> list[str]:
        return sorted({row.case.workload for row in self.rows})

    @cached_property
    def rivals(self) -> dict[tuple[str, str], list[CaseRow]]:
        """Competing cases, by (scheme, layer)."""
        grouped: dict[tuple[str, str], list[CaseRow]] = defaultdict(list)
        for row in self.rows:
            grouped[row.case.scheme, row.case.layer].append(row)
        return grouped

    @cached_property
    def has_energy(self) -> bool:
        """Whether the energy of any case was measured."""
        return any(row.joules_per_call is not None for row in self.rows)

    @cached_property
    def marks(self) -> list[str]:
        """Kinds and flags that occur."""
        return sorted({mark for row in self.rows for mark in row.marks})

    @cached_property
    def matrix(self) -> dict[tuple[str, str], MatrixCell]:
        """Cells with cases, by (implementation, scheme)."""
        grouped: dict[tuple[str, str], list[CaseRow]] = defaultdict(list)
        for row in self.rows:
            grouped[row.case.implementation, row.case.scheme].append(row)
        return {key: MatrixCell(tuple(rows)) for key, rows in grouped.items()}

    @cached_property
    def abouts(self) -> dict[str, str]:
        """The docstring of each implementation."""
        return {row.case.implementation: row.about for row in self.rows if row.about}

    @cached_property
    def tokens(self) -> list[int]:
        """Each M that was timed."""
        return sorted({row.case.m for row in self.rows if row.speedup is not None})

    @cached_property
    def choices(self) -> list[SchemeChoice]:
        """One for each quantized scheme, in the order of `schemes`."""
        return [self._choice(scheme) for scheme in self.schemes if scheme not in DENSE_SCHEMES]

    def _choice(self, scheme: str) -> SchemeChoice:
        cells = {name: cell for (name, of), cell in self.matrix.items() if of == scheme}
        right = tuple(sorted(name for name, cell in cells.items() if cell.worst is Status.OK))
        rows = [row for name in right for row in cells[name].rows]
        real = [row for row in rows if not row.is_canary]
        fastest: dict[int, CaseRow] = {}
        slower: set[int] = set()
        for m in self.tokens:
            timed = [row for row in real if row.case.m == m and row.ranked]
            if timed:
                fastest[m] = max(timed, key=lambda row: (row.ranking_speedup, row.case.id))
                if all(row.slower for row in timed):
                    slower.add(m)
        of_canaries = not any(row.bits_per_weight for row in real)
        bits = [row.bits_per_weight for row in (rows if of_canaries else real) if row.bits_per_weight]
        noise = [row.sqnr_db for row in (rows if of_canaries else real) if row.sqnr_db is not None]
        return SchemeChoice(
            scheme=scheme, bits_per_weight=min(bits, default=None), sqnr_db=median(noise) if noise else None,
            of_canaries=of_canaries and bool(bits), right=right,
            broken=tuple(sorted(name for name, cell in cells.items() if cell.worst in BROKEN)),
            fastest=fastest, slower=frozenset(slower),
        )

    @cached_property
    def sqnr_db(self) -> dict[str, float]:
        """SQNR of each scheme's stored weight in dB, if measured."""
        return {choice.scheme: choice.sqnr_db for choice in self.choices if choice.sqnr_db is not None}

    def best_choices(self, m: int) -> list[CaseRow]:
        """Return the fastest correct case at M = `m` of each Pareto-optimal scheme in `ranking_speedup` and SQNR, the
        fastest first; a slower one gains at least `LEAST_GAIN_DB`.

        Schemes that are not faster than dense, which is the most accurate, by more than the noise are left out.
        """
        timed = [choice.fastest[m] for choice in self.choices if m in choice.fastest and choice.sqnr_db is not None]
        best: list[CaseRow] = []
        for row in sorted(timed, key=lambda row: (-row.ranking_speedup, -self.sqnr_db[row.case.scheme])):
            least_db = self.sqnr_db[best[-1].case.scheme] + LEAST_GAIN_DB if best else -math.inf
            if row.faster and self.sqnr_db[row.case.scheme] >= least_db:
                best.append(row)
        return best

    def without_choice(self, m: int) -> str:
        """Return why `best_choices` is empty at M = `m`."""
        timed = [choice for choice in self.choices if m in choice.fastest]
        if not timed:
            return "dense: no implementation that is correct in all its cases was timed"
        uncertain = sum(m not in choice.slower for choice in timed)
        if not uncertain:
            return "dense: no correct implementation of any scheme is faster"
        return (f"dense: no scheme is faster by more than the timing noise, but {uncertain} of {len(timed)} are not "
                "clearly slower either; measure again on an idle machine")

    @property
    def choice_message(self) -> str:
        """The best choices at the fewest tokens timed, in one sentence; empty if nothing quantized was timed."""
        m = self.tokens[0] if any(choice.fastest for choice in self.choices) else 0
        if not m:
            return ""
        rows = self.best_choices(m)
        if not rows:
            return f"{self.machine.device}, M={m}: {self.without_choice(m)}"
        named = [
            f"{row.case.scheme} ({row.case.implementation}) {row.ranking_text} at {self.sqnr_db[row.case.scheme]:.1f} "
            f"dB SQNR" for row in rows]
        return f"{self.machine.device}, M={m}, speed over dense: {'; '.join(named)}"

    @cached_property
    def canaries(self) -> tuple[int, int]:
        """(number of correct canaries, number of canaries that ran)."""
        ran = [row for row in self.rows if row.is_canary and row.status not in (Status.UNSUPPORTED, Status.MISSING)]
        return sum(row.status is Status.OK for row in ran), len(ran)

    @cached_property
    def not_measured(self) -> list[NotMeasured]:
        """Cases that were not run or not timed, by reason."""
        grouped: dict[tuple[Status, str], list[CaseRow]] = defaultdict(list)
        for row in self.rows:
            if row.status in (Status.UNSUPPORTED, Status.MISSING):
                grouped[row.status, row.refusal].append(row)
            elif row.no_timing:
                grouped[row.status, row.no_timing].append(row)
        in_order = sorted(grouped.items(), key=lambda item: (SEVERITY[item[0][0]], item[0][1]))
        return [NotMeasured(status, reason, tuple(rows)) for (status, reason), rows in in_order]

    def filtered(self, **filters: str) -> str:
        """Return the URL, relative to the site's root, of its page with these filters set."""
        chosen = {name: value for name, value in filters.items() if value}
        return f"{self.path}index.html#{urlencode(chosen, quote_via=quote)}"


def sweep_of(folder: tuple[str, str], records: Iterable[Record],
             status_history: Callable[[Record], StatusHistory | None] = lambda record: None) -> SweepTable:
    """Return the sweep of `records` (at least one, oldest first). `status_history` returns how long a record's case has
    had its status."""
    records = list(records)
    counted = Counter(record.verdict.status for record in records)
    return SweepTable(
        folder=folder, machine=records[-1].machine, build=records[-1].build,
        as_of=max(record.started_at for record in records),
        counts={status: counted[status] for status in SEVERITY if counted[status]},
        rows=tuple(CaseRow.of(record, status_history(record)) for record in records),
    )

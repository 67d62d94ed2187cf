"""Views of casts and bit operations: conversions by engine, and changes from build to build."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fpxbench.casts.cast_changes import CastChange, CastSnapshot, changes
from fpxbench.casts.cast_findings import CastFinding, Disagreement, disagreements, find, operations_of
from fpxbench.casts.cast_record import CastRecord, InputKind
from fpxbench.casts.conversion import DTYPES, CastOperation, Conversion, Engine
from fpxbench.counted import counted
from fpxbench.records.verdict import BROKEN, SEVERITY, Status
from fpxbench.reports.sweep.problems import CHANGED, DISAGREES, ReportProblem, Section
from fpxbench.reports.sweep.sweep_table import SweepHeading

MOST_CHANGES_IN_A_MESSAGE = 3

_RARE_DTYPES = frozenset({"fp64", "e4m3b15", "e8m0"})
_RARE_OPERATIONS = frozenset({CastOperation.CAST_RTZ, CastOperation.FINFO})
_WRONG_FOR_ORDINARY_VALUES = frozenset({
    InputKind.DOUBLE_ROUNDING, InputKind.TIE, InputKind.ROUNDING, InputKind.UNROUNDED_PRODUCT, InputKind.SUBNORMAL,
    InputKind.OTHER})
"""Kinds of inputs that are finite and in range."""
_OF_PYTORCH = frozenset({Engine.EAGER, Engine.COMPILED})


@dataclass(frozen=True)
class CastSweep(SweepHeading):
    """The conversions of one machine and build, reduced to what pages list and compare between builds."""

    snapshots: tuple[CastSnapshot, ...]
    mistakes: tuple[CastFinding, ...]
    """Worst first. Only the records of mistakes stay in memory."""
    disagreements: tuple[Disagreement, ...]

    @property
    def page(self) -> str:
        """Its page, relative to the site's root."""
        return f"{self.path}numerics.html"

    @property
    def reported(self) -> list[CastFinding]:
        """Mistakes for the first page, without those that only Triton's interpreter makes, since no results come from
        it."""
        return [mistake for mistake in self.mistakes if mistake.status in BROKEN and not mistake.only_interpreted]


@dataclass(frozen=True)
class CastChanges:
    """The changes since an earlier build."""

    earlier: SweepHeading
    changes: tuple[CastChange, ...]


@dataclass(frozen=True)
class ConversionRow:
    """One operation, source and target, on every engine."""

    what: str
    label: str
    cells: dict[str, CastRecord]
    """Records by engine and device: ``eager/cpu``."""

    @property
    def page(self) -> str:
        """File name of its page, relative to the page of the build's conversions."""
        return f"numerics/{self.what.replace('/', '-')}.html"


def brief_sweep_of(folder: tuple[str, str], records: Sequence[CastRecord]) -> CastSweep:
    """Return the data needed to compare builds, from the newest record of each conversion in one file (at least one).
    """
    by_status = Counter(record.verdict.status for record in records)
    return CastSweep(
        folder=folder, machine=records[-1].machine, build=records[-1].build,
        as_of=max(record.started_at for record in records),
        counts={status: by_status[status] for status in SEVERITY if by_status[status]},
        snapshots=tuple(map(CastSnapshot.of, records)), mistakes=(), disagreements=())


def cast_sweep_of(folder: tuple[str, str], records: Sequence[CastRecord]) -> CastSweep:
    """Return `brief_sweep_of` with mistakes and disagreements."""
    return replace(brief_sweep_of(folder, records), mistakes=tuple(find(records)),
                   disagreements=tuple(disagreements(records)))


def cast_changes(sweeps: Sequence[CastSweep]) -> dict[tuple[str, str], CastChanges]:
    """Return the changes of each build of one machine since the build before it, by folder.

    A build is compared with the previous one of its channel and variant or, if there is none, of its channel.
    """
    found = {}
    before: dict[tuple[str, ...], list[CastSweep]] = defaultdict(list)
    for one in sorted(sweeps, key=lambda one: (one.age, one.folder)):
        of_channel, of_variant = (one.build.channel,), (one.build.channel, one.build.variant)
        for place in (of_variant, of_channel):
            earlier = next((other for other in reversed(before[place]) if other.build.label != one.build.label), None)
            if earlier is not None:
                same = earlier.snapshots == one.snapshots
                found[one.folder] = CastChanges(
                    earlier.heading(), () if same else tuple(changes(earlier.snapshots, one.snapshots)))
                break
        before[of_channel].append(one)
        before[of_variant].append(one)
    return found


def builds_with_pages(sweeps: Sequence[CastSweep], changed: dict[tuple[str, str], CastChanges],
                      builds: int) -> set[tuple[str, str]]:
    """Return the folders of one machine's builds that get pages: the newest `builds` of each channel, and all builds
    with changes."""
    newest = sorted(sweeps, key=lambda one: (one.age, one.folder), reverse=True)
    by_channel: dict[str, list[CastSweep]] = defaultdict(list)
    for one in newest:
        by_channel[one.build.channel].append(one)
    shown = {one.folder for ones in by_channel.values() for one in ones[:builds]}
    return shown | {folder for folder, change in changed.items() if change.changes}


@dataclass(frozen=True)
class ConversionMatrix:
    """Conversions (rows) by engine and device (columns)."""

    columns: list[str]
    sections: dict[str, list[ConversionRow]]

    @cached_property
    def rows(self) -> list[ConversionRow]:
        return [row for rows in self.sections.values() for row in rows]


def conversion_matrix(records: Iterable[CastRecord]) -> ConversionMatrix:
    """Return the matrix of `records`, its sections in the order in which conversions are planned."""
    cells: dict[str, dict[str, CastRecord]] = defaultdict(dict)
    conversions: dict[str, Conversion] = {}
    columns: dict[str, None] = {}
    for record in records:
        conversion = record.conversion
        cells[conversion.what][conversion.runs_on] = record
        conversions.setdefault(conversion.what, conversion)
        columns[conversion.runs_on] = None
    sections: dict[str, list[ConversionRow]] = defaultdict(list)
    for name, conversion in conversions.items():
        sections[_section(conversion)].append(ConversionRow(name, operations_of([conversion]).removeprefix("cast "),
                                                            cells[name]))
    return ConversionMatrix(list(columns), dict(sections))


def _section(conversion: Conversion) -> str:
    operation, source, target = conversion.operation, DTYPES[conversion.source], DTYPES[conversion.target]
    if operation.on_bits:
        return "Bit operations on unsigned integers"
    if operation is CastOperation.CAST:
        if source.is_float8:
            return "From FP8 to FP8" if target.is_float8 else "From FP8"
        return "To FP8" if target.is_float8 else "To 16 bits"
    return {CastOperation.CAST_RTZ: "Toward zero", CastOperation.SCALE_THEN_CAST: "Scaled, then cast",
            CastOperation.FINFO: "Constants"}[operation]


def cell_text(record: CastRecord) -> str:
    """Return the text of a cell: the number of wrong inputs, else the result of overflow."""
    if record.verdict.status is Status.WRONG:
        wrong = sum(difference.count for difference in record.differences if not difference.permitted)
        return f"{wrong / 1000:.0f}k" if wrong >= 10_000 else str(wrong)
    return {"infinity": "inf", "saturate": "max"}.get(record.behaviour.overflow or "", record.behaviour.overflow or "")


def cast_problems(casts: Sequence[tuple[CastSweep, CastChanges | None]]) -> list[ReportProblem]:
    """Return one problem for each mistake on the newest build of each machine, in the order of `_rarity`, then
    disagreements between engines, and changes since the build before."""
    by_mistake: dict[tuple[Status, str], list[tuple[CastFinding, CastSweep]]] = defaultdict(list)
    for sweep, _ in casts:
        for mistake in sweep.reported:
            by_mistake[mistake.status, mistake.cause].append((mistake, sweep))
    problems = [_wrong(shown) for shown in sorted(by_mistake.values(),
                                                  key=lambda shown: min(_rarity(mistake) for mistake, _ in shown))]
    for sweep, since in casts:
        problems += [
            ReportProblem(Section.DISAGREEING, DISAGREES,
                          f"{one.message}. PyTorch {sweep.build.label} on {sweep.machine.device}.",
                          sweep.page + "#disagreements", (), more="Results by engine")
            for one in sweep.disagreements
        ]
        if since is not None and since.changes:
            shown = "; ".join(change.message for change in since.changes[:MOST_CHANGES_IN_A_MESSAGE])
            rest = len(since.changes) - MOST_CHANGES_IN_A_MESSAGE
            problems.append(ReportProblem(
                Section.CHANGED, CHANGED,
                f"PyTorch {since.earlier.build.label} → {sweep.build.label} on {sweep.machine.device}: {shown}"
                + (f"; and {rest} more" if rest > 0 else "") + ".", sweep.page + "#changes", (), more="Every change"))
    return problems


def _is_corner_case(mistake: CastFinding) -> bool:
    """Return whether `mistake` affects only values or dtypes that few programs convert, and no finite value within the
    range of an ordinary dtype."""
    return all(_is_rare(record.conversion) or _WRONG_FOR_ORDINARY_VALUES.isdisjoint(
        difference.kind for difference in record.differences if not difference.permitted) for record in mistake.records)


def _is_rare(conversion: Conversion) -> bool:
    return conversion.operation in _RARE_OPERATIONS or not _RARE_DTYPES.isdisjoint(
        (conversion.source, conversion.target))


def _rarity(mistake: CastFinding) -> tuple:
    """Return a sort key: ordinary dtypes before rare ones, PyTorch's casts before hand-written kernels', then the most
    widespread mistakes."""
    conversions = [record.conversion for record in mistake.records]
    of_pytorch = any(one.engine in _OF_PYTORCH for one in conversions)
    return all(map(_is_rare, conversions)), not of_pytorch, -len({one.what for one in conversions})


def _wrong(shown: list[tuple[CastFinding, CastSweep]]) -> ReportProblem:
    """Return the problem for one mistake on all builds, with the numbers of the newest build with the most
    conversions."""
    mistake, sweep = max(shown, key=lambda pair: (pair[1].age, len(pair[0].records)))
    what_happens = ": ".join(part for part in (mistake.cause, mistake.counts) if part) or str(mistake.status)
    example = f". {mistake.example}" if mistake.example else ""
    others = sum(len(other.records) for other, its in shown if its is sweep and other is not mistake)
    builds = dict.fromkeys(f"PyTorch {its.build.label} on {its.machine.device}" for _, its in shown if its is not sweep)
    likewise = [f"{counted(others, 'other conversion')} there"] * bool(others) + list(builds)
    return ReportProblem(
        Section.CORNER_CASES if all(_is_corner_case(mistake) for mistake, _ in shown) else Section.CASTS,
        str(mistake.status),
        f"{mistake.what} in {', '.join(mistake.runs_on)} on PyTorch {sweep.build.label}: {what_happens}{example}."
        + (f" Likewise {'; '.join(likewise)}." if likewise else ""), sweep.page, (),
        more="Every conversion, with examples in bits")

"""What casts and bit operations do, as the pages show it: a matrix of conversions and engines, and what changed from build to build."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from fpxbench.casts.cast_changes import CastChange, CastSnapshot, changes
from fpxbench.casts.cast_findings import CastFinding, Disagreement, disagreements, find, operations_of
from fpxbench.casts.cast_record import CastRecord
from fpxbench.casts.conversion import DTYPES, Conversion, Engine, Operation
from fpxbench.records.verdict import BROKEN, SEVERITY, Status
from fpxbench.reports.sweep.problems import CHANGED, DISAGREES, Finding
from fpxbench.reports.sweep.table import Heading

MOST_CHANGES_IN_A_SENTENCE = 3

_SELDOM_CONVERTED = frozenset({"fp64", "e4m3b15"})
_SELDOM_ASKED = frozenset({Operation.CAST_RTZ, Operation.FINFO})
_OF_PYTORCH = frozenset({Engine.EAGER, Engine.COMPILED})


@dataclass(frozen=True)
class Judged(Heading):
    """The conversions of one machine and build: what is kept of them to compare builds and to list them."""

    snapshots: tuple[CastSnapshot, ...]
    mistakes: tuple[CastFinding, ...]
    """Worst first. Their records are the only ones that are kept."""
    disagreements: tuple[Disagreement, ...]

    @property
    def page(self) -> str:
        """Its page, relative to the site's root."""
        return f"{self.path}numerics.html"

    def brief(self) -> Judged:
        """What it takes to compare builds."""
        return replace(self, mistakes=(), disagreements=())

    @property
    def telling(self) -> list[CastFinding]:
        """What is broken in what people's results come from: Triton's interpreter is left to the page."""
        return [mistake for mistake in self.mistakes if mistake.status in BROKEN and not mistake.only_interpreted]


@dataclass(frozen=True)
class Since:
    """What became different since an earlier build."""

    earlier: Heading
    changes: tuple[CastChange, ...]


@dataclass(frozen=True)
class Row:
    """One operation, source and target, whoever carries it out."""

    what: str
    label: str
    cells: dict[str, CastRecord]
    """Records by who: ``eager/cpu``."""

    @property
    def page(self) -> str:
        """File name of its page, relative to the page of the build's conversions."""
        return f"numerics/{self.what.replace('/', '-')}.html"


def judged_of(folder: tuple[str, str], records: Sequence[CastRecord]) -> Judged:
    """The records of one file, the newest of each conversion, at least one."""
    counted = Counter(record.verdict.status for record in records)
    return Judged(
        folder=folder, machine=records[-1].machine, build=records[-1].build, as_of=max(record.started_at for record in records),
        counts={status: counted[status] for status in SEVERITY if counted[status]},
        snapshots=tuple(map(CastSnapshot.of, records)), mistakes=tuple(find(records)), disagreements=tuple(disagreements(records)))


def since_earlier(judged: Sequence[Judged]) -> dict[tuple[str, str], Since]:
    """For the builds of one machine, by folder: what changed since the build before. A build is held against the one before of its own
    channel and variant or, where it is the first of them, of its channel: a cast on the CPU is the same in both."""
    found = {}
    in_order = sorted(judged, key=lambda one: (one.age, one.folder))
    for number, one in enumerate(in_order):
        earlier = [other for other in in_order[:number] if other.build.channel == one.build.channel and other.build.label != one.build.label]
        of_variant = [other for other in earlier if other.build.variant == one.build.variant]
        if earlier:
            before = (of_variant or earlier)[-1]
            found[one.folder] = Since(before.heading(), tuple(changes(before.snapshots, one.snapshots)))
    return found


def worth_pages(judged: Sequence[Judged], since: dict[tuple[str, str], Since], builds: int) -> set[tuple[str, str]]:
    """Of one machine's builds those that get pages, by folder: the newest `builds` of each channel, and whichever changed something."""
    newest = sorted(judged, key=lambda one: (one.age, one.folder), reverse=True)
    by_channel: dict[str, list[Judged]] = defaultdict(list)
    for one in newest:
        by_channel[one.build.channel].append(one)
    shown = {one.folder for ones in by_channel.values() for one in ones[:builds]}
    return shown | {folder for folder, change in since.items() if change.changes}


@dataclass(frozen=True)
class Matrix:
    """Conversions by what is converted and who does it."""

    columns: list[str]
    sections: dict[str, list[Row]]

    @cached_property
    def rows(self) -> list[Row]:
        return [row for rows in self.sections.values() for row in rows]


def matrix_of(records: Iterable[CastRecord]) -> Matrix:
    """Sections by title, in the order in which conversions are planned."""
    cells: dict[str, dict[str, CastRecord]] = defaultdict(dict)
    conversions: dict[str, Conversion] = {}
    columns: dict[str, None] = {}
    for record in records:
        conversion = record.conversion
        cells[conversion.what][conversion.runs_on] = record
        conversions.setdefault(conversion.what, conversion)
        columns[conversion.runs_on] = None
    sections: dict[str, list[Row]] = defaultdict(list)
    for name, conversion in conversions.items():
        sections[_section(conversion)].append(Row(name, operations_of([conversion]).removeprefix("cast "), cells[name]))
    return Matrix(list(columns), dict(sections))


def _section(conversion: Conversion) -> str:
    operation, source, target = conversion.operation, DTYPES[conversion.source], DTYPES[conversion.target]
    if operation.on_bits:
        return "Bit operations on unsigned integers"
    if operation is Operation.CAST:
        if source.is_float8:
            return "From FP8 to FP8" if target.is_float8 else "From FP8"
        return "To FP8" if target.is_float8 else "To 16 bits"
    return {Operation.CAST_RTZ: "Toward zero", Operation.SCALE_THEN_CAST: "Scaled, then cast", Operation.FINFO: "Constants"}[operation]


def cell_text(record: CastRecord) -> str:
    """The few characters in a cell: how many are wrong, or what overflow becomes."""
    if record.verdict.status is Status.WRONG:
        wrong = sum(difference.count for difference in record.differences if not difference.permitted)
        return f"{wrong / 1000:.0f}k" if wrong >= 10_000 else str(wrong)
    return {"infinity": "inf", "saturate": "max"}.get(record.behaviour.overflow or "", record.behaviour.overflow or "")


def findings_on(casts: Sequence[tuple[Judged, Since | None]]) -> list[Finding]:
    """For the overview: what is wrong on the newest build of each machine, a sentence a mistake, and what changed since the build before.

    Mistakes of one status come by how many people meet them (`_reach`).
    """
    by_mistake: dict[tuple[Status, str], list[tuple[CastFinding, Judged]]] = defaultdict(list)
    for judged, _ in casts:
        for mistake in judged.telling:
            by_mistake[mistake.status, mistake.cause].append((mistake, judged))
    found = [_wrong(shown) for shown in sorted(by_mistake.values(), key=lambda shown: min(_reach(mistake) for mistake, _ in shown))]
    for judged, since in casts:
        found += [
            Finding(DISAGREES, f"{one.message}. PyTorch {judged.build.label} on {judged.machine.device}.",
                    judged.page + "#disagreements", (), more="Who does what")
            for one in judged.disagreements
        ]
        if since is not None and since.changes:
            shown = "; ".join(change.message for change in since.changes[:MOST_CHANGES_IN_A_SENTENCE])
            rest = len(since.changes) - MOST_CHANGES_IN_A_SENTENCE
            found.append(Finding(
                CHANGED, f"PyTorch {since.earlier.build.label} → {judged.build.label} on {judged.machine.device}: {shown}"
                + (f"; and {rest} more" if rest > 0 else "") + ".", judged.page + "#changes", (), more="What changed, in full"))
    return found


def _reach(mistake: CastFinding) -> tuple:
    """Sorts mistakes: what ordinary programs convert before what few do, PyTorch's own before a kernel of one's own, then the most widespread."""
    conversions = [record.conversion for record in mistake.records]
    ordinary = any(one.operation not in _SELDOM_ASKED and _SELDOM_CONVERTED.isdisjoint((one.source, one.target)) for one in conversions)
    of_pytorch = any(one.engine in _OF_PYTORCH for one in conversions)
    return not ordinary, not of_pytorch, -len({one.what for one in conversions})


def _wrong(shown: list[tuple[CastFinding, Judged]]) -> Finding:
    """One mistake, wherever it shows: said of the build and conversions that show it most."""
    mistake, judged = max(shown, key=lambda pair: (pair[1].build.label, len(pair[0].records)))
    said = ": ".join(part for part in (mistake.cause, mistake.counts) if part) or str(mistake.status)
    example = f". {mistake.example}" if mistake.example else ""
    others = sum(len(other.records) for other, its in shown if its is judged and other is not mistake)
    builds = dict.fromkeys(f"PyTorch {its.build.label} on {its.machine.device}" for _, its in shown if its is not judged)
    likewise = [f"{others} other {'conversion' if others == 1 else 'conversions'} there"] * bool(others) + list(builds)
    return Finding(
        str(mistake.status), f"{mistake.what} in {', '.join(mistake.runs_on)} on PyTorch {judged.build.label}: {said}{example}."
        + (f" Likewise {'; '.join(likewise)}." if likewise else ""), judged.page, (), more="Every conversion, with examples in bits")

"""What is wrong, as sentences, worst first: one cause in forty cases is one sentence."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from fpxbench.records.record import Flag
from fpxbench.records.verdict import SEVERITY, Status
from fpxbench.reports.sweep.table import Row, Sweep
from fpxbench.reports.words import VERBS

SLOW = "slow"
DISAGREES = "disagrees"
CHANGED = "changed"
REGRESSED = "regressed"
SUSPECTED = "suspected"
RANKS: dict[str, int] = {
    name: rank for rank, name in enumerate((
        *map(str, SEVERITY), REGRESSED, DISAGREES, str(Flag.OVER_ROOFLINE), SUSPECTED, SLOW, str(Flag.UNFUSED), str(Flag.NOISY), CHANGED))
}
"""Severities, the lowest worst: broken cases by status, then confirmed regressions, right answers that are not the same, impossible
figures, suspected regressions, then what is right but slow, then what only became different."""

# A cause that speaks for itself in its own words is one cause, whichever implementation met it.
_CAUSE_IN_WORDS = frozenset({Status.CRASH, Status.ERROR})


@dataclass(frozen=True)
class Found:
    """A case in its sweep."""

    sweep: Sweep
    row: Row

    @property
    def link(self) -> str:
        return self.sweep.path + self.row.page


@dataclass(frozen=True)
class Finding:
    """One sentence about one cause.

    severity : a status, or ``regressed``, ``over_roofline``, ``disagrees``, ``suspected``, ``slow``, ``unfused``, ``noisy``, ``changed``
    sentence : plain text
    link : relative to the site's root: the case if it is one, else the matrix with the filters set
    cases : all that show it, the most telling first; none if it is about conversions
    more : what the link leads to, where there are no cases
    """

    severity: str
    sentence: str
    link: str
    cases: tuple[Found, ...] = field(repr=False)
    more: str = ""

    @property
    def rank(self) -> int:
        return RANKS[self.severity]

    @property
    def names(self) -> list[str]:
        """Implementations and schemes that the sentence may name."""
        return sorted({found.row.case.implementation for found in self.cases} | {found.row.case.scheme for found in self.cases})


def find(sweeps: Sequence[Sweep]) -> list[Finding]:
    """Everything that is wrong or suspicious in these sweeps, worst first; the same cause on several machines is one finding."""
    all_cases = [Found(sweep, row) for sweep in sweeps for row in sweep.rows]
    found = [
        *(_broken(group, all_cases) for group in _grouped(all_cases, _cause)),
        *(_impossible(group) for group in _grouped(all_cases, _flagged(Flag.OVER_ROOFLINE))),
        *(_slow(group, all_cases) for group in _grouped(all_cases, _slowness)),
        *(_unfused(group) for group in _grouped(all_cases, _unfused_but_fast)),
        *(_noisy(group) for group in _grouped(all_cases, _noise)),
    ]
    return sorted(found, key=_worst_first)


def _worst_first(finding: Finding) -> tuple:
    """By severity; then the slowest, or what hits the most cases."""
    slowest = finding.cases[0].row.speedup if finding.severity == SLOW else 0
    return finding.rank, slowest, -len(finding.cases), finding.sentence


def _grouped(cases: Iterable[Found], key) -> list[list[Found]]:
    """Cases by key, those without one left out."""
    groups: dict[Hashable, list[Found]] = defaultdict(list)
    for case in cases:
        value = key(case)
        if value is not None:
            groups[value].append(case)
    return list(groups.values())


# ---- broken ---------------------------------------------------------------------------------------------------------

def _cause(found: Found) -> Hashable | None:
    row = found.row
    if not row.broken:
        return None
    if row.status in _CAUSE_IN_WORDS:
        return row.status, row.kind, _without_numbers(row.summary)
    return row.status, row.kind, row.case.implementation


def _without_numbers(text: str) -> str:
    """What two messages of one cause have in common: addresses, sizes and widths differ from case to case."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+", "#", text)


def _broken(group: list[Found], all_cases: list[Found]) -> Finding:
    first = group[0].row
    names = _implementations(group)
    subject = _listed(names) if len(names) == 1 else f"each of {_listed(names)}"
    predicate = first.kind.predicate if first.kind else VERBS[first.status]
    if first.signal and first.status is Status.CRASH:
        predicate += f" ({first.signal})"
    schemes = _schemes(group)
    if len(group) == 1:
        where, extent = f"{first.case.scheme}, {first.case.layer},", ""
        example = f": {first.summary}" if first.summary else ""
    else:
        tried = sum(found.row.case.implementation in names and found.row.case.scheme in schemes for found in all_cases)
        where, extent = _listed(schemes, most=4), f", in {len(group)} of {tried} cases"
        shared = first.status in _CAUSE_IN_WORDS or all(found.row.summary == first.summary for found in group)
        example = f": {first.summary}" if shared else f"; on {first.case.scheme}, {first.case.layer}: {first.summary}"
        example = example if first.summary else ""
    since = {found.row.since for found in group}
    extent += f", {since.pop()}" if len(since) == 1 and "" not in since else ""
    return Finding(str(first.status), _sentence(f"{subject} on {where} {predicate}{extent}{_on_machines(group)}{example}"),
                   _link(group, status=str(first.status), mark=str(first.kind or "")), tuple(group))


# ---- right, and yet -------------------------------------------------------------------------------------------------

def _flagged(flag: Flag):
    return lambda found: (found.row.case.implementation, found.sweep.folder) if flag in found.row.flags else None


def _impossible(group: list[Found]) -> Finding:
    worst = max(group, key=lambda found: found.row.roofline_fraction or 0)
    row = worst.row
    figure = f"{row.gb_per_s:.0f} GB/s" if row.gb_per_s else "a bandwidth"
    ceiling = f"of which memory reads {row.read_gb_per_s:.0f} GB/s" if row.read_gb_per_s else "that cannot read so fast"
    more = f", and {len(group) - 1} more such figures" if len(group) > 1 else ""
    return Finding(
        str(Flag.OVER_ROOFLINE),
        _sentence(f"{row.case.implementation} on {row.case.scheme}, {row.case.layer}, shows {figure} on a machine {ceiling}{more}: "
                  f"a number above the roofline is a bug in the number"),
        _link(group, mark=str(Flag.OVER_ROOFLINE)), (worst, *(found for found in group if found is not worst)))


def _slowness(found: Found) -> Hashable | None:
    """One sentence for each implementation on each machine, few tokens (memory counts) apart from many (arithmetic counts)."""
    return (found.row.case.implementation, found.sweep.folder, found.row.case.m <= 16) if found.row.slower else None


def _slow(group: list[Found], all_cases: list[Found]) -> Finding:
    group = sorted(group, key=lambda found: found.row.speedup)
    row = group[0].row
    peers = [found for found in all_cases if found.sweep is group[0].sweep and found.row.case.implementation == row.case.implementation
             and found.row.quantized and found.row.speedup is not None and (found.row.case.m <= 16) == (row.case.m <= 16)]
    why = f": {row.bottleneck}" if row.bottleneck else ""
    unfused = " and is not fused" if Flag.UNFUSED in row.flags else ""
    more = f". It is slower than dense in {len(group)} of {len(peers)} timed cases" if len(peers) > 1 else ""
    times = 1 / row.speedup if row.speedup > 0 else math.inf
    return Finding(
        SLOW,
        _sentence(f"{row.case.implementation} runs {row.case.scheme} {times:.{1 if times < 9.95 else 0}f}× slower than dense {row.case.activation}"
                  f" at M={row.case.m} ({row.case.workload}) on {group[0].sweep.machine.device}{unfused}{why}{more}"),
        _link(group, mark=SLOW), tuple(group))


def _unfused_but_fast(found: Found) -> Hashable | None:
    row = found.row
    return (row.case.implementation, found.sweep.folder) if Flag.UNFUSED in row.flags and not row.slower else None


def _unfused(group: list[Found]) -> Finding:
    row = min(group, key=lambda found: found.row.speedup or 0).row
    why = f": {row.bottleneck}" if row.bottleneck else ""
    return Finding(
        str(Flag.UNFUSED),
        _sentence(f"{row.case.implementation} is no slower than dense but not fused on {_listed(_schemes(group), most=4)}, "
                  f"in {_count(len(group), 'case')}{why}"),
        _link(group, mark=str(Flag.UNFUSED)), tuple(group))


def _noise(found: Found) -> Hashable | None:
    return found.sweep.folder if Flag.NOISY in found.row.flags else None


def _noisy(group: list[Found]) -> Finding:
    timed = sum(row.speedup is not None for row in group[0].sweep.rows)
    return Finding(
        str(Flag.NOISY),
        _sentence(f"{_count(len(group), 'timing')} of {timed} on {group[0].sweep.machine.device} {'is' if len(group) == 1 else 'are'} "
                  f"noisy: the 95% interval of the median is wider than ±5%"),
        _link(group, mark=str(Flag.NOISY)), tuple(group))


# ---- words ----------------------------------------------------------------------------------------------------------

def _implementations(group: list[Found]) -> list[str]:
    return sorted({found.row.case.implementation for found in group})


def _schemes(group: list[Found]) -> list[str]:
    return sorted({found.row.case.scheme for found in group})


def _listed(names: list[str], most: int = 6) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most - 1])} and {len(names) - most + 1} more"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _on_machines(group: list[Found]) -> str:
    machines = sorted({found.sweep.machine.device for found in group})
    return f", on {_listed(machines, most=3)}" if len(machines) > 1 else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > 420:
        text = text[:419].rstrip() + "…"
    return text if text[-1] in ".…!?" else text + "."


def _link(group: list[Found], **filters: str) -> str:
    if len(group) == 1:
        return group[0].link
    names = _implementations(group)
    schemes = _schemes(group)
    return group[0].sweep.filtered(
        implementation=names[0] if len(names) == 1 else "", scheme=schemes[0] if len(schemes) == 1 else "", **filters
    )

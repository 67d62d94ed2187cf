"""Find problems, one message per cause, ordered by the number of users that they concern.

A wrong product concerns every user of that implementation with that scheme; a slow scheme everyone who chooses a
scheme; a cast of a rare value almost no one. `Section` has that order, for the first page and the terminal."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fpxbench.counted import counted
from fpxbench.records.record import Flag
from fpxbench.records.verdict import SEVERITY, Status
from fpxbench.reports.sweep.case_row import CaseRow
from fpxbench.reports.sweep.sweep_table import SweepTable

SLOW, DISAGREES, CHANGED, REGRESSED, SUSPECTED = "slow", "disagrees", "changed", "regressed", "suspected"
SEVERITIES: dict[str, int] = {
    name: rank for rank, name in enumerate((
        *map(str, SEVERITY), REGRESSED, DISAGREES, str(Flag.OVER_ROOFLINE), str(Flag.SLOW_BASELINE), SUSPECTED, SLOW,
        str(Flag.KEEPS_DECODED_COPY), str(Flag.UNFUSED), str(Flag.DIRECTED_ROUNDING), str(Flag.NARROW_ACCUMULATOR),
        str(Flag.UNDECLARED_RULE), str(Flag.SHARED_DEVICE), str(Flag.THROTTLED), str(Flag.NOISY), CHANGED))
}
"""Within a section, the lowest is the worst."""

FEW_TOKENS = 16
"""Up to this M a call is bound by memory, above it by arithmetic, so slowness has different causes."""
COMMON_SCHEME = re.compile(r"(e4m3fn|e5m2|int8)-.+|(mx|nv)fp\d.*")
"""Schemes of published checkpoints: their mistakes are listed before those of other schemes."""
LONGEST_MESSAGE = 420

# The message of a crash or an error identifies its cause, in any implementation.
_CAUSE_IS_THE_MESSAGE = frozenset({Status.CRASH, Status.ERROR})


class Section(StrEnum):
    """The users that a problem concerns, the largest group first."""

    WRONG = "wrong"
    REGRESSED = "regressed"
    CASTS = "casts"
    SLOW = "slow"
    DISAGREEING = "disagreeing"
    CORNER_CASES = "corner-cases"
    CHANGED = "changed"

    @property
    def heading(self) -> str:
        return _SECTIONS[self][0]

    @property
    def about(self) -> str:
        """One sentence about the users it concerns; may be empty."""
        return _SECTIONS[self][1]


_SECTIONS = {
    Section.WRONG: ("Wrong results and failures", "These implementations cannot be used with these schemes."),
    Section.REGRESSED: ("Confirmed regressions", ""),
    Section.CASTS: ("Casts that round ordinary values wrongly", ""),
    Section.SLOW: ("Slow or suspicious",
                   "Correct, but slower than the dense 16-bit product, or flagged."),
    Section.DISAGREEING: ("Casts that differ between engines",
                          "The formats allow each of these results, but the same line of a model gives different "
                          "numbers in different engines."),
    Section.CORNER_CASES: ("Casts: rare corner cases", "Wrong only for values or dtypes that few programs convert."),
    Section.CHANGED: ("Casts that changed since the previous build", ""),
}


@dataclass(frozen=True)
class SweepCase:
    """A case and the sweep it belongs to."""

    sweep: SweepTable
    row: CaseRow

    @property
    def link(self) -> str:
        return self.sweep.path + self.row.page


@dataclass(frozen=True)
class ReportProblem:
    """One problem with one cause.

    section : the users it concerns
    severity : a status, or ``regressed``, ``over_roofline``, ``slow_baseline``, ``disagrees``, ``suspected``,
        ``slow``, ``unfused``, ``noisy``, ``changed``
    message : one or two sentences, plain text
    link : relative to the site's root: the case's page if it has only one, else the matrix with filters set
    cases : all cases that show it, the clearest first; empty if it is about casts
    more : text of the link, if there are no cases
    minor : whether it is listed after the others of its section
    """

    section: Section
    severity: str
    message: str
    link: str
    cases: tuple[SweepCase, ...] = field(repr=False)
    more: str = ""
    minor: bool = False

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Sort key; problems of one rank are already in order."""
        return list(Section).index(self.section), self.minor, SEVERITIES[self.severity]

    @property
    def names(self) -> list[str]:
        """Implementations and schemes that the message may name."""
        return sorted({case.row.case.implementation for case in self.cases}
                      | {case.row.case.scheme for case in self.cases})


def find_problems(sweeps: Sequence[SweepTable]) -> list[ReportProblem]:
    """Return all problems of these sweeps, worst first; one cause on several machines is one problem."""
    all_cases = [SweepCase(sweep, row) for sweep in sweeps for row in sweep.rows]
    problems = [
        *(_broken(group, all_cases) for group in _grouped(all_cases, _cause)),
        *(_impossible(group) for group in _grouped(all_cases, _flagged(Flag.OVER_ROOFLINE))),
        *(_slow_baselines(group) for group in _grouped(
            (case for case in all_cases if case.row.speedup), _flagged(Flag.SLOW_BASELINE))),
        *(problem for sweep in sweeps for problem in _schemes_slower_than_dense(sweep)),
        *(_slow(group, all_cases) for group in _grouped(all_cases, _slowness)),
        *(_unfused(group) for group in _grouped(all_cases, _unfused_but_fast)),
        *(_keeping_copies(group) for group in _grouped(all_cases, _flagged(Flag.KEEPS_DECODED_COPY))),
        *(_rounding_one_way(group) for group in _grouped(all_cases, _flagged(Flag.DIRECTED_ROUNDING))),
        *(_summing_narrowly(group) for group in _grouped(all_cases, _flagged(Flag.NARROW_ACCUMULATOR))),
        *(_another_rule(group) for group in _grouped(all_cases, _flagged(Flag.UNDECLARED_RULE))),
        *(_timed_while(Flag.SHARED_DEVICE, "another process used the GPU", group)
          for group in _grouped(all_cases, _of_sweep(Flag.SHARED_DEVICE))),
        *(_timed_while(Flag.THROTTLED, "the device lowered its clocks", group)
          for group in _grouped(all_cases, _of_sweep(Flag.THROTTLED))),
        *(_noisy(group) for group in _grouped(all_cases, _of_sweep(Flag.NOISY))),
    ]
    return sorted(problems, key=lambda problem: (problem.rank, -len(problem.cases), problem.message))


def headline(problems: Iterable[ReportProblem], swept: bool) -> str:
    """Return ``2 faults in matmul results, 11 slow or suspicious, 10 faulty casts``; `swept` is whether any matmul was
    measured."""
    count = Counter(problem.section for problem in problems)
    wrong = counted(count[Section.WRONG], "fault") if count[Section.WRONG] else "No faults"
    parts = [f"{wrong} in matmul results"] if swept else []
    if count[Section.REGRESSED]:
        parts.append(counted(count[Section.REGRESSED], "confirmed regression"))
    if count[Section.SLOW]:
        parts.append(f"{count[Section.SLOW]} slow or suspicious")
    if casts := count[Section.CASTS] + count[Section.CORNER_CASES]:
        parts.append(counted(casts, "faulty cast"))
    if count[Section.DISAGREEING]:
        parts.append(
            f"{counted(count[Section.DISAGREEING], 'cast')} "
            f"{'differs' if count[Section.DISAGREEING] == 1 else 'differ'} between engines")
    return ", ".join(parts) or "No faults in casts"


def _grouped(cases: Iterable[SweepCase], key: Callable[[SweepCase], Hashable | None]) -> list[list[SweepCase]]:
    """Group cases by `key`, leaving out those for which it is None."""
    groups: dict[Hashable, list[SweepCase]] = defaultdict(list)
    for case in cases:
        value = key(case)
        if value is not None:
            groups[value].append(case)
    return list(groups.values())


# ---- broken ---------------------------------------------------------------------------------------------------------

def _cause(case: SweepCase) -> Hashable | None:
    row = case.row
    if not row.broken:
        return None
    if row.status in _CAUSE_IS_THE_MESSAGE:
        return row.status, row.kind, _without_numbers(row.summary)
    return row.status, row.kind, row.case.implementation


def _without_numbers(text: str) -> str:
    """Return a message without addresses, sizes and widths, which differ between cases with the same cause."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+", "#", text)


def _broken(group: list[SweepCase], all_cases: list[SweepCase]) -> ReportProblem:
    first = group[0].row
    names, schemes = _implementations(group), _schemes(group)
    subject = _listed(names) if len(names) == 1 else f"each of {_listed(names)}"
    predicate = first.kind.predicate if first.kind else first.status.predicate
    if first.signal and first.status is Status.CRASH:
        predicate += f" ({first.signal})"
    if len(group) == 1:
        where, extent = f"{first.case.scheme}, {first.case.layer},", ""
        example = f": {first.summary}" if first.summary else ""
    else:
        tried = sum(case.row.case.implementation in names and case.row.case.scheme in schemes for case in all_cases)
        where, extent = _listed(schemes, most=4), f", in {len(group)} of {tried} cases"
        shared = first.status in _CAUSE_IS_THE_MESSAGE or all(case.row.summary == first.summary for case in group)
        example = f": {first.summary}" if shared else f"; on {first.case.scheme}, {first.case.layer}: {first.summary}"
        example = example if first.summary else ""
    since = {case.row.since for case in group}
    extent += f", {since.pop()}" if len(since) == 1 and "" not in since else ""
    return ReportProblem(
        Section.WRONG, str(first.status),
        _message(f"{subject} on {where} {predicate}{extent}{_on_machines(group, all_cases)}{example}"),
        _link(group, status=str(first.status), mark=str(first.kind or "")), tuple(group),
        minor=not any(COMMON_SCHEME.fullmatch(scheme) for scheme in schemes))


# ---- slow or suspicious ---------------------------------------------------------------------------------------------

def _flagged(flag: Flag) -> Callable[[SweepCase], Hashable | None]:
    return lambda case: (case.row.case.implementation, case.sweep.folder) if flag in case.row.flags else None


def _impossible(group: list[SweepCase]) -> ReportProblem:
    worst = max(group, key=lambda case: case.row.roofline_fraction or 0)
    row = worst.row
    rate = f"{row.gb_per_s:.0f} GB/s" if row.gb_per_s else "a bandwidth"
    ceiling = f"whose memory reads {row.read_gb_per_s:.0f} GB/s" if row.read_gb_per_s else "that cannot read so fast"
    more = f", and {counted(len(group) - 1, 'more such number')}" if len(group) > 1 else ""
    return ReportProblem(
        Section.SLOW, str(Flag.OVER_ROOFLINE),
        _message(f"{row.case.implementation} on {row.case.scheme}, {row.case.layer}, shows {rate} on a machine "
                 f"{ceiling}{more}: a number above the roofline is a measurement error"),
        _link(group, mark=str(Flag.OVER_ROOFLINE)), (worst, *(case for case in group if case is not worst)))


def _slow_baselines(group: list[SweepCase]) -> ReportProblem:
    worst = max(group, key=lambda case: case.row.speedup or 0)
    row = worst.row
    more = f", and {counted(len(group) - 1, 'more such speedup')}" if len(group) > 1 else ""
    times = f"{row.baseline_us:,.0f} us beside {row.median_us:,.0f} us" if row.baseline_us and row.median_us else "slow"
    return ReportProblem(
        Section.SLOW, str(Flag.SLOW_BASELINE),
        _message(f"{row.case.implementation} on {row.case.scheme}, {row.case.layer} with {row.case.m} tokens, shows"
                 f" {row.speedup:.2f}x dense{more}: the dense product was slow ({times}), though arithmetic limits"
                 " both. Look at the device's clocks and at what else ran"),
        _link(group, mark=str(Flag.SLOW_BASELINE)), (worst, *(case for case in group if case is not worst)))


def _schemes_slower_than_dense(sweep: SweepTable) -> list[ReportProblem]:
    """Return at most one problem: the schemes that every correct implementation runs slower than dense. It is minor
    if at each M most schemes have a faster implementation."""
    parts, cases, most = [], [], False
    for m in sweep.tokens:
        timed = [choice for choice in sweep.choices if m in choice.fastest]
        slow = sorted((choice.fastest[m] for choice in timed if m in choice.slower), key=lambda row: -row.times_dense)
        if slow:
            scheme = slow[0].case.scheme
            quality = f" at {sweep.sqnr_db[scheme]:.1f} dB SQNR" if scheme in sweep.sqnr_db else ""
            parts.append(f"{len(slow)} of {counted(len(timed), 'scheme')} at M={m} (closest: "
                         f"{slow[0].case.implementation} on {scheme}, {slow[0].speedup:.2f}×{quality})")
            cases += [SweepCase(sweep, row) for row in slow]
            most = most or 2 * len(slow) >= len(timed)
    if len({case.row.case.implementation for case in cases}) < 2:     # that implementation has its own message
        return []
    return [ReportProblem(
        Section.SLOW, SLOW, _message(
            f"On {sweep.machine.device} dense {cases[0].row.case.activation} is faster than every correct "
            f"implementation of {_listed(parts)}"),
        cases[0].link if len(cases) == 1 else sweep.filtered(mark=SLOW), tuple(cases), minor=not most)]


def _slowness(case: SweepCase) -> Hashable | None:
    """Return the group of a slow case: implementation, machine, and few or many tokens; None for any other case."""
    return (case.row.case.implementation, case.sweep.folder, case.row.case.m <= FEW_TOKENS) if case.row.slower else None


def _slow(group: list[SweepCase], all_cases: list[SweepCase]) -> ReportProblem:
    group = sorted(group, key=lambda case: case.row.times_dense)
    row, sweep = group[0].row, group[0].sweep
    few = row.case.m <= FEW_TOKENS
    peers = [case for case in all_cases if case.sweep is sweep
             and case.row.case.implementation == row.case.implementation
             and case.row.quantized and case.row.speedup is not None and (case.row.case.m <= FEW_TOKENS) == few]
    why = f": {row.bottleneck}" if row.bottleneck else ""
    unfused = " and is not fused" if Flag.UNFUSED in row.flags else ""
    more = f". It is slower than dense in {len(group)} of {len(peers)} timed cases" if len(peers) > 1 else ""
    times = 1 / row.times_dense if row.times_dense > 0 else math.inf
    return ReportProblem(
        Section.SLOW, SLOW,
        _message(f"{row.case.implementation} runs {row.case.scheme} {times:.{1 if times < 9.95 else 0}f}× slower than "
                 f"dense {row.case.activation} at M={row.case.m} ({row.case.workload}) on {sweep.machine.device}"
                 f"{unfused}{why}{more}"),
        _link(group, mark=SLOW), tuple(group), minor=True)


def _unfused_but_fast(case: SweepCase) -> Hashable | None:
    row = case.row
    return (row.case.implementation, case.sweep.folder) if Flag.UNFUSED in row.flags and not row.slower else None


def _minor(flag: Flag, group: list[SweepCase], text: str) -> ReportProblem:
    return ReportProblem(Section.SLOW, str(flag), _message(text), _link(group, mark=str(flag)), tuple(group),
                         minor=True)


def _extent(group: list[SweepCase]) -> str:
    return f"{_listed(_schemes(group), most=4)}, in {counted(len(group), 'case')}"


def _unfused(group: list[SweepCase]) -> ReportProblem:
    row = min(group, key=lambda case: case.row.speedup or 0).row
    why = f": {row.bottleneck}" if row.bottleneck else ""
    return _minor(Flag.UNFUSED, group,
                  f"{row.case.implementation} is no slower than dense but not fused on {_extent(group)}{why}")


def _keeping_copies(group: list[SweepCase]) -> ReportProblem:
    row = group[0].row
    why = f": {row.bottleneck}" if row.bottleneck else ""
    return _minor(Flag.KEEPS_DECODED_COPY, group,
                  f"{row.case.implementation} keeps a decoded copy of the weight on {_extent(group)}{why}")


def _rounding_one_way(group: list[SweepCase]) -> ReportProblem:
    return _minor(Flag.DIRECTED_ROUNDING, group,
                  f"{group[0].row.case.implementation} rounds its outputs in one direction and not to nearest on "
                  f"{_extent(group)}: each is up to one unit in the last place off, all to the same side")


def _summing_narrowly(group: list[SweepCase]) -> ReportProblem:
    return _minor(Flag.NARROW_ACCUMULATOR, group,
                  f"{group[0].row.case.implementation} sums products in fewer bits than it declares on "
                  f"{_extent(group)}; results are within the tolerance")


def _another_rule(group: list[SweepCase]) -> ReportProblem:
    return _minor(Flag.UNDECLARED_RULE, group,
                  f"{group[0].row.case.implementation} quantizes by another rule than it declares on {_extent(group)}; "
                  "it is consistent, and results are correct under it")


def _of_sweep(flag: Flag) -> Callable[[SweepCase], Hashable | None]:
    return lambda case: case.sweep.folder if flag in case.row.flags else None


def _timings(group: list[SweepCase]) -> str:
    timed = sum(row.speedup is not None for row in group[0].sweep.rows)
    return f"{counted(len(group), 'timing')} of {timed} on {group[0].sweep.machine.device}"


def _timed_while(flag: Flag, event: str, group: list[SweepCase]) -> ReportProblem:
    return _minor(flag, group, f"{_timings(group)} {'was' if len(group) == 1 else 'were'} taken while {event}")


def _noisy(group: list[SweepCase]) -> ReportProblem:
    return _minor(Flag.NOISY, group, f"{_timings(group)} {'is' if len(group) == 1 else 'are'} noisy: the 95% interval "
                                     "of the median is wider than ±5%")


# ---- messages -------------------------------------------------------------------------------------------------------

def _implementations(group: list[SweepCase]) -> list[str]:
    return sorted({case.row.case.implementation for case in group})


def _schemes(group: list[SweepCase]) -> list[str]:
    return sorted({case.row.case.scheme for case in group})


def _listed(names: list[str], most: int = 6) -> str:
    if len(names) > most:
        return f"{', '.join(names[:most - 1])} and {len(names) - most + 1} more"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _on_machines(group: list[SweepCase], all_cases: list[SweepCase]) -> str:
    """Return the devices that show it; an empty string in a report of one device."""
    if len({case.sweep.machine.device for case in all_cases}) < 2:
        return ""
    return f", on {_listed(sorted({case.sweep.machine.device for case in group}), most=3)}"


def _message(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > LONGEST_MESSAGE:
        text = text[:LONGEST_MESSAGE - 1].rstrip() + "…"
    return text if text[-1] in ".…!?" else text + "."


def _link(group: list[SweepCase], **filters: str) -> str:
    if len(group) == 1:
        return group[0].link
    names, schemes = _implementations(group), _schemes(group)
    return group[0].sweep.filtered(
        implementation=names[0] if len(names) == 1 else "", scheme=schemes[0] if len(schemes) == 1 else "", **filters
    )

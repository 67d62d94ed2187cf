"""Compare two builds by their records: docs/decision-rule.md, "Comparison of two builds"."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from fpxbench.records.record import Record, Timing
from fpxbench.records.verdict import SEVERITY, Status
from fpxbench.stats import median_ratio_interval

NOISE = 0.02
"""Difference between two sweeps of one build, as a logarithm, that their samples do not show (another process, other
addresses): intervals are widened by it on both sides."""
LEVEL = 0.95
_LARGEST_LOG = 700.0
"""exp() of more overflows. No real ratio is near it, but records come from other machines."""


class ChangeClass(StrEnum):
    """Class of a change between two builds, worst first."""

    VERDICT_WORSE = "verdict worse"
    SLOWER = "slower"
    VERDICT_OTHER = "verdict other"
    """A different kind with the same status."""
    MACHINE = "machine"
    """The time changed, and the dense product's time by as much or more: their ratio shows no change of the case."""
    FASTER = "faster"
    VERDICT_BETTER = "verdict better"
    UNCHANGED = "unchanged"
    ONLY_ONE = "on one build only"


class ComparisonRow(BaseModel):
    """One case on one machine, on two builds."""

    model_config = ConfigDict(frozen=True)

    case: str
    machine: str
    variants: tuple[str, str] | None = None
    """Variants of the earlier and the later record, if they differ."""
    change: ChangeClass
    before: str | None
    after: str | None
    """Status and kind."""
    before_us: float | None = None
    after_us: float | None = None
    time: tuple[float, float, float] | None = None
    """Ratio of the later to the earlier time, with its interval: value, low, high."""
    speedup: tuple[float, float, float] | None = None
    """The same for the speedup over the dense product."""


def compare(before: Iterable[Record], after: Iterable[Record]) -> list[ComparisonRow]:
    """Return a row for each case and machine, worst first. Each side holds one record per case, machine and variant.

    If a machine measured the two builds only in different variants, these are compared, and the row names them.
    """
    sides = [_by_case(records) for records in (before, after)]
    rows = []
    for place in sides[0].keys() | sides[1].keys():
        olds, news = (side.get(place, {}) for side in sides)
        pairs: list[tuple[Record | None, Record | None]] = [
            (olds[variant], news[variant]) for variant in olds.keys() & news.keys()]
        if pairs:
            pairs += [(old, None) for variant, old in olds.items() if variant not in news]
            pairs += [(None, new) for variant, new in news.items() if variant not in olds]
        else:
            pairs = [(next(iter(olds.values()), None), next(iter(news.values()), None))]
        rows += [_row(place, old, new) for old, new in pairs]
    return sorted(rows, key=_badness)


def _by_case(records: Iterable[Record]) -> dict[tuple[str, str], dict[str, Record]]:
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        found.setdefault((record.machine.name, record.case.id), {})[record.build.variant] = record
    return found


def _row(place: tuple[str, str], old: Record | None, new: Record | None) -> ComparisonRow:
    machine, case = place
    headlines = [record.verdict.headline if record else None for record in (old, new)]
    common: dict[str, Any] = {"case": case, "machine": machine, "before": headlines[0], "after": headlines[1]}
    if old is None or new is None:
        return ComparisonRow(**common, change=ChangeClass.ONLY_ONE)
    if old.build.variant != new.build.variant:
        common["variants"] = (old.build.variant, new.build.variant)
    if headlines[0] != headlines[1]:
        return ComparisonRow(**common, change=_verdict_change(old, new))
    if old.timing is None or new.timing is None:
        return ComparisonRow(**common, change=ChangeClass.UNCHANGED)
    time = _ratio(new.timing.samples_us, old.timing.samples_us)
    speedup = _speedup_ratio(old.timing, new.timing)
    return ComparisonRow(**common, change=_time_change(time, speedup), before_us=old.timing.median_us,
                         after_us=new.timing.median_us, time=time, speedup=speedup)


def _verdict_change(old: Record, new: Record) -> ChangeClass:
    before, after = (SEVERITY[record.verdict.status] for record in (old, new))
    if before == after:
        return ChangeClass.VERDICT_OTHER
    return ChangeClass.VERDICT_WORSE if after < before else ChangeClass.VERDICT_BETTER


def _time_change(time: tuple[float, float, float], speedup: tuple[float, float, float] | None) -> ChangeClass:
    _, low, high = time
    if low <= 1 <= high:
        return ChangeClass.UNCHANGED
    slower = low > 1
    # A slower case whose speedup did not fall slowed down no more than the dense product: the machine is slower.
    if speedup is not None and not (speedup[2] < 1 if slower else speedup[1] > 1):
        return ChangeClass.MACHINE
    return ChangeClass.SLOWER if slower else ChangeClass.FASTER


def _ratio(numerators: list[float], denominators: list[float]) -> tuple[float, float, float]:
    """Return the ratio of medians with its interval, widened by `NOISE`."""
    low, high = median_ratio_interval(numerators, denominators, level=LEVEL)
    value = float(np.median(numerators) / np.median(denominators))
    return value, low * math.exp(-NOISE), high * math.exp(NOISE)


def _speedup_ratio(old: Timing, new: Timing) -> tuple[float, float, float] | None:
    """Return the ratio of the stored speedups with its interval, for independent sweeps; None if one is missing."""
    if not (old.speedup and new.speedup and old.speedup_ci95 and new.speedup_ci95):
        return None
    value = math.log(new.speedup / old.speedup)
    below = math.hypot(math.log(new.speedup / new.speedup_ci95[0]), math.log(old.speedup_ci95[1] / old.speedup)) + NOISE
    above = math.hypot(math.log(new.speedup_ci95[1] / new.speedup), math.log(old.speedup / old.speedup_ci95[0])) + NOISE
    value, low, high = (math.exp(min(each, _LARGEST_LOG)) for each in (value, value - below, value + above))
    return value, low, high


_ORDER = {change: place for place, change in enumerate(ChangeClass)}


def _badness(row: ComparisonRow) -> tuple:
    status = row.after.split(" ")[0] if row.after else Status.OK
    size = abs(math.log(row.time[0])) if row.time else 0.0
    return _ORDER[row.change], SEVERITY[Status(status)], -size, row.case, row.machine

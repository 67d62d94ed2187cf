"""Find changes that need no statistics: in verdicts, in failure messages, and in metrics that do not vary between runs.

docs/decision-rule.md §8 has the rule. Each measured build of a case is compared with the previous measured one; a
failure is a point like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpxbench.records.verdict import SEVERITY, Status
from fpxbench.regressions.change_report import Direction, Event, Series
from fpxbench.regressions.series import Panel, Verdicts
from fpxbench.stats import outlier_fence

RECENT = 30
"""Builds over which earlier changes are counted."""
LEAST_HISTORY = 10
"""Fewest past moves of a series that establish what is usual for it."""

SQNR_DB = 0.01
"""Largest move of the SQNR of one weight that the order of a sum explains."""
SAMPLING_SIGMAS = 4.0
"""Largest move of a metric, in σ, that different random weights or activations explain."""
RELATIVE_ERROR = 0.10
PEAK_BYTES = 0.01


class MetricRule(NamedTuple):
    """How a metric is compared."""

    label: str
    unit: str
    worse: int
    """+1: worse when it rises; -1: when it falls."""


METRIC_RULES = {
    "packed_bytes": MetricRule("packed bytes", "bytes", 1),
    "kernels_launched": MetricRule("kernels launched", "", 1),
    "sqnr_db": MetricRule("SQNR", "dB", -1),
    "relative_error": MetricRule("relative error", "", 1),
    "peak_bytes": MetricRule("peak memory", "bytes", 1),
}
"""Metrics with events, worst first; all follow the verdicts."""


def events(panel: Panel) -> list[Event]:
    """Return all events of a panel, oldest first."""
    order = {build.key: index for index, build in enumerate(panel.builds)}
    found = [*_verdict_events(panel), *_metric_events(panel)]
    return sorted(found, key=lambda event: (order[event.first_bad.key], event.severity, event.series.case))


class Transition(NamedTuple):
    """The step from one measured build of a case to the next, as indices into the panel."""

    case: int
    before: int
    after: int
    number: int
    """Number of the step within the case, from 0."""


def _steps(measured: NDArray[np.bool_], changed: NDArray[np.bool_], column: NDArray[np.intp]) -> Iterator[Transition]:
    both = measured[:, 1:] & measured[:, :-1]
    for row, number in np.argwhere(both & changed):
        yield Transition(int(row), int(column[row, number]), int(column[row, number + 1]), int(number))


def _verdict_events(panel: Panel) -> Iterator[Event]:
    measured = panel.verdict >= 0
    column = np.argsort(~measured, axis=1, kind="stable")
    verdicts, present = np.take_along_axis(panel.verdict, column, axis=1), np.take_along_axis(measured, column, axis=1)
    changed = verdicts[:, 1:] != verdicts[:, :-1]
    for step in _steps(present, changed, column):
        before, after = (panel.verdicts[int(panel.verdict[step.case, at])] for at in (step.before, step.after))
        no_worse = panel.severity[step.case] >= SEVERITY[Status(before.status)]
        severity = SEVERITY[Status(worst(before, after))]
        yield _event(panel, step, "verdict", _direction(before, after), _message(before), _message(after), severity,
                     changed[step.case, max(0, step.number - RECENT):step.number].sum(), no_worse)


def worst(before: Verdicts, after: Verdicts) -> str:
    """Return the worse of the two statuses: the failure that began or ended."""
    return min(before.status, after.status, key=lambda status: SEVERITY[Status(status)])


def _direction(before: Verdicts, after: Verdicts) -> Direction:
    if before.status == after.status:
        return Direction.OTHER
    return Direction.WORSE if SEVERITY[Status(after.status)] < SEVERITY[Status(before.status)] else Direction.BETTER


def _message(verdict: Verdicts) -> str:
    return verdict.headline + (f": {verdict.summary}" if verdict.summary else "")


def _metric_events(panel: Panel) -> Iterator[Event]:
    for place, (name, rule) in enumerate(METRIC_RULES.items()):
        values = panel.metrics[name]
        measured = np.isfinite(values)
        column = np.argsort(~measured, axis=1, kind="stable")
        packed, seeds = (np.take_along_axis(array, column, axis=1) for array in (values, panel.seed))
        moves, allowed = _moves(name, packed), _allowed(name, panel, seeds)
        beyond = np.abs(moves) > allowed
        for step in _steps(np.take_along_axis(measured, column, axis=1), beyond, column):
            past = moves[step.case, :step.number]
            if name in EXACT or not _usual(past, moves[step.case, step.number]):
                direction = Direction.WORSE if moves[step.case, step.number] * rule.worse > 0 else Direction.BETTER
                before, after = (_number(values[step.case, at], rule.unit) for at in (step.before, step.after))
                series, was, now = values[step.case], values[step.case, step.before], values[step.case, step.after]
                yield _event(panel, step, name, direction, before, after, len(Status) + place,
                             beyond[step.case, max(0, step.number - RECENT):step.number].sum(),
                             np.abs(series - was) < np.abs(series - now))


EXACT = ("packed_bytes", "kernels_launched")
"""Metrics that are the same in every run of a build."""


def _moves(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the moves from build to build: differences for dB, logarithms of ratios for all else."""
    if name == "sqnr_db":
        return np.diff(values, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):   # from 0 to something is infinitely more, from 0 to 0 nothing
        return np.where(values[:, 1:] == values[:, :-1], 0.0, np.diff(np.log(values), axis=1))


def _allowed(name: str, panel: Panel, seeds: NDArray[np.float64]) -> NDArray[np.float64] | float:
    """Return the largest move of a metric that is due to chance or too small to report.

    The SQNR differs between random weights of N·K numbers: signal and noise are means of N·K squares with relative
    variances of about 2/NK and 4/NK. The same holds for the relative error, the norm of M·N errors.
    """
    if name in EXACT:
        return 0.0
    if name == "sqnr_db":
        chance = SAMPLING_SIGMAS * 10 / np.log(10) * np.sqrt(2 * 6 / panel.weights)
        same = seeds[:, 1:] == seeds[:, :-1]
        return np.where(same, SQNR_DB, np.maximum(SQNR_DB, chance)[:, None])
    if name == "relative_error":
        return np.maximum(RELATIVE_ERROR, SAMPLING_SIGMAS / np.sqrt(np.maximum(panel.outputs, 1)))[:, None]
    return PEAK_BYTES


def _usual(past: NDArray[np.float64], move: float) -> bool:
    """Return whether the series has moved as far between builds before."""
    past = past[np.isfinite(past)]
    return len(past) >= LEAST_HISTORY and abs(move) <= outlier_fence(past)


def _number(value: float, unit: str) -> str:
    text = f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def _event(panel: Panel, step: Transition, metric: str, direction: Direction, before: str, after: str, severity: int,
           changes: int, undone: NDArray[np.bool_]) -> Event:
    """Return the event of a transition; `undone` [builds] marks the builds on which it is over."""
    later = np.flatnonzero(undone[step.after + 1:]) if direction is Direction.WORSE else ()
    return Event(series=series_of(panel, step.case, metric), direction=direction,
                 **build_fields(panel, step.case, step.before, step.after),
                 before=before, after=after, severity=severity, changes_before=int(changes),
                 ended_at=panel.builds[step.after + 1 + int(later[0])] if len(later) else None)


def series_of(panel: Panel, case: int, metric: str) -> Series:
    return Series(machine=panel.machine, device=panel.device, variant=panel.variant, channel=panel.channel,
                  case=panel.cases[case], metric=metric)


def build_fields(panel: Panel, case: int, before: int, after: int) -> dict[str, object]:
    """Return a change report's fields for the two builds around the change."""
    return {
        "last_good": panel.builds[before], "first_bad": panel.builds[after], "last_good_tag": panel.tags[before],
        "first_bad_tag": panel.tags[after],
        "implementation_changed": bool(panel.source[case, before] != panel.source[case, after]),
    }

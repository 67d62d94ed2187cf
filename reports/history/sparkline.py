"""A small drawing of one series around a change: times, the noise before the change, builds that were not ok.

Inline SVG, as in `fpxbench.reports.sweep.dot_plot`; `fpxbench.reports.history.series_pages` draws the full chart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fpxbench.records.verdict import BY_SEVERITY, Status
from fpxbench.regressions.decision_rule import BEFORE, level_and_noise
from fpxbench.regressions.series import Panel

WIDTH, HEIGHT, MARGIN = 520.0, 64.0, 6.0
BUILDS = 60
"""Largest number of builds, including the change."""
SIGMAS = 1.96
"""Half the width of the band, in σ: 95% of the points of an unchanged series lie in it."""


@dataclass(frozen=True)
class Sparkline:
    """Positions in a drawing of `WIDTH` by `HEIGHT` units."""

    dots: list[tuple[float, float]]
    band: tuple[float, float, float, float] | None
    """x, y, width and height of the level ± `SIGMAS` σ before the change; None without a level."""
    change: float
    """x of the change."""
    verdicts: list[tuple[float, float, Status]]
    """Builds that were not ok: x, width, status."""
    first: str
    last: str
    """Tags of the builds at the ends."""


def sparkline_of(panel: Panel, row: int, metric: str, change: int, level_since: int) -> Sparkline:
    """Return the drawing of one case's series around the build in column `change`; the level before it began at column
    `level_since`.

    For a verdict the times are drawn, for any other metric its values.
    """
    start = max(0, min(change - BUILDS // 2, len(panel.builds) - BUILDS))
    stop = min(len(panel.builds), start + BUILDS)
    of_time = metric in ("median_us", "verdict")
    values = np.log(panel.metrics["median_us"][row, start:stop]) if of_time else panel.metrics[metric][row, start:stop]
    step = (WIDTH - 2 * MARGIN) / max(1, stop - start)

    def x(column: float) -> float:
        return round(MARGIN + (column - start + 0.5) * step, 1)

    level = band(panel, row, max(level_since, change - BEFORE), change) if of_time else None
    known = [value for value in (*values[np.isfinite(values)], *(level or ()))]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)

    def y(value: float) -> float:
        return round(HEIGHT - MARGIN - (value - low) / max(high - low, 0.01) * (HEIGHT - 2 * MARGIN), 1)

    around = None
    if level is not None:
        left = x(max(start, level_since, change - BEFORE) - 0.5)
        around = left, y(level[1]), round(x(change - 0.5) - left, 1), round(y(level[0]) - y(level[1]), 1)
    return Sparkline(
        dots=[(x(start + index), y(value)) for index, value in enumerate(values.tolist()) if np.isfinite(value)],
        band=around, change=x(change - 0.5),
        verdicts=[(x(begin - 0.5), round((end - begin) * step, 1), status)
                  for begin, end, status in not_ok(panel, row, start, stop)],
        first=panel.tags[start], last=panel.tags[stop - 1])


def band(panel: Panel, row: int, start: int, stop: int) -> tuple[float, float] | None:
    """Return level ± `SIGMAS` σ of these builds (docs/decision-rule.md §2) as logarithms of µs; None with fewer than
    two times."""
    window = np.log(panel.metrics["median_us"][row, start:stop])
    if np.isfinite(window).sum() < 2:
        return None
    level, noise, _ = (float(values[0]) for values in level_and_noise(window[None]))
    return level - SIGMAS * noise, level + SIGMAS * noise


def not_ok(panel: Panel, row: int, start: int, stop: int) -> list[tuple[int, int, Status]]:
    """Return runs of builds with the same status other than ok: (first column, column after the last, status). Builds
    without a measurement do not end a run."""
    runs: list[tuple[int, int, Status]] = []
    in_run = False
    for column, place in enumerate(panel.severity[row, start:stop].tolist(), start):
        if place < 0:
            continue
        status = BY_SEVERITY[place]
        if in_run and runs and runs[-1][2] is status:
            runs[-1] = runs[-1][0], column + 1, status
        elif status is not Status.OK:
            runs.append((column, column + 1, status))
        in_run = status is not Status.OK
    return runs

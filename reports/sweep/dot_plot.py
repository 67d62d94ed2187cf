"""Draw the times of one case on one axis: samples, their interval, the dense baseline, the roofline.

The drawing is inline SVG, which needs no JavaScript, prints well and follows the page's colours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fpxbench.records.record import Record

WIDTH, LEFT, RIGHT = 720.0, 8.0, 8.0


@dataclass(frozen=True)
class DotPlot:
    """Positions in a drawing that is `WIDTH` units wide."""

    dots: list[tuple[float, float]]
    interval: tuple[float, float]
    median: float
    baseline: float | None
    floor: float | None
    ticks: list[tuple[float, float]]
    """(position, microseconds)"""
    width: float = WIDTH


def dot_plot_of(record: Record) -> DotPlot | None:
    """Return the plot of a timed case; None without a positive time."""
    timing = record.timing
    if timing is None or timing.median_us <= 0:
        return None
    floor_us = floor_of(record)
    shown = [value for value in (*timing.samples_us, *timing.ci95_us, timing.median_us, timing.baseline_us, floor_us)
             if value and value > 0]
    low, high = math.log10(min(shown) / 1.15), math.log10(max(shown) * 1.15)

    def place(us: float) -> float:
        clamped = min(max(math.log10(us) if us > 0 else low, low), high)
        return round(LEFT + (clamped - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    # Spread the dots over a few heights in a fixed pattern, so that equal samples do not hide each other.
    dots = [(place(us), (index * 5 % 7 - 3) * 3.0) for index, us in enumerate(timing.samples_us)]
    return DotPlot(
        dots=dots, interval=(place(timing.ci95_us[0]), place(timing.ci95_us[1])), median=place(timing.median_us),
        baseline=place(timing.baseline_us) if timing.baseline_us else None, floor=place(floor_us) if floor_us else None,
        ticks=[(place(us), us) for us in _ticks(low, high)],
    )


def floor_of(record: Record) -> float | None:
    """Return the time in µs that a call's minimum of bytes takes at the machine's measured read bandwidth."""
    read, least = record.machine.read_gb_per_s, record.traffic.bytes_min
    return least / (read * 1e3) if read and least else None


def _ticks(low: float, high: float) -> list[float]:
    """Return round values between 10**low and 10**high; more steps in a small range."""
    steps = (1, 2, 5) if high - low > 0.6 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    decades = range(math.floor(low), math.ceil(high) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps if low <= math.log10(step) + decade <= high]
    ticks = [tick for tick in ticks if tick > 0]    # 10.0**-324 is 0
    return ticks[:: max(1, math.ceil(len(ticks) / 8))]

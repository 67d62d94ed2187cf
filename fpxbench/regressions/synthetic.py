"""Synthetic series for evaluating the rule: times of a case and of the baseline in the same runs, `[series, builds]`.

The noise of case and baseline is independent and log-normal: the control then shows only the machine's changes, which
is the hardest case.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Times = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Times of the case, and of the baseline."""

STEPS = (0.03, 0.05, 0.10)
NOISES = (0.01, 0.02, 0.03)
BEFORE, AFTER = 30, 5
LENGTHS = (35, 100, 365)

SPIKE, SPIKES = 0.20, 0.03
"""A share `SPIKES` of the runs takes `SPIKE` longer."""
LEVEL, SWITCHES = 0.08, 0.05
"""The machine's clock has two levels, `LEVEL` apart, and switches at a share `SWITCHES` of the builds."""
DRIFT = 0.10
"""How much slower the machine gets, evenly, over 365 builds."""


def step(series: int, size: float, noise: float, rng: np.random.Generator) -> Times:
    """Return `BEFORE` builds, then `AFTER` builds that take `size` more time; the baseline does not change."""
    case, baseline = rng.normal(0, noise, (2, series, BEFORE + AFTER))
    case[:, BEFORE:] += np.log1p(size)
    return np.exp(case), np.exp(baseline)


def flat(series: int, builds: int, noise: float, rng: np.random.Generator) -> Times:
    """Return series of noise alone."""
    case, baseline = rng.normal(0, noise, (2, series, builds))
    return np.exp(case), np.exp(baseline)


def spiking(series: int, builds: int, noise: float, rng: np.random.Generator) -> Times:
    """Return series with occasional spikes, in case and baseline independently."""
    times = flat(series, builds, noise, rng)
    case, baseline = (one * np.where(rng.random(one.shape) < SPIKES, 1 + SPIKE, 1) for one in times)
    return case, baseline


def two_levels(series: int, builds: int, noise: float, rng: np.random.Generator) -> Times:
    """Return series in which the machine's clock, and with it every time, switches between two levels."""
    case, baseline = flat(series, builds, noise, rng)
    clock = np.where(np.cumsum(rng.random(case.shape) < SWITCHES, axis=1) % 2, 1 + LEVEL, 1)
    return case * clock, baseline * clock


def drifting(series: int, builds: int, noise: float, rng: np.random.Generator) -> Times:
    """Return series in which the machine gets gradually slower."""
    case, baseline = flat(series, builds, noise, rng)
    clock = np.exp(np.log1p(DRIFT) * np.arange(builds) / 365)
    return case * clock, baseline * clock


FLAT: dict[str, Callable[[int, int, float, np.random.Generator], Times]] = {
    "noise only": flat, "3% spikes of 20%": spiking, "two-level clock": two_levels, "slow drift": drifting,
}
"""Series in which no case changed."""

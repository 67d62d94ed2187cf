"""Recorded series for evaluating the rule: repeated measurements of one build, so that every alarm is false.

`tools/record_noise.py` wrote `recorded.jsonl` from real runs: the noise is real, and the baseline shares more of it
with the case than a synthetic one does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from fpxbench.regressions.synthetic import AFTER, BEFORE, Times


@dataclass(frozen=True)
class Recording:
    """Times of one case, in the order in which they were measured."""

    where: str
    """The machine, and what else ran on it."""
    build: str
    case: str
    times_us: NDArray[np.float64]
    baseline_us: NDArray[np.float64]
    """Times of the dense product in the same runs."""


@cache
def recordings() -> tuple[Recording, ...]:
    """Return the recordings shipped with fpxbench."""
    lines = files("fpxbench.regressions").joinpath("recorded.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(
        Recording(one["where"], one["build"], one["case"], np.array(one["times_us"]), np.array(one["baseline_us"]))
        for one in map(json.loads, lines)
    )


def places() -> list[str]:
    """Return the distinct `Recording.where`."""
    return list(dict.fromkeys(one.where for one in recordings()))


def windows(where: str, step: float, builds: int = BEFORE + AFTER) -> Times:
    """Return every window of `builds` measurements recorded at `where`, each divided by its median.

    The case takes `step` more time from the 31st measurement on. Windows overlap, so they are not independent.
    """
    times = [(one.times_us[at:at + builds], one.baseline_us[at:at + builds])
             for one in recordings() if one.where == where for at in range(len(one.times_us) - builds + 1)]
    case, baseline = (np.array([values / np.median(values) for values in side]) for side in zip(*times, strict=True))
    case[:, BEFORE:] *= 1 + step
    return case, baseline


def noise(where: str) -> float:
    """Return the median σ of log time over the recordings at `where`."""
    return float(np.median([np.log(one.times_us).std(ddof=1) for one in recordings() if one.where == where]))

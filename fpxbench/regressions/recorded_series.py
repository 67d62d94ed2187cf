"""Recorded series, to measure the rule on: one build, measured again and again, so that every alarm is false.

`recorded.jsonl` was written by `tools/record_noise.py` from real runs: real noise, and a baseline that shares more
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
    """Machine, and what else ran on it."""
    build: str
    case: str
    times_us: NDArray[np.float64]
    baseline_us: NDArray[np.float64]
    """Of the dense product in the same runs."""


@cache
def recordings() -> tuple[Recording, ...]:
    """Return the recordings that come with fpxbench."""
    lines = files("fpxbench.regressions").joinpath("recorded.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(
        Recording(one["where"], one["build"], one["case"], np.array(one["times_us"]), np.array(one["baseline_us"]))
        for one in map(json.loads, lines)
    )


def places() -> list[str]:
    """Return the places of the recordings."""
    return list(dict.fromkeys(one.where for one in recordings()))


def windows(where: str, step: float, builds: int = BEFORE + AFTER) -> Times:
    """Return every window of `builds` measurements of the recordings there, each divided by its median.

    A case takes `step` more time from the 31st on. Windows overlap: they are not independent samples.
    """
    times = [(one.times_us[at:at + builds], one.baseline_us[at:at + builds])
             for one in recordings() if one.where == where for at in range(len(one.times_us) - builds + 1)]
    case, baseline = (np.array([values / np.median(values) for values in side]) for side in zip(*times, strict=True))
    case[:, BEFORE:] *= 1 + step
    return case, baseline


def noise(where: str) -> float:
    """Return the median of the recordings' σ there, of the logarithm of a time."""
    return float(np.median([np.log(one.times_us).std(ddof=1) for one in recordings() if one.where == where]))

"""Recorded series, to measure the rule on: one build, measured again and again, so that all that a detector says of it is false.

`recorded.jsonl` holds what `tools/record_noise.py` made of real runs: noise as it is, with a baseline that shares more with the case than
a made-up one does.
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
    """Those that come with fpxbench."""
    lines = files("fpxbench.regressions").joinpath("recorded.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Recording(**{name: np.array(value) if isinstance(value, list) else value for name, value in json.loads(line).items()})
            for line in lines)


def places() -> list[str]:
    """Where was recorded."""
    return list(dict.fromkeys(one.where for one in recordings()))


def windows(where: str, step: float, builds: int = BEFORE + AFTER) -> Times:
    """Every `builds` measurements in a row of every recording there, each divided by its own median; a case takes `step` more time
    from the 31st on. Windows overlap: they say how often, and not how surely."""
    times = [(one.times_us[at:at + builds], one.baseline_us[at:at + builds])
             for one in recordings() if one.where == where for at in range(len(one.times_us) - builds + 1)]
    case, baseline = (np.array([values / np.median(values) for values in side]) for side in zip(*times, strict=True))
    case[:, BEFORE:] *= 1 + step
    return case, baseline


def noise(where: str) -> float:
    """The middle one of the recordings' σ there, of the logarithm of a time."""
    return float(np.median([np.log(one.times_us).std(ddof=1) for one in recordings() if one.where == where]))

"""Two builds measured in turn: how much slower is one, and how sure is that. docs/decision-rule.md, "Confirmation".

Times are not normal, and few of them are there. What is assumed is only what the turns bring about: were the builds alike, then
exchanging the two of a pair would change nothing, and the differences of their logarithms would lie symmetric about 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """An estimate of a ratio with its interval; 1.061 is 6.1% more."""

    value: float
    low: float
    high: float
    """`low` is 0 and `high` infinite where there are too few pairs for the level."""
    level: float
    pairs: int

    @property
    def known(self) -> bool:
        """There are pairs enough for the level."""
        return math.isfinite(self.high)

    def __str__(self) -> str:
        if not self.known:
            return f"{percent(self.value)} (too few pairs for an interval)"
        return f"{percent(self.value)} [{percent(self.low, '')}, {percent(self.high, '')}]"


def percent(ratio: float, sign: str = "%") -> str:
    """``+6.1%`` for 1.061."""
    return f"{(ratio - 1) * 100:+.1f}{sign}"


def ratio_of_pairs(numerators: Sequence[float], denominators: Sequence[float], level: float) -> Ratio:
    """The ratio of two quantities, measured in pairs: Hodges and Lehmann's estimate with Wilcoxon's signed-rank interval.

    The estimate is the median of the averages of any two differences of logarithms (of one with itself too); the interval lies
    between two of these averages, counted so that it covers the ratio with probability `level` or more, whatever the noise's
    distribution.
    """
    differences = np.log(np.asarray(numerators, float) / np.asarray(denominators, float))
    count = len(differences)
    first, second = np.triu_indices(count)
    averages = np.sort((differences[first] + differences[second]) / 2)
    value = float(np.exp(np.median(averages)))
    outside = _averages_outside(count, level)
    if not outside:
        return Ratio(value, 0.0, math.inf, level, count)
    return Ratio(value, float(np.exp(averages[outside - 1])), float(np.exp(averages[-outside])), level, count)


def fewest_pairs(level: float) -> int:
    """The fewest pairs from which there is an interval of that level: 6 for 95%, 8 for 99%, 11 for 99.9%."""
    return math.ceil(math.log2(2 / (1 - level)) - 1e-9)


@functools.lru_cache(maxsize=256)
def _averages_outside(count: int, level: float) -> int:
    """The place, from either end and counted from 1, of the average at which the interval ends; 0 where there is none."""
    ways = np.zeros(count * (count + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, count + 1):    # the number of sets of ranks that add up to each sum
        ways[rank:] = ways[rank:] + ways[:-rank].copy()
    below = np.cumsum(ways) / 2.0**count
    return int(np.searchsorted(below, (1 - level) / 2 * (1 + 1e-12), side="right"))


def chance_of_counts(failed_good: int, runs_good: int, failed_bad: int, runs_bad: int) -> float:
    """How likely it is that of all failures so many or more fall on the bad build, if both fail alike (Fisher's exact test)."""
    runs, failed = runs_good + runs_bad, failed_good + failed_bad
    most = min(failed, runs_bad)
    ways = sum(math.comb(runs_bad, k) * math.comb(runs_good, failed - k) for k in range(failed_bad, most + 1))
    return ways / math.comb(runs, failed)

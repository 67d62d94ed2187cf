"""Statistics of times and counts, without torch: intervals of medians and ratios, Fisher's test, an outlier fence.

No function assumes a distribution of the times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray


def median_interval(samples: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the median of `samples` with its interval from order statistics: median, low, high.

    At 95% the interval needs 6 samples; of fewer it is their whole range.
    """
    ordered = np.sort(np.asarray(samples, float))
    count = len(ordered)
    low = _heads_quantile(count, (1 - level) / 2)
    return float(np.median(ordered)), float(ordered[max(low - 1, 0)]), float(ordered[min(count - low, count - 1)])


@functools.lru_cache(maxsize=256)
def _heads_quantile(tosses: int, chance: float) -> int:
    """Return the fewest heads k of which k or fewer come up with probability `chance` or more. Exact, and without
    scipy.stats, whose import costs every process that times a case two seconds."""
    enough = Fraction(chance) * 2**tosses
    heads, ways = 0, 1
    sets = ways
    while sets < enough:
        heads += 1
        ways = ways * (tosses - heads + 1) // heads
        sets += ways
    return heads


def median_ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, level: float = 0.95, resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the interval of the ratio of two medians, by bootstrap of both. One seed gives one interval."""
    rng = np.random.default_rng(seed)
    medians = [np.median(rng.choice(np.asarray(samples), (resamples, len(samples))), axis=1)
               for samples in (numerators, denominators)]
    tail = (1 - level) / 2
    low, high = np.quantile(medians[0] / medians[1], [tail, 1 - tail])
    return float(low), float(high)


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
        """Whether there are enough pairs for the level."""
        return math.isfinite(self.high)

    def __str__(self) -> str:
        if not self.known:
            return f"{percent(self.value)} (too few pairs for an interval)"
        return f"{percent(self.value)} [{percent(self.low, '')}, {percent(self.high, '')}]"


def percent(ratio: float, sign: str = "%") -> str:
    """Return a ratio as a change: ``+6.1%`` for 1.061."""
    return f"{(ratio - 1) * 100:+z.1f}{sign}"


def ratio_of_pairs(numerators: Sequence[float], denominators: Sequence[float], level: float) -> Ratio:
    """Return the ratio of two quantities measured in pairs: Hodges-Lehmann's estimate, Wilcoxon's signed-rank interval.

    The estimate is the median of the averages of any two differences of logarithms (of one with itself too). The
    interval lies between two of these averages, counted so that it covers the ratio with probability `level` or more.
    The only assumption is what interleaving brings about: were both sides alike, exchanging the two of a pair would
    change nothing, so that the differences lie symmetric about 0.
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
    """Return the fewest pairs that give an interval of that level: 6 for 95%, 8 for 99%, 11 for 99.9%."""
    return math.ceil(math.log2(2 / (1 - level)) - 1e-9)


@functools.lru_cache(maxsize=256)
def _averages_outside(count: int, level: float) -> int:
    """Return the place, from either end and from 1, of the average at which the interval ends; 0 if there is none."""
    ways = np.zeros(count * (count + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, count + 1):    # the number of sets of ranks that add up to each sum
        ways[rank:] = ways[rank:] + ways[:-rank].copy()
    below = np.cumsum(ways) / 2.0**count
    return int(np.searchsorted(below, (1 - level) / 2 * (1 + 1e-12), side="right"))


def chance_of_counts(failed_good: int, runs_good: int, failed_bad: int, runs_bad: int) -> float:
    """Return how likely so many or more of all failures are on the bad side if both fail alike: Fisher's exact test."""
    from scipy import stats  # two seconds, in the one function that needs it

    table = [[failed_bad, runs_bad - failed_bad], [failed_good, runs_good - failed_good]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)


def outlier_fence(moves: ArrayLike) -> float:
    """Return rustc-perf's bound on usual moves: Q3 + 3·IQR of their sizes. None of `moves` may be NaN."""
    ordered: NDArray[np.float64] = np.sort(np.abs(np.asarray(moves, float)))
    low, high = np.interp((0.25 * (len(ordered) - 1), 0.75 * (len(ordered) - 1)), np.arange(len(ordered)), ordered)
    return float(high + 3 * (high - low))

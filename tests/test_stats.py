"""Intervals cover what they claim to, and tests are the textbook's."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies as st

from fpxbench.stats import (
    chance_of_counts,
    fewest_pairs,
    median_interval,
    median_ratio_interval,
    outlier_fence,
    ratio_of_pairs,
)


def test_intervals_and_the_rule_do_without_torch_and_scipy_stats_whose_import_takes_seconds() -> None:
    code = """
import sys
import fpxbench.regressions.decision_rule, fpxbench.stats
fpxbench.stats.median_interval([1.0] * 6)
print({"torch", "scipy.stats"} & set(sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ---- medians


@given(st.lists(st.floats(1e-6, 10), min_size=6, max_size=60))
def test_the_median_lies_in_its_interval_and_both_among_the_samples(samples: list[float]) -> None:
    median, low, high = median_interval(samples)
    assert low <= median <= high
    assert low in samples and high in samples
    assert median_interval(samples[::-1]) == (median, low, high)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
def test_the_interval_ends_at_the_quantiles_of_the_binomial_distribution(level: float) -> None:
    from scipy.stats import binom

    for count in (*range(6, 200), 5000):
        low = max(int(binom.ppf((1 - level) / 2, count, 0.5)) - 1, 0)
        assert median_interval(range(count), level)[1:] == (low, count - 1 - low), count


@pytest.mark.parametrize("count", [6, 20, 60])
def test_the_interval_covers_the_true_median_in_95_of_100_experiments(count: int) -> None:
    experiments = np.random.default_rng(0).lognormal(size=(2000, count))     # skewed, as times are; its median is 1
    covered = sum(low <= 1 <= high for _, low, high in map(median_interval, experiments))
    assert covered / 2000 >= 0.94


def test_the_interval_of_a_speedup_holds_the_ratio_of_the_medians() -> None:
    rng = np.random.default_rng(1)
    dense, mine = rng.normal(10, 0.1, 40).tolist(), rng.normal(5, 0.1, 40).tolist()
    low, high = median_ratio_interval(dense, mine)
    assert low <= np.median(dense) / np.median(mine) <= high
    assert high - low < 0.1
    assert (low, high) == median_ratio_interval(dense, mine)


# ---- pairs


def test_the_interval_covers_the_ratio_as_often_as_it_says_whatever_the_noise() -> None:
    rng = np.random.default_rng(0)
    for noise in (lambda n: rng.normal(0, 0.02, n), lambda n: rng.standard_t(2, n) * 0.02,
                  lambda n: rng.choice([-0.1, 0.1], n)):
        inside = 0
        for _ in range(400):
            ratio = ratio_of_pairs(np.exp(noise(12) + 0.05), np.ones(12), 0.95)
            inside += ratio.low <= math.exp(0.05) <= ratio.high
        assert inside / 400 > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_interval_is_the_set_of_ratios_that_wilcoxons_test_does_not_reject() -> None:
    from scipy.stats import wilcoxon

    differences = np.random.default_rng(3).normal(0.03, 0.05, 14)
    ratio = ratio_of_pairs(np.exp(differences), np.ones(14), 0.95)
    low, high = math.log(ratio.low), math.log(ratio.high)
    for shift, rejected in ((low - 1e-6, True), (low + 1e-6, False), (high - 1e-6, False), (high + 1e-6, True)):
        assert (wilcoxon(differences - shift, method="exact").pvalue < 0.05) == rejected


def test_too_few_pairs_give_no_interval() -> None:
    assert [fewest_pairs(level) for level in (0.95, 0.99, 0.999, 0.9999)] == [6, 8, 11, 15]
    for level in (0.95, 0.99, 0.999, 0.9999):
        enough = fewest_pairs(level)
        assert not ratio_of_pairs([1.0] * (enough - 1), [1.0] * (enough - 1), level).known
        assert ratio_of_pairs([1.0] * enough, [1.0] * enough, level).known


# ---- counts, outliers


@pytest.mark.parametrize("counts", [(0, 5, 5, 5), (1, 5, 4, 5), (3, 20, 12, 20), (0, 3, 0, 3)])
def test_the_chance_of_counts_is_the_share_of_the_ways_to_deal_the_failures(counts: tuple[int, int, int, int]) -> None:
    failed_good, good, failed_bad, bad = counts
    failed = failed_good + failed_bad
    ways = sum(math.comb(bad, k) * math.comb(good, failed - k) for k in range(failed_bad, min(failed, bad) + 1))
    assert chance_of_counts(*counts) == pytest.approx(ways / math.comb(good + bad, failed))


def test_the_fence_is_the_upper_quartile_and_three_times_the_distance_between_quartiles() -> None:
    assert outlier_fence([0.0, 1, 2, 3, -4]) == 3 + 3 * (3 - 1)

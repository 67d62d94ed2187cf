"""Test whether stored codes were rounded stochastically, and without bias.

A value between two numbers of a format is rounded up with a probability equal to its relative position between them.
The test counts how many were rounded up in each eighth of that interval, for each sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.tensor_codec import decode, decode_table
from fpxbench.numbers.weight import QuantizedWeight

BINS = 8
LOG_FALSE_ALARM = math.log(2e11)
"""-ln of the probability that an unbiased rounding exceeds its bound in one bin (Bernstein's inequality)."""
FEWEST, FEWEST_OF_A_BIN = 64, 8
"""Fewest values in a weight, and in a bin, for the test."""


@dataclass(frozen=True)
class RandomRounding:
    """Shares of values that were and should have been rounded up, and the difference over its bound: float64 [2, 8],
    negative values first."""

    seen: Tensor
    wanted: Tensor
    excess: Tensor

    @property
    def unbiased(self) -> bool:
        return bool((self.excess.abs() <= 1).all())

    def message(self) -> str:
        """Describe the bin that is furthest off."""
        sign, at = divmod(int(self.excess.abs().argmax()), BINS)
        return (f"{'positive' if sign else 'negative'} values at {float(self.wanted[sign, at]):.0%} of the way between"
                f" two numbers go up in {float(self.seen[sign, at]):.0%} of cases")


def random_rounding(original: Tensor, weight: QuantizedWeight) -> RandomRounding | None:
    """Return the counts of a weight [N, K] whose codes were rounded stochastically; None if they were not, or if there
    are too few values."""
    scheme = weight.scheme
    quotient = scheme.scaling.divide(original.float(), weight.stored_scales).double()
    numbers = decode_table(scheme.format, quotient.device).double()
    numbers = numbers[numbers.isfinite()].unique()
    stored = decode(weight.codes(), scheme.format).double()
    above = torch.searchsorted(numbers, quotient.contiguous()).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    inside = (quotient > low) & (quotient < high)
    place = (quotient - low) / (high - low)
    if not bool(((stored == low) | (stored == high))[inside].all()):
        return None
    # Very near a number, fp32's rounding of the quotient decides.
    inside &= (place > 2.0**-10) & (place < 1 - 2.0**-10)
    up, place, sign = (stored == high)[inside], place[inside], (quotient[inside] > 0).long()
    index = sign * BINS + (place * BINS).long().clamp(max=BINS - 1)

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(2 * BINS, dtype=torch.float64, device=index.device).scatter_add(0, index, values.double())

    count, ups, expected = summed(torch.ones_like(place)), summed(up), summed(place)
    if len(place) < FEWEST or not (_differs_for_equal_values(quotient[inside], up) or _goes_both_ways(ups, count)):
        return None
    spread = summed(place * (1 - place))
    bound = LOG_FALSE_ALARM / 3 + (LOG_FALSE_ALARM**2 / 9 + 2 * LOG_FALSE_ALARM * spread).sqrt()
    seen, wanted = ((each / count.clamp(min=1)).reshape(2, BINS).cpu() for each in (ups, expected))
    return RandomRounding(seen, wanted, ((ups - expected) / bound).reshape(2, BINS).cpu())


def _differs_for_equal_values(values: Tensor, up: Tensor) -> bool:
    """Return whether equal values were rounded both up and down, which a deterministic rounding cannot do."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    ups = torch.zeros(len(count), dtype=torch.float64, device=values.device).scatter_add(0, group, up.double())
    repeated = count > 1
    return bool(repeated.any()) and int(((ups > 0) & (ups < count))[repeated].sum()) * 4 > int(repeated.sum())


def _goes_both_ways(ups: Tensor, count: Tensor) -> bool:
    """Return whether values far from the midpoint are rounded both ways: rounding to nearest sends all of them to the
    nearer number, and directed rounding all to the same side."""
    place = torch.arange(2 * BINS, device=count.device) % BINS
    far = ((place == 1) | (place == 2) | (place == BINS - 3) | (place == BINS - 2)) & (count >= FEWEST_OF_A_BIN)
    return int(far.sum()) >= BINS // 2 and int(((ups > 0) & (ups < count))[far].sum()) >= 0.75 * int(far.sum())


def biased_rounding(original: Tensor, weight: QuantizedWeight) -> str | None:
    """Describe the bias of stochastically rounded codes; None if they are unbiased, or were not rounded stochastically.
    """
    found = random_rounding(original, weight)
    return None if found is None or found.unbiased else f"values are rounded at random with a bias: {found.message()}"

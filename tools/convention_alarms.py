"""Print how often chance contradicts the nibble order, for channels of several kinds: the table in docs/checkpoints.md.

Two profiles of channels are drawn that have nothing to do with each other.
Usage: python tools/convention_alarms.py [DRAWS]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fpxbench.checkpoint.conventions import _pairs_correlate

DEVIATIONS = 3.0
DUE = math.erfc(DEVIATIONS / math.sqrt(2)) / 2
"""The chance of a normal number below -3."""


def _heavy(k: int, rng: torch.Generator) -> Tensor:
    return torch.randn(k, generator=rng) / (torch.randn(k, generator=rng).abs() + 0.05) / 2


def _outlier(k: int, rng: torch.Generator) -> Tensor:
    profile = 0.1 * torch.randn(k, generator=rng)
    profile[torch.randint(k, (1,), generator=rng)] = 4.0
    return profile


def _dead(k: int, rng: torch.Generator) -> Tensor:
    dead = torch.rand(k, generator=rng) < 0.02
    return torch.where(dead, -34.5, torch.randn(k, generator=rng) / 2)


KINDS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "log-normal": lambda k, rng: torch.randn(k, generator=rng) / 2,
    "heavy tails": _heavy,
    "one outlier channel": _outlier,
    "2% dead channels": _dead,
}
"""Logarithms of the sizes of K channels."""


def by_value(channels: Tensor, profile: Tensor) -> tuple[float, float]:
    """Return what `_pairs_correlate` does, without ranks: Fisher's z of Pearson's correlation."""
    seen, expected = (values[0::2] - values[1::2] for values in (channels, profile))
    seen, expected = seen - seen.mean(), expected - expected.mean()
    correlation = (seen @ expected / (seen.norm() * expected.norm()).clamp(min=1e-30)).item()
    return correlation, math.atanh(max(-0.999999, min(0.999999, correlation))) * math.sqrt(len(seen) - 3)


def alarms(kind: str, k: int, draws: int, correlate: Callable[[Tensor, Tensor], tuple[float, float]]) -> float:
    """Return the share of unrelated profiles that contradict each other by `DEVIATIONS`."""
    rng = torch.Generator().manual_seed(k)
    make = KINDS[kind]
    found = sum(correlate(make(k, rng).double(), make(k, rng).double())[1] < -DEVIATIONS for _ in range(draws))
    return found / draws


def main() -> int:
    draws = int(sys.argv[1]) if sys.argv[1:] else 20_000
    print("| channels | K | by ranks | by values | normal |\n|---|---|---|---|---|")
    for kind in KINDS:
        for k in (64, 128, 512):
            ranks, values = (alarms(kind, k, draws, each) for each in (_pairs_correlate, by_value))
            print(f"| {kind} | {k} | {ranks:.2%} | {values:.2%} | {DUE:.2%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

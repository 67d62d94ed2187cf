"""Statistics over the tokens of a text: intervals, and the rule by which a kernel is wrong. Imports no torch.

The rule. The codes of a scheme, decoded exactly, give the format's own loss. The kernel's loss is the KL divergence of
its next-token distributions from those of the exactly decoded model. Two right kernels also differ, since they sum in
different orders and round in different places. That noise is the divergence between the unquantized model and the same
model with each product as the sum of two rounded halves. A kernel is wrong if the lower bound of its mean divergence
exceeds `NOISE_FACTOR` times the upper bound of the noise's: KL grows with the square of the error, so a right kernel
with three times the noise's rounding error passes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fpxbench.model.generate_record import Divergence, Estimate

NOISE_FACTOR = 10.0
LEAST_KL = 1e-9
"""Smaller KL divergences of fp32 log-probabilities are rounding errors of their own sum."""
BLOCK = 16
"""Block length of the bootstrap: neighbouring tokens are correlated."""
RESAMPLES = 500


def bootstrap(values: ArrayLike, statistic: Callable[..., NDArray[np.float64]], *, seed: int = 0,
              level: float = 0.95, neighbours: int = BLOCK, resamples: int = RESAMPLES) -> Estimate:
    """Return `statistic` of `values` [T] with its percentile interval by a block bootstrap.

    statistic : takes ``axis``, as `numpy.mean` does
    neighbours : values per block, fewer if there are few values; 1 for independent values
    """
    array = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    block = max(1, min(neighbours, len(array) // 8))
    count = -(-len(array) // block)
    starts = rng.integers(0, len(array) - block + 1, (resamples, count))
    picked = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, :len(array)]
    tail = (1 - level) / 2
    low, high = np.quantile(statistic(array[picked], axis=1), [tail, 1 - tail])
    return Estimate(value=float(statistic(array, axis=0)), low=float(low), high=float(high))


def divergence(kl: ArrayLike) -> Divergence:
    """Return the statistics of KL divergences [T]."""
    values = np.maximum(np.asarray(kl, np.float64), 0.0)
    return Divergence(mean=bootstrap(values, np.mean), median=bootstrap(values, np.median),
                      p99=bootstrap(values, lambda array, axis: np.quantile(array, 0.99, axis=axis)),
                      maximum=float(values.max()))


def perplexity(log_probabilities: ArrayLike) -> Estimate:
    """Return the perplexity of a text from the log-probabilities [T] of its tokens."""
    mean = bootstrap(log_probabilities, np.mean)
    # An overflow is a perplexity too large to matter.
    value, low, high = (float(min(np.exp(min(-x, 700.0)), 1e300)) for x in (mean.value, mean.high, mean.low))
    return Estimate(value=value, low=low, high=high)


def threshold(noise: Divergence) -> float:
    """Return the mean KL divergence from the exactly decoded model above which a kernel is wrong, in nats."""
    return NOISE_FACTOR * max(noise.mean.high, LEAST_KL)


def is_wrong(kl_kernel: Divergence, noise: Divergence) -> bool:
    """Return whether a kernel differs from the exactly decoded model by more than rounding explains."""
    return kl_kernel.mean.low > threshold(noise)

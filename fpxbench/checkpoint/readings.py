"""Evidence of two readings of the same bytes."""

from __future__ import annotations

import math

from fpxbench.checkpoint.checkpoint_report import Evidence

MOST_PLAIN_ROWS = 4096
"""Rows of an unquantized layer that a quantized one is compared with."""


def judged(convention: str, read_as: str, other: str, log_ratio: float, message: str, contradicts: float = math.inf,
            possible: bool = True) -> Evidence:
    """Return the evidence on two readings, `read_as` and `other`, from the logarithm of their likelihood ratio.

    possible : whether `other` could be a finding
    """
    contradicted = log_ratio < -contradicts and possible
    return Evidence(convention=convention, read_as=read_as, fits_better=other if contradicted else "",
                    leans_to=other if log_ratio < 0 and not contradicted else "", sureness=sureness(log_ratio),
                    message=message)


def sureness(log_ratio: float) -> float:
    """Return the probability of the favoured of two readings, from the logarithm of their likelihood ratio."""
    return 1 / (1 + math.exp(-min(abs(log_ratio), 700.0)))

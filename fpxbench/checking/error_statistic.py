"""Test whether many outputs together are as accurate as their roundings allow.

`Reference.tolerance` bounds each output by its worst case, a few percent. The mean square error is known far more
precisely: docs/tolerance.md derives `Reference.variance` and the threshold below, with a false-alarm rate under 1e-9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpxbench.checking.output_rounding import OutputRounding, coarser_outputs
from fpxbench.checking.reference import Reference, ulp
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

LOG_FALSE_ALARM = math.log(1e10)
"""-ln of the probability that a right implementation exceeds the threshold of one test."""
_ROWS_COMPARED = 128


@dataclass
class ErrorStatistic:
    """The mean square error of many outputs, and the one that their roundings allow.

    alike : number of outputs per independent error, 1 or more (`likeness_of_rows`)
    """

    alike: float = 1.0
    outputs: int = 0
    squares: float = 0.0
    allowed: float = 0.0
    allowed_squares: float = 0.0
    largest: float = 0.0
    rounding: OutputRounding = field(default_factory=OutputRounding)
    coarser: str | None = None
    """A clause if outputs are rounded to fewer bits than their dtype has."""

    def add(self, y: Tensor, expected: Reference) -> None:
        """Add the outputs y [M, N] of one product whose activation had random signs."""
        limit = torch.finfo(y.dtype).max
        counted = expected.product.isfinite() & (expected.product.abs() < limit) & y.isfinite()
        seen, exact, variance = y.double()[counted], expected.product[counted], expected.variance[counted]
        error = seen - exact
        self.rounding.add(seen, exact, ulp(exact, y.dtype))
        self.coarser = coarser_outputs(y)
        self.outputs += error.numel()
        self.squares += float(error.square().sum())
        self.allowed += float(variance.sum())
        self.allowed_squares += float(variance.square().sum())
        self.largest = max(self.largest, float(variance.max()) if error.numel() else 0.0)

    @property
    def factor(self) -> float:
        """The ratio of the root mean square error to the largest that the roundings allow."""
        return math.sqrt(self.squares / self.allowed) if self.allowed else 0.0

    @property
    def threshold(self) -> float:
        """The upper bound of `factor` in a right implementation, exceeded in one of 1e10 tests (Laurent and Massart,
        2000)."""
        if not self.allowed:
            return math.inf
        spread = math.sqrt(LOG_FALSE_ALARM * self.alike * self.allowed_squares)
        excess = (2 * spread + 2 * LOG_FALSE_ALARM * self.alike * self.largest) / self.allowed
        return math.sqrt(1 + excess)

    def verdict(self) -> Verdict | None:
        """Return the verdict if the errors are larger than their roundings explain; else None."""
        if self.factor <= self.threshold:
            return None
        return Verdict(
            status=Status.WRONG, kind=Kind.INACCURATE,
            evidence={"error_factor": repr(self.factor), "error_threshold": repr(self.threshold),
                      "outputs": self.outputs},
            summary=f"each of {self.outputs} outputs is within its worst-case bound, but together their errors are"
                    f" {self.factor:.3g} times what their roundings allow (at most {self.threshold:.3g} is right): "
                    + (self.coarser or "as when sums are kept in less than fp32, or weights are truncated"))


def likeness_of_rows(decoded: Tensor) -> float:
    """Return how many outputs of one token share an error: 1 for orthogonal rows, N for equal ones.

    The errors of outputs that share an activation are at most as correlated as the rows of the weight, fp32 [N, K].
    """
    n = decoded.shape[0]
    rows = decoded[torch.linspace(0, n - 1, min(n, _ROWS_COMPARED)).round().long().unique()].double()
    norms = rows.norm(dim=1)
    rows = rows[(norms > 0) & norms.isfinite()] / norms[(norms > 0) & norms.isfinite(), None]
    count = len(rows)
    if count < 2:
        return float(n)
    off_diagonal = float((rows @ rows.T).square().sum() - count) / (count * (count - 1))
    return 1 + (n - 1) * max(0.0, min(1.0, off_diagonal))

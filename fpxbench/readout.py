"""Read out the weight that an implementation acts by: multiplied by one-hot activations, it gives it away."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpxbench import check, conduct, packing
from fpxbench.conduct import Operands
from fpxbench.implementation import Implementation
from fpxbench.weight import QuantizedWeight

MOST_COLUMNS = 64
"""With one row of activation; up to four times as many with more."""
PROBE_SECONDS = 20.0
"""No further columns are read out after this: in an interpreter one product can take a second."""


@dataclass(frozen=True)
class Prediction:
    """The weight [N, C] that a reading would give (float64), and the rows where a NaN anywhere in the row may show."""

    weight: Tensor
    tainted: Tensor


@dataclass
class Readout:
    """What one-hot activations gave: column `columns[i]` of the weight acted by is ``seen[:, i]``, float64 [N, C]."""

    weight: QuantizedWeight
    columns: Tensor
    seen: Tensor
    definition: Prediction
    dtype: torch.dtype
    activation_format: str | None

    def fits(self, predicted: Prediction, rows: Tensor | None = None) -> bool:
        """Whether every weight read out is the predicted one within rounding, and at least one number was read."""
        seen = self.seen if rows is None else self.seen[rows]
        tolerance = check.one_hot_tolerance(predicted.weight, self.dtype, self.activation_format)
        limit = torch.finfo(self.dtype).max
        lost = ~predicted.weight.isfinite() | (predicted.weight.abs() > limit)
        near = (seen - predicted.weight).abs() <= tolerance
        nonfinite = ~seen.isfinite()
        right = torch.where(lost, nonfinite, near | (nonfinite & predicted.tainted[:, None]))
        return bool(right.all()) and bool((near | lost).any())

    def wrong(self) -> Tensor:
        """Where it is not what the definition says: bool [N, C]."""
        tolerance = check.one_hot_tolerance(self.definition.weight, self.dtype, self.activation_format)
        return ~((self.seen - self.definition.weight).abs() <= tolerance)

    def example(self) -> dict[str, Any]:
        """The first weight that is not read as the definition says."""
        row, i = self.wrong().nonzero()[0].tolist()
        column = int(self.columns[i])
        found = {"row": row, "column": column, "read_as": repr(float(self.seen[row, i])),
                 "stored": repr(float(self.definition.weight[row, i]))}
        if self.weight.has_codes:
            found["code"] = self.weight.scheme.format.describe_code(int(self.weight.codes()[row, column]))
        return found

    def correlation(self) -> float:
        return correlation(self.seen, self.definition.weight)


def read_out(implementation: Implementation, operands: Operands) -> Readout | None:
    """The columns that an implementation acts by, as many as its speed allows; None where no row of x is there to ask with."""
    case, weight = operands.case, operands.weight
    if case.m == 0:
        return None
    wanted = _columns_worth_reading(weight, case.m)
    dtype = check.ACTIVATION_DTYPES[case.activation]
    seen, started = [], time.monotonic()
    for first in range(0, len(wanted), case.m):
        batch = wanted[first:first + case.m]
        x = check.one_hot(batch, case.m, case.k, dtype, operands.device)
        y = conduct.call(implementation, x, weight, operands.device)
        seen.append(y[:len(batch)].double().T)
        if time.monotonic() - started > PROBE_SECONDS:
            break
    read = torch.cat(seen, dim=1)
    columns = torch.tensor(wanted[:read.shape[1]], device=read.device)
    decoded = operands.decoded
    definition = Prediction(decoded[:, columns].double(), ~decoded.isfinite().all(dim=1))
    return Readout(weight, columns, read, definition, dtype, implementation.activation_format)


def _columns_worth_reading(weight: QuantizedWeight, m: int) -> list[int]:
    """All columns if they are few; else those that hold the rare codes, both sides of the places where layouts and
    blocks change, and an even spread."""
    k = weight.shape[1]
    most = MOST_COLUMNS * min(m, 4)
    if k <= most:
        return list(range(k))
    chosen = check.columns_covering_codes(weight, most // 4) if weight.has_codes else []
    boundaries = [packing.padded_k(k) * part // 8 for part in range(1, 8)]
    block = weight.scheme.scaling.block if weight.scheme.quantized else None
    if block is not None:
        boundaries += [block, 2 * block, k // block * block]
    boundaries += [k // size * size for size in (16, 32, 64, 128)]
    chosen += [0, 1, k - 1, k - 2]
    chosen += [column for boundary in boundaries for column in (boundary - 1, boundary)]
    chosen += range(0, k, max(1, k // most))
    return [column for column in dict.fromkeys(chosen) if 0 <= column < k][:most]


def correlation(a: Tensor, b: Tensor) -> float:
    """Cosine of the angle between two tensors, over the elements where both are finite."""
    both = a.isfinite() & b.isfinite()
    a, b = a[both], b[both]
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else 0.0

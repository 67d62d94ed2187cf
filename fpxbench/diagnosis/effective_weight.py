"""Read an implementation's effective weight: the products with one-hot activations are its columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpxbench.checking import contract, inputs, reference
from fpxbench.checking.operands import Operands
from fpxbench.implementation import Implementation
from fpxbench.numbers import packing
from fpxbench.numbers.weight import QuantizedWeight

MOST_COLUMNS = 64
"""Columns to read with M = 1; up to four times as many with more rows."""
PROBE_SECONDS = 20.0
"""Reading ends after this long: in an interpreter one product can take a second."""


@dataclass(frozen=True)
class Prediction:
    """The weight [N, C] that a hypothesis predicts, float64, and the rows, bool [N], in which NaN may appear."""

    weight: Tensor
    tainted: Tensor


class WeightsRead:
    """Rows of a weight as read, float64 [R, C], to compare with many predictions."""

    def __init__(self, seen: Tensor, dtype: torch.dtype, activation_format: str | None) -> None:
        self.seen, self.dtype, self.activation_format = seen, dtype, activation_format
        self.nonfinite = ~seen.isfinite()

    def fit(self, predictions: Sequence[Prediction]) -> bool:
        """Return whether every weight matches one of the predictions, within rounding, and any number was read."""
        right = torch.zeros_like(self.nonfinite)
        numbers_read = False
        for one in predictions:
            tolerance = reference.one_hot_tolerance(one.weight, self.dtype, self.activation_format)
            near = (self.seen - one.weight).abs() <= tolerance
            if len(predictions) == 1 and not bool((near | self.nonfinite).all()):
                return False        # a cheap test that rejects most predictions
            lost = ~one.weight.isfinite() | (one.weight.abs() > torch.finfo(self.dtype).max)
            right |= torch.where(lost, self.nonfinite, near | (self.nonfinite & one.tainted[:, None]))
            numbers_read |= bool((near | lost).any())
            if bool(right.all()):
                break
        return numbers_read and bool(right.all())


@dataclass
class Readout:
    """Products with one-hot activations: column `columns[i]` of the effective weight is ``seen[:, i]``, float64 [N, C].

    weight : the stored codes and scales; if they are hidden, those that the scheme makes of `original`
    original : the float weight [N, K] that was quantized, if its codes are hidden
    """

    weight: QuantizedWeight
    columns: Tensor
    seen: Tensor
    definition: Prediction
    dtype: torch.dtype
    activation_format: str | None = None
    original: Tensor | None = None
    ties_decided: bool = True
    """Whether a quotient by a power of two is exact; not if the hidden scale may be a neighbouring number."""

    def fits(self, predicted: Prediction | Sequence[Prediction], rows: Tensor | None = None) -> bool:
        """Return whether every weight read on `rows` (all) matches one of the predictions, within rounding, and any
        number was read."""
        return self.on(rows).fit([predicted] if isinstance(predicted, Prediction) else predicted)

    def on(self, rows: Tensor | None = None) -> WeightsRead:
        """Return the weights read on `rows` (all)."""
        return WeightsRead(self.seen if rows is None else self.seen[rows], self.dtype, self.activation_format)

    def wrong(self) -> Tensor:
        """Return where the readout differs from the definition: bool [N, C]."""
        tolerance = reference.one_hot_tolerance(self.definition.weight, self.dtype, self.activation_format)
        return ~((self.seen - self.definition.weight).abs() <= tolerance)

    def example(self) -> dict[str, Any]:
        """Return the first weight that differs from the definition."""
        row, i = self.wrong().nonzero()[0].tolist()
        return self.described(row, i)

    def described(self, row: int, i: int) -> dict[str, Any]:
        """Describe the weight in row `row` of the `i`-th column read, with its code."""
        column = int(self.columns[i])
        found = {"row": row, "column": column, "read_as": repr(float(self.seen[row, i])),
                 "stored": repr(float(self.definition.weight[row, i]))}
        if self.weight.has_codes:
            found["code"] = self.weight.scheme.format.describe_code(int(self.weight.codes()[row, column]))
        return found

    def correlation(self) -> float:
        return correlation(self.seen, self.definition.weight)


def read_out(implementation: Implementation, operands: Operands, columns: Iterable[int] = (), *,
             seconds: float = PROBE_SECONDS, every: bool = False) -> Readout | None:
    """Read `columns` of the effective weight and a selection of others within `seconds`, or `every` column; return None
    for M = 0."""
    case, weight = operands.case, operands.weight
    if case.m == 0:
        return None
    wanted = list(range(case.k)) if every else _columns_worth_reading(weight, case.m, columns)
    seen = [weights for _, weights in contract.one_hot_columns(implementation, operands, wanted, seconds=seconds)]
    read = torch.cat(seen, dim=1).double()
    read_columns = torch.tensor(wanted[:read.shape[1]], device=read.device)
    decoded = operands.decoded
    definition = Prediction(decoded[:, read_columns].double(), ~decoded.isfinite().all(dim=1))
    return Readout(weight, read_columns, read, definition, inputs.ACTIVATION_DTYPES[case.activation],
                   implementation.activation_format_under(weight.scheme))


def _columns_worth_reading(weight: QuantizedWeight, m: int, first: Iterable[int]) -> list[int]:
    """Return all columns if they are few; else `first`, columns with rare codes, columns on both sides of layout and
    block boundaries, and an even spread."""
    k = weight.shape[1]
    most = MOST_COLUMNS * min(m, 4)
    if k <= most:
        return list(range(k))
    chosen = [*first, *(inputs.columns_covering_codes(weight, most // 4) if weight.has_codes else [])]
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
    """Return the cosine of the angle between two tensors, over the elements where both are finite."""
    both = a.isfinite() & b.isfinite()
    a, b = a[both], b[both]
    norms = float(a.norm() * b.norm())
    return float((a * b).sum()) / norms if norms else 0.0

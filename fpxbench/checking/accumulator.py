"""Measure the accumulator by cancellation: its significand bits, its range, and the order of summation.

The probe weight is 1 almost everywhere, and a row of the activation is L at one column, -L at another, and a small s at
a third: the exact product is s. An accumulator of p bits keeps s = 2**-q L for q < p, and the columns at which s is
lost show which products share a running sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.checking.examination import Deadline, Examination
from fpxbench.checking.operands import Operands
from fpxbench.numbers.scheme import scheme_named

_LARGE = 15
"""log2 of L: the largest power of two of fp16."""
_LOST = 28
"""s = 2**-28 L is lost in fp32 and anything narrower; s = 2**-13 is still a normal number in fp16."""
_TRIPLES = 24
_WINDOW = 48
"""Number of columns on either side of an edge to try exhaustively."""
_PAIRS = (0.17, 0.23, 0.41, 0.52, 0.61, 0.74, 0.83)
"""Positions of -L, as shares of the columns: the block is the greatest common divisor of the edges found."""
_LARGEST_WEIGHT_CPU = 1 << 20


@dataclass
class MeasuredAccumulator:
    """The measured properties of an accumulator; None where unknown."""

    bits: int | None = None
    overflows: bool | None = None
    block: int | None = None
    order: str = ""


def measure_accumulator(examination: Examination, quantized: Callable[[Operands, Tensor], Operands]) -> None:
    """Measure the accumulator and write it to the examination's properties; if it cannot be measured, note why.

    `quantized` quantizes a weight [N, K] for the given operands and returns its operands.
    """
    operands, implementation = examination.operands, examination.implementation
    case = operands.case
    why = None
    if case.m == 0 or not scheme_named(case.scheme).quantized or implementation.slow(operands.device):
        why = "nothing to multiply, a dense weight, or an interpreter"
    elif operands.rule is not None:
        why = "the activation is quantized, so the probe's numbers do not reach the sum"
    elif operands.device == "cpu" and case.n * case.k > _LARGEST_WEIGHT_CPU:
        why = "the weight is large; measured on canaries"
    if why is None:
        original, columns = probe_weight(operands)
        probe = quantized(operands, original)
        is_one = (probe.decoded == 1).all(dim=0).tolist()   # one transfer from a GPU, not one per column
        ones = [column for column in columns if is_one[column]]
        if len(ones) >= _TRIPLES:
            found = _Probe(examination, probe, ones).run(examination.deadline(0.3))
            examination.covered["accumulator"] = "measured by cancellation"
            examination.properties |= {"accumulator_bits": found.bits, "accumulator_overflows": found.overflows,
                                       "sum_block": found.block, "sum_order": found.order or None}
            return
        why = f"only {len(ones)} columns of the probe weight are stored as exactly 1"
    examination.not_asked["accumulator"] = why


def probe_weight(operands: Operands) -> tuple[Tensor, list[int]]:
    """Return a weight [N, K] of ones, except each block's first column, which makes the scale 1; and the columns of
    ones.

    If the scaling has a second level, the first element is larger, so that the scale of every other block is a power of
    two: a kernel may multiply block scales into the products, and a scale of 3 significant bits would make the
    accumulator look 2 bits narrower. The first block's columns are not used then.
    """
    case, scheme = operands.case, scheme_named(operands.case.scheme)
    weight = torch.ones(case.n, case.k, device=operands.device)
    block = scheme.scaling.block or case.k
    weight[:, ::block] = scheme.format.max
    first = 0
    if scheme.scaling.has_tensor_scale:
        levels, _ = scheme.scaling.levels(scheme.scaling.choose(weight, scheme.format))
        weight[0, 0] *= 2 * math.frexp(float(levels.reshape(-1)[-1]))[0]
        first = block
    return weight, [column for column in range(first, case.k) if column % block]


class _Probe:
    def __init__(self, examination: Examination, operands: Operands, columns: Sequence[int]) -> None:
        self.matmul, self.operands, self.columns = examination.implementation.matmul, operands, columns
        self.dtype = inputs.ACTIVATION_DTYPES[operands.case.activation]
        self.rng = inputs.generator(operands.seed, "accumulator")

    def run(self, deadline: Deadline) -> MeasuredAccumulator:
        found = MeasuredAccumulator(overflows=self._overflows())
        triples = self._triples()
        kept = self.kept([(*triple, _LOST) for triple in triples])
        lost = [triple for triple, is_kept in zip(triples, kept, strict=True) if not is_kept]
        if not lost:
            found.order = "products that lie apart are summed apart"
            return found
        found.bits = self._bits(lost[:6])
        if not deadline.passed():
            found.block, found.order = self._order(deadline)
        return found

    def kept(self, rows: Sequence[tuple[int, int, int, int]]) -> list[bool]:
        """Return for each row (column of L, of s, of -L, and q) whether s = 2**-q L is kept exactly."""
        m, k = self.operands.case.m, self.operands.case.k
        results: list[bool] = []
        for first in range(0, len(rows), m):
            batch = rows[first:first + m]
            x = torch.zeros(m, k)
            for row, (large, small, minus, q) in enumerate(batch):
                x[row, large], x[row, minus], x[row, small] = 2.0**_LARGE, -2.0**_LARGE, 2.0**(_LARGE - q)
            with torch.no_grad():
                y = self.matmul(x.to(self.dtype).to(self.operands.device), self.operands.weight).float().cpu()
            for row, (_, _, _, q) in enumerate(batch):
                results.append(bool((y[row] == 2.0**(_LARGE - q)).all()))
        return results

    def _triples(self) -> list[tuple[int, int, int]]:
        """Return columns of L, s and -L: random ones, and neighbours at several distances."""
        triples = []
        for number in range(_TRIPLES):
            if number % 2:
                picked = torch.randperm(len(self.columns), generator=self.rng)[:3].sort().values.tolist()
            else:
                step = min(2 ** (number // 4), (len(self.columns) - 1) // 2)
                start = int(torch.randint(len(self.columns) - 2 * step, (1,), generator=self.rng))
                picked = [start, start + step, start + 2 * step]
            triples.append(tuple(self.columns[index] for index in picked))
        return triples

    def _bits(self, triples: Sequence[tuple[int, int, int]]) -> int:
        """Return the smallest q at which one of `triples` loses s: the number of significand bits."""
        low, high = [0] * len(triples), [_LOST] * len(triples)
        while any(b - a > 1 for a, b in zip(low, high, strict=True)):
            middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
            kept = self.kept([(*triple, max(q, 1)) for triple, q in zip(triples, middle, strict=True)])
            for index, is_kept in enumerate(kept):
                if high[index] - low[index] > 1:
                    (low if is_kept else high)[index] = middle[index]
        return min(high)

    def _overflows(self) -> bool | None:
        """Return whether sums of 2**17 overflow, as in fp16 but not in fp32; None if the probe does not cancel."""
        m, k = self.operands.case.m, self.operands.case.k
        x = torch.zeros(m, k)
        half = len(self.columns) // 2
        x[0, self.columns[:8]] = 2.0**_LARGE
        x[0, self.columns[max(half, len(self.columns) - 8):]] = -2.0**_LARGE
        if float(x.sum()) != 0:
            return None
        with torch.no_grad():
            y = self.matmul(x.to(self.dtype).to(self.operands.device), self.operands.weight)
        return not bool(y[0].isfinite().all())

    def _order(self, deadline: Deadline) -> tuple[int | None, str]:
        """Return the size of the blocks that are summed first, and the order of summation as text.

        L is at the first column and -L at column k. A running sum loses every s before k and none after it. If blocks
        are summed first, the losses end at a block's edge: before k if a block's sum is wider, else after it.
        """
        last, k = len(self.columns) - 1, self.operands.case.k
        edges: list[tuple[int, int]] = []
        for share in _PAIRS:
            if deadline.passed():
                return None, ""     # with too few edges, the block would be a guess
            at = int(share * last)
            edge = self._end_of_losses(at)
            if edge is None:
                return None, "in no simple order"
            edges.append((self.columns[at], edge))
        if all(edge == column for column, edge in edges):
            return None, "one after another"
        block = math.gcd(*(edge for _, edge in edges if edge < k)) or k
        if block < 2 or not all(
            edge in (column // block * block, min(k, (column // block + 1) * block)) for column, edge in edges
        ):
            return None, "in no simple order"       # for example a tree
        return block, f"in blocks of {block}"

    def _end_of_losses(self, at: int) -> int | None:
        """Return the column from which s is kept again, with -L at column number `at`; None if losses are not a single
        run."""
        columns, last, k = self.columns, len(self.columns) - 1, self.operands.case.k

        def lost(numbers: Sequence[int]) -> list[bool]:
            return [not kept for kept in self.kept([(columns[0], columns[i], columns[at], _LOST) for i in numbers])]

        candidates = [i for i in range(1, last + 1) if i != at]
        low, high = -1, len(candidates)         # lost up to `low`, kept from `high` on
        while high - low > 1:
            middle = sorted({low + max(1, (high - low) * part // 8) for part in range(1, 8)})
            states = lost([candidates[i] for i in middle])
            if states != sorted(states, reverse=True):
                return None
            low = max([low, *(i for i, is_lost in zip(middle, states, strict=True) if is_lost)])
            high = min([high, *(i for i, is_lost in zip(middle, states, strict=True) if not is_lost)])
        beside = range(max(0, high - _WINDOW), min(len(candidates), high + _WINDOW))
        tried = [*beside, *range(0, len(candidates), max(1, len(candidates) // 32))]
        if lost([candidates[i] for i in tried]) != [i < high for i in tried]:
            return None
        if high == 0:
            return 0  # both lie in the first block
        after = candidates[high] if high < len(candidates) else None
        lost_last, kept_first = columns[candidates[high - 1]], k if after is None else columns[after]
        if lost_last < columns[at] <= kept_first and at in (candidates[high - 1] + 1, after):
            return columns[at]
        # Columns that are not probed (such as a block's first) may lie on the edge itself.
        return max(range(lost_last + 1, kept_first + 1), key=lambda edge: edge & -edge)

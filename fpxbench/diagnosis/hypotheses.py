"""What weight would an implementation act by that makes these known mistakes, and which of them explain what was read out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpxbench.diagnosis.decode_fault import STEPS, Misreading
from fpxbench.diagnosis.decode_faults import block_of
from fpxbench.diagnosis.effective_weight import Prediction, Readout
from fpxbench.diagnosis.encode_faults import QUOTIENT_SLACK, Misencoding, encoded
from fpxbench.numbers import packing
from fpxbench.numbers.codec import decode, decode_table
from fpxbench.numbers.scaling import NV_SCALE_FORMAT, Scales, Scaling, scale_down, scale_values
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind

Mistakes = tuple[Misreading | Misencoding, ...]

FEW_ROWS, SOME_ROWS = 12, 128
"""A hypothesis is tried on so many rows first, and only if it fits them on more, and on all."""
_AT_ONCE = 1 << 22


def explanations(readouts: Sequence[Readout], known: Sequence[Misreading | Misencoding], most: int = 2) -> list[Mistakes]:
    """The sets of known mistakes, as small as can be, that explain every readout; none where more than `most` at once would be
    needed, or one that is not known."""
    predictors = [Predictor(readout) for readout in readouts]
    for tried in (singly(known), in_pairs(known))[:most]:
        fitting = [mistakes for mistakes in tried if all(predictor.explains(mistakes) for predictor in predictors)]
        if fitting:
            return fitting
    return []


def singly(known: Sequence[Misreading | Misencoding]) -> Iterator[Mistakes]:
    return ((one,) for one in known)


def in_pairs(known: Sequence[Misreading | Misencoding]) -> Iterator[Mistakes]:
    """Two at once. Of the same step, one is made on what the other leaves, in either order."""
    for a, b in combinations(known, 2):
        if isinstance(a, Misencoding) and isinstance(b, Misencoding):
            if a.can_be_made_with(b):
                yield a, b
        elif isinstance(a, Misencoding) or isinstance(b, Misencoding) or a.step != b.step:
            yield a, b
        elif a.step != "blocks" and not (a.replaces and b.replaces):
            yield (a, b) if not b.replaces else (b, a)
            if not (a.replaces or b.replaces):
                yield b, a


class Predictor:
    """What a readout would have shown under mistakes in storing and reading."""

    def __init__(self, readout: Readout) -> None:
        self.readout, self.weight = readout, readout.weight
        n, self.k = self.weight.shape
        self.device = self.weight.device
        self.table = decode_table(self.weight.scheme.format, self.device)
        self.all_rows = torch.arange(n, device=self.device)
        # Many hypotheses share these.
        self._few_codes: dict[tuple[Misencoding, ...], list[Tensor]] = {}
        self._grids: dict[Mistakes, Tensor] = {}

    @cached_property
    def screens(self) -> tuple[Tensor, Tensor]:
        """A few rows, some of them wrong; and some more."""
        n = len(self.all_rows)
        spread = torch.linspace(0, n - 1, min(n, SOME_ROWS), device=self.device).round().long().unique()
        wrong = self.readout.wrong().any(dim=1).nonzero().reshape(-1)
        return torch.cat([wrong[:: max(1, len(wrong) // FEW_ROWS)][:FEW_ROWS], spread[:: max(1, len(spread) // 4)]]), spread

    def explains(self, mistakes: Mistakes) -> bool:
        chunk = max(1, _AT_ONCE // max(1, len(self.readout.columns)))
        return all(self.readout.fits(self._predictions(mistakes, rows), rows)
                   for rows in (*self.screens, *self.all_rows.split(chunk)))

    def predict(self, mistakes: Mistakes, rows: Tensor | None = None) -> Prediction:
        """The weight read on `rows` (all), every quotient rounded as the definition rounds it."""
        return self._predictions(mistakes, self.all_rows if rows is None else rows)[0]

    @cached_property
    def _stored_codes(self) -> Tensor:
        return pad(self.weight.codes(), (0, packing.padded_k(self.k) - self.k))

    def _predictions(self, mistakes: Mistakes, rows: Tensor) -> list[Prediction]:
        """More than one where the readout is of a weight that was encoded unseen: a quotient beside a midpoint may have been
        rounded to either side."""
        columns = self.readout.columns
        table = self.table
        for mistake in _of_step(mistakes, "table"):
            table = mistake.apply(table)
        of_scales = tuple(one for one in mistakes if (one.scales if isinstance(one, Misencoding) else one.step in ("scales", "places")))
        if of_scales not in self._grids:
            self._grids[of_scales] = grid_under(of_scales, self.weight)
        factors = factors_in(self._grids[of_scales], mistakes, self.weight.scheme.scaling, columns, rows)
        nonfinite = ~table.isfinite()
        predictions = []
        for codes in self._codes(mistakes, rows):
            for mistake in _of_step(mistakes, "codes"):
                codes = mistake.apply(codes, torch.arange(codes.shape[1], device=self.device))
            whole, codes = codes[:, :self.k], codes[:, columns]
            tainted = nonfinite[whole.int()].any(dim=1)     # 0 * NaN is NaN
            predictions.append(Prediction(table[codes.int()].double() * factors.double(), tainted))
        return predictions

    def _codes(self, mistakes: Mistakes, rows: Tensor) -> list[Tensor]:
        """uint8 [rows, K_pad] that lie in store."""
        if self.readout.original is None:
            return [self._stored_codes[rows]]
        storing = tuple(one for one in mistakes if isinstance(one, Misencoding))
        if rows is not self.screens[0]:
            return list(self._encoded(storing, rows))
        if storing not in self._few_codes:
            self._few_codes[storing] = list(self._encoded(storing, rows))
        return self._few_codes[storing]

    def _encoded(self, storing: tuple[Misencoding, ...], rows: Tensor) -> Iterator[Tensor]:
        weight, scaling = scaled_under(storing, self.weight), self.weight.scheme.scaling
        scales = Scales(weight.scales[rows] if weight.scales.shape[0] > 1 else weight.scales, weight.tensor_scale)
        for nudge in quotient_nudges(scales, scaling):
            codes = encoded(self.readout.original[rows], lambda w, nudge=nudge: scale_down(w, scales, scaling) * (1 + nudge),
                            weight.scheme.format, storing)
            yield pad(codes, (0, packing.padded_k(self.k) - self.k))


def grid_under(mistakes: Mistakes, weight: QuantizedWeight) -> Tensor:
    """The scale of each block as it is read, fp32 [N or 1, G]."""
    weight = scaled_under(mistakes, weight)
    block = decode(weight.scales, NV_SCALE_FORMAT) if weight.scheme.scaling.kind == "nv" else weight.scale_grid()
    tensor = weight.tensor_scale if weight.tensor_scale is not None else torch.ones(1, device=weight.device)
    for mistake in _of_step(mistakes, "scales"):
        block, tensor = mistake.apply(block, tensor)
    grid = block * tensor
    for mistake in _of_step(mistakes, "places"):
        grid = mistake.apply(grid)
    return grid


def factors_in(grid: Tensor, mistakes: Mistakes, scaling: Scaling, columns: Tensor, rows: Tensor | None = None) -> Tensor:
    """What the codes in `columns` of `rows` (all) are multiplied by, fp32 [rows or 1, C]."""
    rows = torch.arange(grid.shape[0], device=grid.device) if rows is None or grid.shape[0] == 1 else rows
    for mistake in _of_step(mistakes, "blocks"):
        return mistake.apply(grid, columns, rows)
    return grid[rows][:, block_of(columns, scaling)]


def scaled_under(mistakes: Mistakes, weight: QuantizedWeight) -> QuantizedWeight:
    """`weight` with the scales that an encoder would have chosen that makes these mistakes."""
    for mistake in mistakes:
        if isinstance(mistake, Misencoding) and mistake.scales is not None:
            chosen = mistake.scales(Scales(weight.scales, weight.tensor_scale))
            weight = replace(weight, scales=chosen.stored)
    return weight


def quotient_nudges(scales: Scales, scaling: Scaling) -> tuple[float, ...]:
    """How far, relatively, a right quotient may lie from w / s. Not at all where every scale is a power of two: there, division
    is exact, and a tie is a tie."""
    exact = bool((torch.frexp(scale_values(scales, scaling)).mantissa == 0.5).all())
    return (0.0,) if exact else (0.0, -QUOTIENT_SLACK, QUOTIENT_SLACK)


def _of_step(mistakes: Mistakes, step: str) -> list[Misreading]:
    assert step in STEPS
    return [one for one in mistakes if isinstance(one, Misreading) and one.step == step]


def kinds_of(fitting: list[Mistakes]) -> set[frozenset[Kind]]:
    return {frozenset(mistake.kind for mistake in mistakes) for mistakes in fitting}


def names_of(fitting: list[Mistakes]) -> list[str]:
    return sorted({" with ".join(sorted(kinds)) for kinds in kinds_of(fitting)})

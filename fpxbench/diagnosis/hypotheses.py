"""Predict the effective weight under known faults, and find those that explain a readout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from fpxbench.diagnosis.decode_fault import STEPS, DecodeFault, table_claims_hold
from fpxbench.diagnosis.decode_faults import block_of, block_row_of, scale_faults
from fpxbench.diagnosis.effective_weight import Prediction, Readout, WeightsRead
from fpxbench.diagnosis.encode_faults import TIE_NUDGE, EncodeFault, encoded, largest_slack, nudges, quotient_slack
from fpxbench.numbers import packing
from fpxbench.numbers.scaling import Scales, Scaling
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind

Faults = tuple[DecodeFault | EncodeFault, ...]
T = TypeVar("T")

FEW_ROWS, SOME_ROWS = 12, 128
"""A hypothesis is tried on this many rows first, and if it fits them on more, then on all."""
_AT_ONCE = 1 << 22
SHAPED_STEPS = frozenset({"places", "blocks"})
"""Steps whose faults depend on the shape of the weight."""


def explanations(
    readouts: Sequence[Readout], known: Sequence[DecodeFault | EncodeFault], most: int = 2
) -> list[Faults]:
    """Return the smallest sets of known faults that explain every readout; [] if none of up to `most` faults does."""
    predictors = [Predictor(readout) for readout in readouts]
    places = [None if each.weight.shape == readouts[0].weight.shape else _scale_faults_by_name(each.weight)
              for each in readouts]

    def explain(faults: Faults) -> bool:
        for predictor, by_name in zip(predictors, places, strict=True):
            there = faults if by_name is None else _on_another_shape(faults, by_name)
            if there is None or not predictor.explains(there):
                return False
        return True

    for tried in (singly(known), in_pairs(known))[:most]:
        fitting = [faults for faults in tried if explain(faults)]
        if fitting:
            return fitting
    return []


def _scale_faults_by_name(weight: QuantizedWeight) -> dict[tuple[str, str], DecodeFault]:
    """Return (step, message without shapes) -> fault, for the misplaced scales of `weight`."""
    return {_name(fault): fault
            for fault in scale_faults(weight.scheme.scaling, weight.scheme.format, *weight.shape)
            if fault.step in SHAPED_STEPS}


def _on_another_shape(faults: Faults, there: dict[tuple[str, str], DecodeFault]) -> Faults | None:
    """Return the faults for the shape of `there`; None if one of them is impossible there."""
    found = [there.get(_name(fault)) if isinstance(fault, DecodeFault) and fault.step in SHAPED_STEPS else fault
             for fault in faults]
    return None if None in found else tuple(fault for fault in found if fault is not None)


def _name(fault: DecodeFault) -> tuple[str, str]:
    return fault.step, re.sub(r"\[[^]]*\]", "", fault.message)


def singly(known: Sequence[DecodeFault | EncodeFault]) -> Iterator[Faults]:
    return ((one,) for one in known)


def in_pairs(known: Sequence[DecodeFault | EncodeFault]) -> Iterator[Faults]:
    """Yield pairs of faults. Two of the same step are applied one after the other, in either order."""
    for a, b in combinations(known, 2):
        if isinstance(a, EncodeFault) and isinstance(b, EncodeFault):
            if a.can_be_made_with(b):
                yield a, b
        elif isinstance(a, EncodeFault) or isinstance(b, EncodeFault) or a.step != b.step:
            yield a, b
        elif a.step != "blocks" and not (a.replaces and b.replaces):
            yield (a, b) if not b.replaces else (b, a)
            if not (a.replaces or b.replaces):
                yield b, a


class Predictor:
    """Predicts a readout under faults in storing and reading."""

    def __init__(self, readout: Readout) -> None:
        self.readout, self.weight = readout, readout.weight
        n, self.k = self.weight.shape
        self.device = self.weight.device
        self.table = decode_table(self.weight.scheme.format, self.device)
        self.all_rows = torch.arange(n, device=self.device)
        self._shared: dict[tuple[str, Faults], Any] = {}
        self._few: Tensor | None = None
        """The rows on which every hypothesis is tried first."""

    @cached_property
    def screens(self) -> tuple[Tensor, Tensor]:
        """A few rows, including wrong ones; and more rows, evenly spread."""
        n = len(self.all_rows)
        spread = torch.linspace(0, n - 1, min(n, SOME_ROWS), device=self.device).round().long().unique()
        wrong = self.readout.wrong().any(dim=1).nonzero().reshape(-1)
        return torch.cat(
            [wrong[:: max(1, len(wrong) // FEW_ROWS)][:FEW_ROWS], spread[:: max(1, len(spread) // 4)]]
        ), spread

    @cached_property
    def _few_read(self) -> WeightsRead:
        return self.readout.on(self.screens[0])

    def explains(self, faults: Faults) -> bool:
        """Return whether `faults` predict every weight read, and their messages hold for the resulting table."""
        few, spread = self.screens
        self._few = few
        if not self._table(faults)[-1] or not self._few_read.fit(self._predictions(faults, few)):
            return False
        chunk = max(1, _AT_ONCE // max(1, len(self.readout.columns)))
        return all(self.readout.fits(self._predictions(faults, rows), rows)
                   for rows in (spread, *self.all_rows.split(chunk)))

    def predict(self, faults: Faults, rows: Tensor | None = None) -> Prediction:
        """Return the predicted weight on `rows` (all), with every quotient rounded as defined."""
        return self._predictions(faults, self.all_rows if rows is None else rows)[0]

    @cached_property
    def _stored_codes(self) -> Tensor:
        return pad(self.weight.codes(), (0, packing.padded_k(self.k) - self.k))

    def _predictions(self, faults: Faults, rows: Tensor) -> list[Prediction]:
        """Return the predictions under `faults`; several for a weight with hidden codes, since a quotient beside a
        midpoint may have been rounded to either side."""
        table, nonfinite, _ = self._table(faults)
        factors = self._factors(faults, rows)
        return [Prediction(table[codes] * factors, nonfinite[whole].any(dim=1))      # 0 * NaN is NaN
                for whole, codes in self._codes(faults, rows)]

    def _share(self, what: str, faults: Faults, make: Callable[[], T], rows: Tensor | None = None) -> T:
        """Return ``make()``, cached by `faults` if many hypotheses share it: single faults, on the first rows."""
        if len(faults) > 1 or rows is not None and rows is not self._few:
            return make()
        if (what, faults) not in self._shared:
            self._shared[what, faults] = make()
        return self._shared[what, faults]

    def _table(self, faults: Faults) -> tuple[Tensor, Tensor, bool]:
        """Return the decode table, float64 [2**bits], which of its entries are not finite, and whether the messages of
        `faults` hold for it."""
        def make() -> tuple[Tensor, Tensor, bool]:
            table = table_under(of_table, self.table)
            return table.double(), ~table.isfinite(), table_claims_hold(of_table, table)

        of_table = of_step(faults, "table")
        return self._share("table", of_table, make)

    def _factors(self, faults: Faults, rows: Tensor) -> Tensor:
        """Return the factors of the codes, float64 [rows or 1, C]."""
        of_scales = tuple(
            one for one in faults if (one.scales if isinstance(one, EncodeFault) else one.step in ("scales", "places")))
        of_blocks = of_step(faults, "blocks")

        def make() -> Tensor:
            grid = self._share("grid", of_scales, lambda: grid_under(of_scales, self.weight))
            return factors_in(grid, of_blocks, self.weight.scheme.scaling, self.readout.columns, rows).double()

        return self._share("factors", of_scales + of_blocks, make, rows)

    def _codes(self, faults: Faults, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the codes read, int32: of whole rows [rows, K], and in the readout's columns [rows, C]."""
        storing = tuple(one for one in faults if isinstance(one, EncodeFault) and self.readout.original is not None)
        of_codes = of_step(faults, "codes")

        def read(codes: Tensor) -> tuple[Tensor, Tensor]:
            for fault in of_codes:
                codes = fault.apply(codes, torch.arange(codes.shape[1], device=self.device))
            whole = codes[:, :self.k].int()
            return whole, whole[:, self.readout.columns]

        def make() -> list[tuple[Tensor, Tensor]]:
            if self.readout.original is None:
                return [read(self._stored_codes[rows])]
            stored = self._share("storing", storing, lambda: list(self._encoded(storing, rows)), rows)
            return [read(codes) for codes in stored]

        return self._share("codes", storing + of_codes, make, rows)

    def _encoded(self, storing: tuple[EncodeFault, ...], rows: Tensor) -> Iterator[Tensor]:
        weight, scaling = scaled_under(storing, self.weight), self.weight.scheme.scaling
        chosen = scaling.factors(weight.stored_scales)
        for divisors in (one.divisors for one in storing if one.divisors is not None):
            exact = scaling.block_amax(self.readout.original) / weight.scheme.format.max
            chosen = divisors(chosen, exact).nan_to_num(0.0, 0.0, 0.0)
        factors = scaling.spread(chosen, *weight.shape)[rows]
        slack = quotient_slack(weight.stored_scales, weight.scheme, *weight.shape)[rows]
        if not self.readout.ties_decided:
            slack = torch.full_like(slack, largest_slack(scaling))
        if any(one.kind is Kind.TIES_NOT_EVEN for one in storing):      # the slack must exceed the fault's own nudge
            slack = torch.where(slack > 0, slack + TIE_NUDGE, 0.0)
        for nudge in nudges(slack):
            codes = encoded(self.readout.original[rows],
                            lambda w, nudge=nudge: torch.where(factors > 0, w / factors, 0.0) * (1 + nudge),
                            weight.scheme.format, storing)
            yield pad(codes, (0, packing.padded_k(self.k) - self.k))


def table_under(faults: Faults, table: Tensor) -> Tensor:
    """Return the decode table [2**bits] under `faults`."""
    for fault in of_step(faults, "table"):
        table = fault.apply(table)
    return table


def grid_under(faults: Faults, weight: QuantizedWeight) -> Tensor:
    """Return each block's scale as read under `faults`, fp32 [N or 1, G]."""
    weight = scaled_under(faults, weight)
    block, tensor = weight.scheme.scaling.levels(weight.stored_scales)
    for fault in of_step(faults, "scales"):
        block, tensor = fault.apply(block, tensor)
    grid = block * tensor
    for fault in of_step(faults, "places"):
        grid = fault.apply(grid)
    return grid


def factors_in(grid: Tensor, faults: Faults, scaling: Scaling, columns: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return the factors of the codes in `columns` of `rows` (all) under `faults`, fp32 [rows or 1, C]."""
    rows = torch.arange(grid.shape[0] * (scaling.block_rows or 1), device=grid.device) if rows is None else rows
    for fault in of_step(faults, "blocks"):
        return fault.apply(grid, columns, rows)
    return grid[block_row_of(rows, scaling)][:, block_of(columns, scaling)]


def scaled_under(faults: Faults, weight: QuantizedWeight) -> QuantizedWeight:
    """Return `weight` with the scales that an encoder with `faults` chooses."""
    for fault in faults:
        if isinstance(fault, EncodeFault) and fault.scales is not None:
            chosen = fault.scales(Scales(weight.scales, weight.tensor_scale))
            weight = replace(weight, scales=chosen.stored)
    return weight


def of_step(faults: Faults, step: str) -> tuple[DecodeFault, ...]:
    """Return the faults in one step of reading."""
    assert step in STEPS
    return tuple(one for one in faults if isinstance(one, DecodeFault) and one.step == step)


def kinds_of(fitting: list[Faults]) -> set[frozenset[Kind]]:
    return {frozenset(fault.kind for fault in faults) for faults in fitting}


def names_of(fitting: list[Faults]) -> list[str]:
    return sorted({" with ".join(sorted(kinds)) for kinds in kinds_of(fitting)})

"""The numbers of a float dtype in order, and the place of a value among them, found by search."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from fpxbench.casts.conversion import DType
from fpxbench.numbers.formats import BF16, FP16, Format

EXACT, BELOW, TIE, ABOVE = -2, -1, 0, 1
"""Where a value lies between two neighbours: on the lower one, or below, at or above their midpoint."""


@dataclass(frozen=True)
class NumberGrid:
    """The numbers of a format of at most 16 bits, by its definition."""

    format: Format

    @cached_property
    def values(self) -> np.ndarray:
        """What each code stands for, float64 ``[2**bits]``."""
        codes = np.arange(1 << self.format.bits, dtype=np.uint32)
        with np.errstate(invalid="ignore"):     # a signalling NaN becomes a quiet one
            if self.format == FP16:             # NumPy's own, since the definition takes seconds for 65,536 codes
                return codes.astype(np.uint16).view(np.float16).astype(np.float64)
            if self.format == BF16:
                return (codes << 16).view(np.float32).astype(np.float64)
        return np.array([self.format.value(code) for code in range(1 << self.format.bits)])

    @cached_property
    def positive(self) -> np.ndarray:
        """Finite magnitudes in order, followed by the number that would come next: float64 ``[max_code + 2]``."""
        finite = self.values[:self.format.max_code + 1]
        return np.append(finite, 2 * finite[-1] - finite[-2] if self.format.signed else 2 * finite[-1])

    def value(self, codes: np.ndarray) -> np.ndarray:
        """Return the numbers of `codes`, float64."""
        return self.values[codes]

    def place(self, magnitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the code of the number at or below each non-negative magnitude, and where the magnitude lies between
        that number and the next: `EXACT`, `BELOW`, `TIE` or `ABOVE`.

        Exact, as neighbours of at most 16 bits have a midpoint in float64. From the last number of `positive` on, the
        code remains the last.
        """
        positive, last = self.positive, self.format.max_code + 1
        lower = np.clip(np.searchsorted(positive, magnitude, side="right") - 1, 0, last)
        middle = (positive[lower] + positive[np.minimum(lower + 1, last)]) / 2
        where = np.where(magnitude < middle, BELOW, np.where(magnitude == middle, TIE, ABOVE)).astype(np.int8)
        # Below the smallest number of a format without zero the smallest is the nearest.
        where[magnitude < positive[0]] = BELOW
        where[magnitude == positive[lower]] = EXACT
        return lower, where


class ExactNumberGrid(NumberGrid):
    """fp32: only exact conversions to it are checked, from narrower formats, so that no table is needed."""

    def value(self, codes: np.ndarray) -> np.ndarray:
        """Return the numbers of `codes`, float64."""
        with np.errstate(invalid="ignore"):     # a signalling NaN becomes a quiet one
            return codes.astype(np.uint32).view(np.float32).astype(np.float64)

    def place(self, magnitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what `NumberGrid.place` does. Raise ValueError for a magnitude that fp32 does not hold."""
        narrow = magnitude.astype(np.float32)
        if not (narrow == magnitude).all():
            inexact = magnitude[narrow != magnitude][0]
            raise ValueError(f"{inexact!r} is not an fp32 number: only exact conversions to fp32 are checked")
        return narrow.view(np.uint32).astype(np.int64), np.full(magnitude.shape, EXACT, dtype=np.int8)


@lru_cache
def grid(dtype: DType) -> NumberGrid:
    """Return the grid of a float dtype. Raise ValueError for one that has none."""
    if dtype.format is None or dtype.bits not in (8, 16, 32):
        raise ValueError(f"no grid of {dtype.name}: floats of 8 and 16 bits, and fp32, have one")
    return ExactNumberGrid(dtype.format) if dtype.bits == 32 else NumberGrid(dtype.format)

"""The numbers of a dtype in order, and where a value lies among them: by search in a table, with no rounding of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from fpxbench.casts.conversion import DType

EXACT, BELOW, TIE, ABOVE = -2, -1, 0, 1
"""Where a value lies between two neighbours: on the lower, or below, at, above the midpoint."""


@dataclass(frozen=True)
class Grid:
    """A dtype of at most 16 bits.

    values : what each code stands for, float64 ``[2**bits]``
    max_code : of the largest finite number; codes below it are in the order of their magnitudes
    sign : the sign bit; 0 if there is none
    """

    values: np.ndarray
    max_code: int
    sign: int
    min_normal: float
    has_negative_zero: bool

    @cached_property
    def positive(self) -> np.ndarray:
        """Finite magnitudes in order, and one more: where the next would be, if the format went on."""
        finite = self.values[:self.max_code + 1]
        return np.append(finite, 2 * finite[-1] - finite[-2] if self.sign else 2 * finite[-1])

    @property
    def maximum(self) -> float:
        return float(self.values[self.max_code])

    @property
    def has_nan(self) -> bool:
        return bool(np.isnan(self.values).any())

    @property
    def has_infinity(self) -> bool:
        return bool(np.isinf(self.values).any())

    def value(self, codes: np.ndarray) -> np.ndarray:
        return self.values[codes]

    def place(self, magnitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Code of the number at or below each non-negative magnitude, and where between it and the next the magnitude lies.

        Exact: neighbours of at most 16 bits have a midpoint in float64. Beyond the virtual next number nothing changes.
        """
        positive = self.positive
        lower = np.clip(np.searchsorted(positive, magnitude, side="right") - 1, 0, self.max_code + 1)
        upper = np.minimum(lower + 1, self.max_code + 1)
        middle = (positive[lower] + positive[upper]) / 2
        where = np.where(magnitude < middle, BELOW, np.where(magnitude == middle, TIE, ABOVE)).astype(np.int8)
        # Below the smallest number of a format without zero the smallest is the nearest.
        where[magnitude < positive[0]] = BELOW
        where[magnitude == positive[lower]] = EXACT
        return lower, where


class Fp32Grid:
    """fp32, which is only converted to exactly, from FP8."""

    has_nan = has_infinity = has_negative_zero = True
    max_code, sign = 0x7F7FFFFF, 1 << 31
    maximum, min_normal = float(np.finfo(np.float32).max), 2.0**-126

    @staticmethod
    def value(codes: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):     # a signalling NaN becomes a quiet one
            return codes.astype(np.uint32).view(np.float32).astype(np.float64)

    @staticmethod
    def place(magnitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        narrow = magnitude.astype(np.float32)
        if not (narrow == magnitude).all():
            raise ValueError("conversions to fp32 are judged only where they are exact")
        return narrow.view(np.uint32).astype(np.int64), np.full(magnitude.shape, EXACT, dtype=np.int8)


@lru_cache
def grid(dtype: DType) -> Grid | Fp32Grid:
    """The grid of a float dtype."""
    if dtype.format is not None:
        fmt = dtype.format
        values = np.array([fmt.value(code) for code in range(1 << fmt.bits)])
        return Grid(values, fmt.max_code, 1 << (fmt.bits - 1) if fmt.signed else 0, fmt.min_normal,
                    has_negative_zero=fmt.signed and fmt.specials != "fnuz")
    if dtype.name == "fp32":
        return Fp32Grid()
    if dtype.bits != 16 or dtype.is_integer:
        raise ValueError(f"no grid of {dtype.name}: float dtypes of at most 16 bits, and fp32, have one")
    every = np.arange(1 << 16, dtype=np.uint32)
    with np.errstate(invalid="ignore"):
        values = (every << 16).view(np.float32) if dtype.name == "bf16" else every.astype(np.uint16).view(np.float16)
        values = values.astype(np.float64)
    max_code = (((1 << dtype.exponent_bits) - 1) << dtype.mantissa_bits) - 1
    return Grid(values, max_code, 1 << 15, 2.0 ** (2 - (1 << (dtype.exponent_bits - 1))), has_negative_zero=True)

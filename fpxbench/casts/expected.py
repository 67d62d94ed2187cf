"""The codes that a conversion should give, and those that well-known faults would give instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from fpxbench.casts.conversion import DTYPES, DType
from fpxbench.casts.number_grid import ABOVE, EXACT, TIE, ExactNumberGrid, NumberGrid, grid
from fpxbench.numbers import tensor_codec
from fpxbench.numbers.rounding import Rounding

FLUSHED = ", subnormals flushed"
MISREAD = "nearest_even as "
Codes = np.ndarray
Predict = Callable[[np.ndarray, np.ndarray], Codes]
"""Codes of magnitudes, from the magnitudes (float64) and whether each number is negative."""


def expected_codes(x: np.ndarray, target: DType, rounding: Rounding = Rounding.NEAREST_EVEN) -> Codes:
    """Return the fixed reference: codes of float64 `x` in `target`, rounded once, NaN to NaN.

    FP8 saturates, as a weight should; fp16, bf16 and fp32 overflow as in IEEE 754-2019 §7.4. Where the target has no
    NaN, NaN counts as zero.
    """
    fmt = target.format
    if not fmt.has_nan:
        x = np.where(np.isnan(x), 0.0, x)
    if target.is_float8:
        return tensor_codec.encode(torch.from_numpy(np.ascontiguousarray(x)), fmt, rounding).numpy()
    magnitude = np.abs(x)
    nan = np.isnan(magnitude)
    codes = round_magnitudes(np.where(nan, 0.0, magnitude), grid(target), rounding.value)
    most = fmt.max_code if rounding is Rounding.TOWARD_ZERO else fmt.infinity_code
    codes = np.where(np.isinf(magnitude), fmt.infinity_code, np.minimum(codes, most))
    codes = np.where(nan, fmt.infinity_code | (1 << (fmt.mantissa_bits - 1)), codes)
    return codes | np.where(np.signbit(x) & ~nan, fmt.sign_bit, 0)


def overflow_begins(numbers: NumberGrid, rounding: Rounding) -> tuple[float, bool]:
    """Return the magnitude beyond which a finite value rounds past the maximum, and whether the magnitude itself does.
    """
    fmt = numbers.format
    if isinstance(numbers, ExactNumberGrid):
        return fmt.max, False
    following = float(numbers.positive[-1])
    if rounding is Rounding.TOWARD_ZERO:
        return following, True
    return (fmt.max + following) / 2, rounding is Rounding.NEAREST_AWAY or fmt.max_code % 2 == 1


def round_magnitudes(magnitude: np.ndarray, numbers: NumberGrid, rounding: str) -> Codes:
    """Return codes of non-negative magnitudes; past the maximum, one more than its code. Raise ValueError for an
    unknown rounding."""
    lower, where = numbers.place(magnitude)
    match rounding:
        case "nearest_even":
            return lower + ((where == ABOVE) | ((where == TIE) & (lower % 2 == 1)))
        case "nearest_away":
            return lower + (where >= TIE)
        case "toward_zero":
            return lower
        case "away_from_zero":
            return lower + (where != EXACT)
    raise ValueError(f"no rounding {rounding!r}")


def hypotheses(source: DType, target: DType) -> Iterator[tuple[str, Predict]]:
    """Yield the ways to round that occur in practice, by name, the simplest first."""
    numbers = grid(target)

    def plain(rounding: str) -> Predict:
        return lambda magnitude, negative: round_magnitudes(magnitude, numbers, rounding)

    def directed(up: bool) -> Predict:
        away, toward = plain("away_from_zero"), plain("toward_zero")
        return lambda magnitude, negative: np.where(
            negative != up, away(magnitude, negative), toward(magnitude, negative)
        )

    def via(between: DType, first: str, then: str) -> Predict:
        return lambda magnitude, negative: round_magnitudes(_through(magnitude, between, first), numbers, then)

    def flushed(rounding: str) -> Predict:
        min_normal = target.format.min_normal
        return lambda magnitude, negative: np.where(
            magnitude < min_normal, 0, round_magnitudes(magnitude, numbers, rounding)
        )

    def as_sibling(sibling: DType) -> Predict:
        return lambda magnitude, negative: np.minimum(
            round_magnitudes(magnitude, grid(sibling), "nearest_even"), sibling.format.max_code)

    names = ("nearest_even", "nearest_away", "toward_zero")
    for name in (*names, "away_from_zero"):
        yield name, plain(name)
    yield "up", directed(up=True)
    yield "down", directed(up=False)
    for name in ("fp32", "fp16", "bf16"):
        between = DTYPES[name]
        if between is target or between.format.mantissa_bits >= source.format.mantissa_bits:
            continue
        yield f"nearest_even via {name}", via(between, "nearest_even", "nearest_even")
        yield f"nearest_even via {name} toward_zero", via(between, "toward_zero", "nearest_even")
        yield f"toward_zero via {name} nearest_even", via(between, "nearest_even", "toward_zero")
        yield f"nearest_away via {name}", via(between, "nearest_even", "nearest_away")
    for name in names:
        yield name + FLUSHED, flushed(name)
    if (other := sibling_of(target)) is not None:
        yield MISREAD + other.name, as_sibling(other)


def sibling_of(dtype: DType) -> DType | None:
    """Return the dtype that this one is mistaken for: FN for FNUZ, or the other way round. None if there is none."""
    other = dtype.format.sibling
    return DTYPES.get(other.name) if other else None


def _through(magnitude: np.ndarray, between: DType, rounding: str) -> np.ndarray:
    """Return magnitudes rounded to `between` first."""
    if between.name != "fp32":
        numbers = grid(between)
        return numbers.positive[np.minimum(round_magnitudes(magnitude, numbers, rounding), numbers.format.max_code + 1)]
    with np.errstate(over="ignore"):
        narrow = magnitude.astype(np.float32)
    wide = narrow.astype(np.float64)
    if rounding == "toward_zero":
        wide = np.where(wide > magnitude, np.nextafter(narrow, np.float32(0)).astype(np.float64), wide)
    return wide

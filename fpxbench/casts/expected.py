"""What a conversion should give, and what well-known mistakes would give instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from fpxbench.casts.conversion import DTYPES, DType
from fpxbench.casts.grid import ABOVE, EXACT, TIE, Fp32Grid, Grid, grid
from fpxbench.numbers import codec
from fpxbench.numbers.rounding import Rounding

FLUSHED = ", subnormals flushed"
MISREAD = "nearest_even as "
_SIBLINGS = {"e4m3fn": "e4m3fnuz", "e4m3fnuz": "e4m3fn", "e5m2": "e5m2fnuz", "e5m2fnuz": "e5m2"}
Codes = np.ndarray


def expected_codes(x: np.ndarray, target: DType, rounding: Rounding = Rounding.NEAREST_EVEN) -> Codes:
    """The fixed reference: codes of float64 `x` in `target`, rounded once, NaN to NaN.

    FP8 saturates, which is what a weight wants; IEEE's fp16, bf16 and fp32 overflow as IEEE 754-2019 §7.4 has it. Where the target has
    no NaN, NaN is taken for zero.
    """
    numbers = grid(target)
    if not numbers.has_nan:
        x = np.where(np.isnan(x), 0.0, x)
    if target.is_float8:
        return codec.encode(torch.from_numpy(np.ascontiguousarray(x)), target.format, rounding).numpy()
    magnitude = np.abs(x)
    nan = np.isnan(magnitude)
    codes = round_magnitudes(np.where(nan, 0.0, magnitude), numbers, rounding.value)
    infinity = numbers.max_code + 1
    codes = np.where(np.isinf(magnitude), infinity, np.minimum(codes, numbers.max_code if rounding is Rounding.TOWARD_ZERO else infinity))
    codes = np.where(nan, infinity | (1 << (target.mantissa_bits - 1)), codes)
    return codes | np.where(np.signbit(x) & ~nan, numbers.sign, 0)


def overflow_begins(numbers: Grid | Fp32Grid, rounding: Rounding) -> tuple[float, bool]:
    """The magnitude beyond which a finite value rounds past the maximum, and whether it does so itself."""
    if isinstance(numbers, Fp32Grid):
        return numbers.maximum, False
    following = float(numbers.positive[-1])
    if rounding is Rounding.TOWARD_ZERO:
        return following, True
    middle = (numbers.maximum + following) / 2
    return middle, rounding is Rounding.NEAREST_AWAY or numbers.max_code % 2 == 1


def round_magnitudes(magnitude: np.ndarray, numbers: Grid | Fp32Grid, rounding: str) -> Codes:
    """Codes of non-negative magnitudes, past the maximum one more than its code."""
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


def hypotheses(source: DType, target: DType) -> Iterator[tuple[str, Callable[[np.ndarray, np.ndarray], Codes]]]:
    """Ways to round that occur, by name, the simplest first: each takes magnitudes and signs and gives codes of magnitudes."""
    numbers = grid(target)

    def plain(rounding: str) -> Callable[[np.ndarray, np.ndarray], Codes]:
        return lambda magnitude, negative: round_magnitudes(magnitude, numbers, rounding)

    def directed(up: bool) -> Callable[[np.ndarray, np.ndarray], Codes]:
        return lambda magnitude, negative: np.where(
            negative != up, round_magnitudes(magnitude, numbers, "away_from_zero"), round_magnitudes(magnitude, numbers, "toward_zero"))

    def via(between: DType, first: str, then: str) -> Callable[[np.ndarray, np.ndarray], Codes]:
        return lambda magnitude, negative: round_magnitudes(_through(magnitude, between, first), numbers, then)

    def flushed(rounding: str) -> Callable[[np.ndarray, np.ndarray], Codes]:
        return lambda magnitude, negative: np.where(magnitude < numbers.min_normal, 0, round_magnitudes(magnitude, numbers, rounding))

    def as_sibling(taken_for: Grid) -> Callable[[np.ndarray, np.ndarray], Codes]:
        return lambda magnitude, negative: np.minimum(round_magnitudes(magnitude, taken_for, "nearest_even"), taken_for.max_code)

    names = ("nearest_even", "nearest_away", "toward_zero")
    for name in (*names, "away_from_zero"):
        yield name, plain(name)
    yield "up", directed(up=True)
    yield "down", directed(up=False)
    for name in ("fp32", "fp16", "bf16"):
        between = DTYPES[name]
        if between is target or between.mantissa_bits >= source.mantissa_bits:
            continue
        yield f"nearest_even via {name}", via(between, "nearest_even", "nearest_even")
        yield f"nearest_even via {name} toward_zero", via(between, "toward_zero", "nearest_even")
        yield f"toward_zero via {name} nearest_even", via(between, "nearest_even", "toward_zero")
        yield f"nearest_away via {name}", via(between, "nearest_even", "nearest_away")
    for name in names:
        yield name + FLUSHED, flushed(name)
    for name in sibling_of(target):
        yield MISREAD + name, as_sibling(grid(DTYPES[name]))


def sibling_of(dtype: DType) -> list[str]:
    """The format that this one is taken for by mistake: FNUZ without its bias, or the other way round."""
    return [_SIBLINGS[dtype.name]] if dtype.name in _SIBLINGS else []


def _through(magnitude: np.ndarray, between: DType, rounding: str) -> np.ndarray:
    if between.name != "fp32":
        numbers = grid(between)
        return numbers.positive[np.minimum(round_magnitudes(magnitude, numbers, rounding), numbers.max_code + 1)]
    with np.errstate(over="ignore"):
        narrow = magnitude.astype(np.float32)
    wide = narrow.astype(np.float64)
    if rounding == "toward_zero":
        wide = np.where(wide > magnitude, np.nextafter(narrow, np.float32(0)).astype(np.float64), wide)
    return wide


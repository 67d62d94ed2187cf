"""Compute what a right answer is: the exact product and a tolerance that is derived, not picked.

The reference is the exact product with the weight *as decoded from the very codes and scales that the implementation
stores*, in float64. What an implementation may add to it (docs/tolerance.md derives each term):

- it may round the output to its dtype twice (the product, and the product times a scale);
- it may round each scaled weight to the activation's dtype once;
- it may accumulate K products in fp32, in any order, on units that truncate;
- where it declares `activation_format`, it rounds the activation to that format.

Anything beyond that is a mistake, or an inaccuracy worth a name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.formats import format_named

OUTPUT_ROUNDINGS = 2
FP32_ACCUMULATION_UNIT = 2.0**-23
"""Truncation to fp32: tensor cores do not round their sums to nearest."""
HOEFFDING = 8.0
"""Rounding errors of weights meet activations of random sign, so their sum stays below 8·u·sqrt(Σ(a·w)²) but for one
element in 2/exp(-8²/2) = 4e13 (Hoeffding's inequality); the worst case, u·Σ|a·w|, would be blind by a factor sqrt(K)."""

# Rows of a float64 reference worked on at a time: bounds memory at about 64 MB an operand.
_REFERENCE_ELEMENTS = 1 << 23


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of rounding to `dtype`: 2**-8 for bf16, 2**-11 for fp16."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Reference:
    """The exact product and how far a right output may lie from it; float64 [M, N] each."""

    product: Tensor
    tolerance: Tensor

    @property
    def bound(self) -> float:
        """The tolerance as one relative figure, Frobenius norms."""
        return _ratio(self.tolerance.norm(), self.product.norm())


def matmul_reference(x: Tensor, decoded: Tensor, *, quantized: bool, activation_format: str | None = None) -> Reference:
    """Exact x @ decoded.T for x [M, K] and fp32 decoded [N, K], with the tolerance of the output in x's dtype."""
    a = x.double()
    k = x.shape[1]
    chunk = max(1, _REFERENCE_ELEMENTS // k)
    product, squares, magnitudes = [], [], []
    for rows in decoded.split(chunk):
        w = rows.double().T
        product.append(a @ w)
        squares.append(a.square() @ w.square())
        magnitudes.append(a.abs() @ w.abs())
    product, squares, magnitudes = (torch.cat(parts, dim=1) for parts in (product, squares, magnitudes))
    unit = unit_roundoff(x.dtype)
    tolerance = ((1 + unit) ** OUTPUT_ROUNDINGS - 1) * product.abs() + k * FP32_ACCUMULATION_UNIT * magnitudes
    random_units = unit if quantized else 0.0
    if activation_format is not None:
        random_units += 2.0 ** -(format_named(activation_format).mantissa_bits + 1)
    tolerance += HOEFFDING * random_units * squares.sqrt()
    return Reference(product, tolerance + torch.finfo(x.dtype).smallest_normal)


def one_hot_reference(x: Tensor, decoded: Tensor, activation_format: str | None = None) -> Reference:
    """The same for one-hot x (one 1.0 a row)."""
    columns = x.float().argmax(dim=1)
    product = decoded[:, columns].T.double()
    return Reference(product, one_hot_tolerance(product, x.dtype, activation_format))


def one_hot_tolerance(product: Tensor, dtype: torch.dtype, activation_format: str | None = None) -> Tensor:
    """How far the product [...] of a one-hot activation may lie from the float64 one: nothing accumulates, so each output
    is one weight, rounded at most thrice."""
    relative = (1 + unit_roundoff(dtype)) ** (OUTPUT_ROUNDINGS + 1) - 1
    if activation_format is not None:
        relative += 2.0 ** -(format_named(activation_format).mantissa_bits + 1)
    return relative * product.abs() + torch.finfo(dtype).smallest_normal


@dataclass(frozen=True)
class Comparison:
    """One output against its reference."""

    within: bool
    finite: bool
    relative_error: float
    bound: float
    worst_ulp: float
    outside: int
    worst_at: tuple[int, int]
    worst_value: float
    worst_expected: float

    def message(self) -> str:
        row, column = self.worst_at
        return (
            f"relative error {self.relative_error:.3g} where at most {self.bound:.3g} is right;"
            f" {self.outside} elements outside, the worst at [{row}, {column}]:"
            f" {self.worst_value:.6g} instead of {self.worst_expected:.6g}"
        )


def compare(y: Tensor, expected: Reference) -> Comparison:
    """How output y [M, N] stands to its reference. An empty output is right, and so is infinity where y's dtype ends."""
    if y.numel() == 0:
        return Comparison(True, True, 0.0, 0.0, 0.0, 0, (0, 0), 0.0, 0.0)
    out = y.double()
    limit = torch.finfo(y.dtype).max
    past = (expected.product.abs() + expected.tolerance > limit) & (out == expected.product.sign() * math.inf)
    out = torch.where(past, expected.product, out)
    finite = bool(torch.isfinite(out).all())
    error = (out - expected.product).abs()
    error = torch.where(torch.isfinite(error), error, math.inf)
    excess = error / expected.tolerance
    worst = int(excess.argmax())
    row, column = divmod(worst, y.shape[1])
    exponent = torch.frexp(expected.product.abs().clamp(min=torch.finfo(y.dtype).smallest_normal)).exponent - 1
    ulp = torch.ldexp(torch.full_like(error, torch.finfo(y.dtype).eps), exponent)
    return Comparison(
        within=bool((excess <= 1).all()),
        finite=finite,
        relative_error=_ratio(error.norm(), expected.product.norm()),
        bound=expected.bound,
        worst_ulp=float((error / ulp).max()),
        outside=int((excess > 1).sum()),
        worst_at=(row, column),
        worst_value=float(out.reshape(-1)[worst]),
        worst_expected=float(expected.product.reshape(-1)[worst]),
    )


def sqnr_db(original: Tensor, decoded: Tensor) -> float | None:
    """Signal to quantization noise of a stored weight, in dB; None where it is exact."""
    original = original.double()
    noise = (original - decoded.double()).square().sum()
    if float(noise) == 0:
        return None
    return float(10 * torch.log10(original.square().sum() / noise))


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    n, d = float(numerator), float(denominator)
    return n / d if d else (0.0 if n == 0 else math.inf)

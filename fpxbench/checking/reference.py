"""Compute the reference: the exact product, and a tolerance that is derived, not picked.

The reference is the exact product with the weight *as decoded from the codes and scales that the implementation
stores*, in float64. An implementation may make these errors (docs/tolerance.md derives each term):

- round the output to its dtype twice (the product, and the product times a scale);
- round each scaled weight to the activation's dtype once;
- accumulate K products in fp32, or in the accumulator that it declares, in any order, on units that truncate;
- if it declares that it quantizes the activation, choose either code within fp32's rounding of a boundary.

Larger errors are faults.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.implementation import FP32, Accumulator
from fpxbench.numbers.activation_rule import ActivationRule

OUTPUT_ROUNDINGS = 2
HOEFFDING = 8.0
"""Rounding errors of weights are multiplied by activations of random sign, so their sum exceeds 8·u·sqrt(Σ(a·w)²) in
fewer than one element in 4e13 (Hoeffding's inequality); the worst case, u·Σ|a·w|, is larger by a factor of sqrt(K)."""

# Weights of a float64 reference processed at a time: limits memory to about 64 MB per operand.
_REFERENCE_ELEMENTS = 1 << 23


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding to `dtype`: 2**-8 for bf16, 2**-11 for fp16."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Reference:
    """The exact product, and the largest and the mean square error of a right output; float64 [M, N] each.

    variance : the largest mean square error of a right output; None if the activation's signs are not random
    """

    product: Tensor
    tolerance: Tensor
    variance: Tensor | None = None

    @property
    def bound(self) -> float:
        """The tolerance as one relative number, in Frobenius norms."""
        return _ratio(self.tolerance.norm(), self.product.norm())

    def rows(self, count: int) -> Reference:
        """Return the reference of the first `count` rows."""
        return Reference(self.product[:count], self.tolerance[:count],
                         None if self.variance is None else self.variance[:count])


def matmul_reference(x: Tensor, decoded: Tensor, *, quantized: bool, rule: ActivationRule | None = None,
                     accumulator: Accumulator = FP32, bias: Tensor | None = None) -> Reference:
    """Return the exact x @ decoded.T + bias for x [M, K] and fp32 decoded [N, K], with the tolerance in x's dtype.

    quantized : whether the implementation may round the scaled weight to x's dtype
    rule : the rule by which it quantizes x first
    """
    values, slack = (x.double(), None) if rule is None else rule.quantized(x)
    if slack is not None and not bool(slack.any()):
        slack = None
    chunk = max(1, _REFERENCE_ELEMENTS // max(1, x.shape[1]))
    smallest, lost = torch.finfo(x.dtype).smallest_normal, _lost_of_a_subnormal(x.dtype)
    columns: list[tuple[Tensor, ...]] = []
    for rows in decoded.split(chunk):
        w = rows.double().T
        flushed = lost * (values.abs() @ ((w.abs() < smallest) & (w != 0)).double())
        columns.append((values @ w, values.square() @ w.square(), values.abs() @ w.abs(),
                        flushed if slack is None else flushed + slack @ w.abs()))
    product, squares, magnitudes, beside = (torch.cat(parts, dim=1) for parts in zip(*columns, strict=True))
    if bias is not None:
        product = product + bias.double()
    beside += 2 * x.shape[1] * torch.finfo(torch.float32).smallest_normal   # products and partial sums may be flushed
    unit, length = unit_roundoff(x.dtype), accumulator.length(x.shape[1])
    tolerance = ((1 + unit) ** OUTPUT_ROUNDINGS - 1) * product.abs() + length * accumulator.unit * magnitudes + beside
    if quantized:
        tolerance += HOEFFDING * unit * squares.sqrt()
    variance = (
        ulp(product, x.dtype).square() / 12 + (unit * product).square() / 3     # the output, rounded twice
        + (length * accumulator.unit) ** 2 / 2 * squares                        # partial sums, truncated
        + (unit**2 * squares if quantized else 0.0) + beside.square()           # the weight; codes beside a boundary
    )
    return Reference(product, tolerance + torch.finfo(x.dtype).smallest_normal, variance)


def _lost_of_a_subnormal(dtype: torch.dtype) -> float:
    """Return the largest error of rounding a weight below the smallest normal number to `dtype`.

    In bf16 this is the whole number, since matrix units flush fp32's subnormals; in fp16 half a subnormal step.
    """
    info = torch.finfo(dtype)
    return info.smallest_normal if dtype == torch.bfloat16 else info.smallest_normal * info.eps / 2


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one unit in the last place of `dtype` at float64 `values`."""
    info = torch.finfo(dtype)
    finite = values.abs().nan_to_num(0.0, posinf=info.max).clamp(min=info.smallest_normal, max=info.max)
    return torch.ldexp(torch.full_like(finite, info.eps), torch.frexp(finite).exponent - 1)


def one_hot_tolerance(product: Tensor, dtype: torch.dtype, activation_format: str | None = None) -> Tensor:
    """Return the tolerance of a one-hot activation's product [...], given the exact one.

    Nothing is accumulated: each output is one weight, rounded at most three times. A quantized activation represents
    1.0 exactly, except for the rounding of its scale.
    """
    roundings = OUTPUT_ROUNDINGS + 1 + (activation_format is not None)
    return ((1 + unit_roundoff(dtype)) ** roundings - 1) * product.abs() + torch.finfo(dtype).smallest_normal


def summed_weight_slack(decoded: Tensor) -> Tensor:
    """Return the tolerance, [N, 1], of a weight that is an fp32 sum of K numbers of its row in `decoded` [N, K]."""
    k = decoded.shape[1]
    return k * torch.finfo(torch.float32).eps / 2 * decoded.double().abs().nan_to_num(0, 0, 0).amax(dim=1, keepdim=True)


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
        return (f"relative error {self.relative_error:.3g} where at most {self.bound:.3g} is right;"
                f" {self.outside} elements outside, the worst at [{row}, {column}]:"
                f" {self.worst_value:.6g} instead of {self.worst_expected:.6g}")


def compare(y: Tensor, expected: Reference) -> Comparison:
    """Compare output y [M, N] with its reference.

    An empty output is right, and so are infinity past the range of y's dtype, and NaN and infinity that the reference
    has too.
    """
    if y.numel() == 0:
        return Comparison(True, True, 0.0, 0.0, 0.0, 0, (0, 0), 0.0, 0.0)
    out, product = y.double(), expected.product
    past = (product.abs() + expected.tolerance > torch.finfo(y.dtype).max) & (out == product.sign() * math.inf)
    same = (out == product) | (out.isnan() & product.isnan())
    settled = past | (same & ~product.isfinite())
    error = torch.where(settled, 0.0, (out - product).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    excess = torch.where(settled, 0.0, error / expected.tolerance).nan_to_num(nan=math.inf, posinf=math.inf)
    worst = int(excess.argmax())
    row, column = divmod(worst, y.shape[1])
    return Comparison(within=bool((excess <= 1).all()), finite=bool((out.isfinite() | settled).all()),
                      relative_error=_ratio(error.norm(), product.nan_to_num(0.0, 0.0, 0.0).norm()),
                      bound=expected.bound if bool(product.isfinite().all()) else math.inf,
                      worst_ulp=float((error / ulp(product, y.dtype)).max()), outside=int((excess > 1).sum()),
                      worst_at=(row, column), worst_value=float(out.reshape(-1)[worst]),
                      worst_expected=float(product.reshape(-1)[worst]))


def sqnr_db(original: Tensor, decoded: Tensor) -> float | None:
    """Return the signal-to-quantization-noise ratio of a stored weight in dB; None if it is exact."""
    original = original.double()
    noise = (original - decoded.double()).square().sum()
    if float(noise) == 0:
        return None
    return float(10 * torch.log10(original.square().sum() / noise))


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    n, d = float(numerator), float(denominator)
    return n / d if d else (0.0 if n == 0 else math.inf)

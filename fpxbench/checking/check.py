"""What a right answer is: operands, references, and a tolerance that is derived, not picked.

The reference is the exact product with the weight *as decoded from the very codes and scales that the implementation
stores*, in float64. What an implementation may add to it (docs/tolerance.md derives each term):

- it may round the output to its dtype twice (the product, and the product times a scale);
- it may round each scaled weight to the activation's dtype once;
- it may accumulate K products in fp32, in any order, on units that truncate;
- where it declares `activation_format`, it rounds the activation to that format.

Anything beyond that is a mistake, or an inaccuracy worth a name.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.numbers.codec import decode_table
from fpxbench.numbers.formats import Format, format_named
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case

ACTIVATION_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

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


def generator(seed: int, *what: object, device: str = "cpu") -> torch.Generator:
    """A generator for one purpose of one case: the same seed and words give the same numbers."""
    digest = hashlib.sha256(repr((seed, *what)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))


def make_weight(case: Case, seed: int, device: str = "cpu") -> Tensor:
    """The weight of a case, fp32 [N, K]: N(0, 1), the same for every implementation and scheme.

    `canary.codes` instead holds the values on which encoders and decoders differ, under scales that are 1: every finite
    number of its format, every midpoint between two of them, what lies just beside the midpoints, and under MX, whose
    rule lets it happen, numbers past the maximum.
    """
    rng = generator(seed, "weight", case.n, case.k, device=device)
    scheme = scheme_named(case.scheme)
    if case.workload != "canary.codes" or not scheme.quantized:
        return torch.randn(case.n, case.k, generator=rng, device=device)
    fmt, block = scheme.format, scheme.scaling.block or case.k
    numbers, beside = _telling_values(fmt, device, overflows=scheme.scaling.kind == "mx")
    values = torch.cat([numbers, beside])
    order = torch.randperm(case.n * case.k, generator=rng, device=device) % len(values)
    weight = values[order].reshape(case.n, case.k)
    # Every number once in as few columns as hold them, far apart: so few one-hot activations read every code.
    columns = -(-len(numbers) // case.n)
    spread = torch.arange(columns, device=device) * case.k // columns
    spread = (spread + (spread % block == 0)).clamp(max=case.k - 1)     # a block's first column holds its largest
    order = torch.randperm(len(numbers), generator=rng, device=device)
    cycled = order[torch.arange(columns * case.n, device=device) % len(numbers)]
    weight[:, spread] = numbers[cycled].reshape(columns, case.n).T
    weight[:, ::block] = fmt.max    # the largest once in each block: its scale is 1
    return weight.contiguous()


def _telling_values(fmt: Format, device: str, *, overflows: bool) -> tuple[Tensor, Tensor]:
    """Every finite number of a format; and each midpoint of two, with its neighbours that bf16 and fp16 round onto it."""
    numbers = decode_table(fmt, device)
    numbers = numbers[numbers.isfinite() & (numbers >= -fmt.max)]      # int8's -128 lies past the scale rule's range
    ascending = numbers.unique()
    middle = (ascending[1:] + ascending[:-1]) / 2
    step = 2.0**-12
    beside = [middle, middle * (1 + step), middle * (1 - step)]
    if overflows:
        past = 2.0 ** (fmt.emax + 1) * (1 - step)    # the most that a block whose scale is 1 may hold
        beside.append(torch.tensor([past, -past], device=device))
    return numbers, torch.cat(beside)


def make_activation(case: Case, seed: int, call: int, device: str = "cpu") -> Tensor:
    """Fresh activation [M, K] for call number `call`: N(0, 1) in the case's dtype."""
    rng = generator(seed, "activation", call, case.m, case.k, device=device)
    x = torch.randn(case.m, case.k, generator=rng, device=device)
    return x.to(ACTIVATION_DTYPES[case.activation])


@dataclass(frozen=True)
class Reference:
    """The exact product and how far a right output may lie from it; float64 [M, N] each."""

    product: Tensor
    tolerance: Tensor

    @property
    def bound(self) -> float:
        """The tolerance as one relative figure, Frobenius norms."""
        return _ratio(self.tolerance.norm(), self.product.norm())


def reference(x: Tensor, decoded: Tensor, *, quantized: bool, activation_format: str | None = None) -> Reference:
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


def one_hot(columns: list[int], m: int, k: int, dtype: torch.dtype, device: str) -> Tensor:
    """Activation [m, k] whose row i is 1 at ``columns[i % len(columns)]`` and 0 elsewhere."""
    x = torch.zeros(m, k, dtype=dtype, device=device)
    rows = torch.arange(m, device=device)
    picked = torch.tensor(columns, device=device)[rows % len(columns)]
    x[rows, picked] = 1.0
    return x


def columns_covering_codes(weight: QuantizedWeight, most: int) -> list[int]:
    """At most `most` columns that between them hold as many different codes as can be had: greedy set cover.

    One-hot activations on these show how each code is read, the rare ones (subnormals, the maximum) included.
    Rows beyond the 4,096th are left out of the choice.
    """
    codes = weight.codes()[:4096]
    k, codes_count = codes.shape[1], 1 << weight.scheme.format.bits
    index = torch.arange(k, device=codes.device) * codes_count + codes.long()
    present = (torch.bincount(index.reshape(-1), minlength=k * codes_count) > 0).reshape(k, codes_count)
    uncovered = present.any(dim=0)
    chosen: list[int] = []
    while len(chosen) < most and bool(uncovered.any()):
        gain = (present & uncovered).sum(dim=1)
        column = int(gain.argmax())
        chosen.append(column)
        uncovered &= ~present[column]
    return chosen


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

    def sentence(self) -> str:
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

"""Read an implementation's quantized activation, element by element, through a weight of single ones.

Row n of the weight is 1 in column n and 0 elsewhere, so output n of a token is that token's quantized element n,
rounded once to the output's dtype. Known rules and faults each predict it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fpxbench.checking import contract, inputs, reference
from fpxbench.checking.operands import Operands
from fpxbench.implementation import Implementation
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.formats import Format
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.records.kinds import Kind
from fpxbench.workloads import WeightContents

TOKENS, SHAPE = 10, (448, 416)
"""More rows than columns, so that each column is read."""
MANY_TOKENS, WIDE_SHAPE = 128, (576, 512)
"""Used if a few tokens do not read the weight of ones: block scales then fill whole tiles of 128 tokens."""
_MOST_BITS = 16       # of a column's number
_TINY_CODES = 64.0
_LOUD_COLUMNS = 16    # one in each block
_FEW_TOKENS = 3
_FIT, _FIT_FIXED = 0.999, 0.995
_SMALLEST_THRESHOLD, _LARGEST_THRESHOLD, _BESIDE_THRESHOLD = 2.0**-12, 2.0**15, 0.05
"""Least share of elements that a rule must predict: only codes next to a rounding boundary may differ."""


@dataclass(frozen=True)
class Seen:
    """An activation x [M, K], and its first C columns as the implementation quantized them, float64 [M, C]."""

    x: Tensor
    seen: Tensor
    ties_of: str | None = None
    """The scheme under whose scales of 1 midpoints are ties, which go to the even code; None: to either code."""

    def fits(self, values: Tensor, slack: Tensor | None = None) -> bool:
        """Return whether predicted `values` [M, K] match what was seen within `slack`; infinity means no prediction."""
        return self.share(values, slack) >= _FIT

    @cached_property
    def few(self) -> Seen:
        """A few tokens, including the one with the largest element, so that a scale of all tokens is the same."""
        loudest = int(self.x.abs().amax(dim=1).argmax())
        tokens = torch.tensor(sorted({loudest, *range(0, len(self.x), max(1, len(self.x) // _FEW_TOKENS))}))
        return replace(self, x=self.x[tokens], seen=self.seen[tokens])

    def rules_out(self, few_values: Tensor, slack: Tensor | None = None) -> bool:
        """Return whether `few_values`, the prediction for `few`, are wrong for more elements than may be wrong in all:
        then no prediction of the other tokens can make it fit."""
        predicted = ~few_values[:, : self.seen.shape[1]].isinf()
        wrong = int((predicted & ~self.few._near(few_values, slack)).sum())
        return wrong > 1 + (1 - _FIT) * self.seen.numel()

    def share(self, values: Tensor, slack: Tensor | None = None) -> float:
        """Return the share of elements that match the prediction."""
        predicted = ~values[:, : self.seen.shape[1]].isinf()
        return float(self._near(values, slack)[predicted].double().mean()) if bool(predicted.any()) else 0.0

    def _near(self, values: Tensor, slack: Tensor | None) -> Tensor:
        wanted = values[:, : self.seen.shape[1]].double()
        # A kernel may round to bf16 before it rounds to the output's dtype; rules differ by far more.
        coarsest = max(reference.unit_roundoff(self.x.dtype), reference.unit_roundoff(torch.bfloat16))
        least = max(torch.finfo(self.x.dtype).smallest_normal * 2.0**-9, 2.0**-126)
        roundings = 2 * coarsest * wanted.abs() + least
        if slack is not None:
            roundings = roundings + slack[:, : self.seen.shape[1]]
        both_nan = self.seen.isnan() & wanted.isnan()
        return ((self.seen - wanted).abs() <= roundings) | both_nan

    def factor(self, values: Tensor) -> float:
        """Return the median ratio of what was seen to predicted `values` [M, K]; 0 if nothing can be compared."""
        wanted = values[:, : self.seen.shape[1]].double()
        usable = (wanted != 0) & self.seen.isfinite() & (self.seen != 0)
        return float((self.seen[usable] / wanted[usable]).median()) if bool(usable.any()) else 0.0

    def without_zeros(self) -> Seen | None:
        """Return the tokens that are not all zeros, if those of zeros were read as NaN; else None."""
        zeros = (self.x == 0).all(dim=1)
        if not bool(zeros.any()) or not bool(self.seen[zeros].isnan().all()):
            return None
        return Seen(self.x[~zeros], self.seen[~zeros])

    @property
    def unchanged(self) -> bool:
        """Whether the activation was not quantized."""
        return self.fits(self.x)

    @property
    def only_multiplied(self) -> bool:
        """Whether every element is the same multiple of itself: a fault of the weight, since no element was encoded."""
        return self.fits(self.factor(self.x) * self.x.double())

    @property
    def loudness(self) -> float:
        return float(self.x.abs().amax())

    @property
    def only_zeros_are_numbers(self) -> bool:
        """Whether tokens of zeros are read as zeros (so the weight is finite), and all others as NaN or infinity."""
        zeros = (self.x == 0).all(dim=1)
        return bool(zeros.any() and (self.seen[zeros] == 0).all() and not self.seen[~zeros].isfinite().any())


class ActivationProbe:
    """An implementation with a weight of single ones, [448, 416] if it supports that shape, else of the case's shape.
    """

    def __init__(self, implementation: Implementation, operands: Operands, *, tokens: int = TOKENS,
                 shape: tuple[int, int] = SHAPE) -> None:
        self.implementation, self.device, self.seed = implementation, operands.device, operands.seed
        self.operands, self.tokens, (n, k) = operands, tokens, shape
        limit = implementation.max_elements(operands.device)
        if limit is not None and tokens * n * k > limit:
            n, k = operands.case.n, operands.case.k
        self.case = operands.case.model_copy(update={"workload": "activation", "m": tokens, "n": n, "k": k})
        self.columns, self.weight_is_read = min(n, k), False
        ones = torch.zeros(n, k, device=operands.device)
        ones[torch.arange(n), torch.arange(n) % self.columns] = 1.0
        scheme, stored = scheme_named(self.case.scheme), operands.weight
        if scheme.quantized and stored.has_codes and not stored.extra:
            self.weight = quantize(ones, stored.scheme, stored.layout).to(operands.device)
        else:
            self.weight = implementation.quantize(ones, scheme)

    def of_shape(self, tokens: int, columns: int) -> ActivationProbe | None:
        """Return the same with a weight [columns, columns]; None if that is too large for the implementation."""
        probe = ActivationProbe(self.implementation, self.operands, tokens=tokens, shape=(columns, columns))
        return probe if probe.columns == columns else None

    def see(self, x: Tensor) -> Seen:
        """Return x [M, K] as the implementation quantizes it. Raise what the implementation raises."""
        y = contract.checked_matmul(self.implementation, x, self.weight, self.device)
        return Seen(x, y[:, : self.columns].double())

    def read_weight(self, loudness: float) -> bool:
        """Set and return `weight_is_read`: whether ones, or a common multiple of them, are read where ones are stored.

        Tried are one-hot activations; signs of one magnitude, `loudness`, which misplaced scales do not affect; and,
        since the code of the largest element may be read as NaN, signs beside louder tokens or columns.
        """
        self.weight_is_read = self._ones_are_read() or any(
            self._signs(loudness, loud_tokens, loud_columns)[1]
            for loud_tokens, loud_columns in ((0, 0), (1, 0), (0, _LOUD_COLUMNS)))
        return self.weight_is_read

    def columns_are_read(self, loudness: float) -> bool:
        """Return whether output n has the sign of element n, and a magnitude that depends only on n."""
        return self._signs(loudness)[0]

    def _ones_are_read(self) -> bool:
        wanted = list(range(0, self.columns, max(1, self.columns // self.tokens)))[:self.tokens]
        seen = self.see(inputs.one_hot(wanted, self.tokens, self.case.k, self.dtype, self.device)).seen
        rows = torch.arange(len(wanted))
        own = seen[rows, torch.tensor(wanted)]
        rest = seen[rows].clone()
        rest[rows, torch.tensor(wanted)] = 0
        return bool(own.isfinite().all() & (own != 0).all() & ((own / own[0] - 1).abs() < 0.02).all()
                    & (rest.abs() <= 2.0**-10 * own[0].abs()).all())

    def _signs(self, loudness: float, loud_tokens: int = 0, loud_columns: int = 0) -> tuple[bool, bool]:
        """Return whether row n reads column n by activations of one magnitude, so that all scales are equal: with any
        magnitude per row, and with the same magnitude for all rows. Element k of token t has the sign of bit t of
        k div 2, inverted for odd k, so that pairs sum to 0.

        The last `loud_tokens`, and one in every `loud_columns` columns, are 8 times as large, and not checked.
        """
        k = torch.arange(self.case.k)[None, :]
        bits = (k >> 1) >> torch.arange(self.tokens)[:, None].clamp(max=_MOST_BITS)
        signs = (1.0 - 2.0 * ((bits ^ k) & 1)).to(self.device)
        quiet = torch.ones(signs.shape, dtype=torch.bool, device=self.device)
        quiet[self.tokens - loud_tokens:] = False
        quiet[:, :: loud_columns or self.case.k] &= not loud_columns
        seen = self.see((loudness * torch.where(quiet, signs, 8 * signs)).to(self.dtype)).seen
        kept, columns = slice(self.tokens - loud_tokens), quiet[0, : self.columns]
        seen, signs = seen[kept][:, columns], signs[kept][:, : self.columns][:, columns]
        own = seen[-1] / signs[-1]

        def near(number: Tensor) -> bool:
            return bool(((seen / number - signs).abs() < 0.02).all())

        return near(own), near(own[0])

    @property
    def dtype(self) -> torch.dtype:
        return inputs.ACTIVATION_DTYPES[self.case.activation]

    def codes(self, rule: ActivationRule) -> Tensor:
        """Return an activation [M, K] of every number of the rule's format, the midpoints and their neighbours, under
        scales of 1 (`inputs.make_weight`), clamped to the activation's dtype."""
        case = self.case.model_copy(update={"scheme": rule.scheme, "n": self.tokens})
        x = inputs.make_weight(case, self.seed, self.device, WeightContents.CODES)
        limit = torch.finfo(self.dtype).max
        return x.clamp(-limit, limit).to(self.dtype)

    def tiny(self, rule: ActivationRule) -> Tensor | None:
        """Return codes under E8M0's smallest scale, where no element is encoded as the largest code. None for scales
        that are not powers of two, and for fp16, which lacks such small numbers."""
        scaling = scheme_named(rule.scheme).scaling
        if not scaling.scale_format.powers_of_two or self.dtype != torch.bfloat16:
            return None
        x = self.codes(rule).float().clamp(-_TINY_CODES, _TINY_CODES)
        return (x * 2.0**-127).to(self.dtype)

    def activation(self, purpose: object) -> Tensor:
        """Return an activation [M, K] that distinguishes rules: tokens of various magnitudes, of zeros, with one
        outlier, of 2**-12 to 2**3, with a common offset, of ever smaller blocks, and one whose largest element is 448,
        so that its scale is 1 for E4M3."""
        x = inputs.make_activation(self.case, self.seed, purpose, self.device).float()
        k = x.shape[1]
        x[1] *= 8
        x[2] *= 2.0**-5
        x[3] = 0
        x[4, k // 2] = 200.0
        x[5] *= torch.exp2(torch.arange(k, device=x.device) % 16 - 12.0)
        x[6] += 64
        x[7] *= torch.exp2(torch.arange(k, device=x.device) % 18 - 10.0)
        x[7, 0] = 448.0
        x[8] *= torch.exp2(-2.0 * (torch.arange(k, device=x.device) // 16 % 10))
        return x.to(self.dtype)


@dataclass(frozen=True)
class ActivationFault:
    """A fault in quantizing an activation. values : x [M, K] -> the wrongly quantized values [M, K]"""

    kind: Kind
    message: str
    values: Callable[[Tensor], Tensor]


def activation_faults(rule: ActivationRule) -> Iterator[ActivationFault]:
    """Yield known faults of a quantizer that should follow `rule`, with scales computed from each activation."""
    scheme = scheme_named(rule.scheme)
    fmt, scaling = scheme.format, scheme.scaling

    def parts(x: Tensor) -> tuple[Tensor, Scales]:
        scales = scaling.choose(x.float(), fmt)
        return decode(encode(scaling.divide(x.float(), scales), fmt, rule.rounding), fmt), scales

    def spread(x: Tensor, scales: Scales) -> Tensor:
        return scaling.spread(scaling.factors(scales), *x.shape)

    def with_scales(change: Callable[[Scales], Scales]) -> Callable[[Tensor], Tensor]:
        def values(x: Tensor) -> Tensor:
            codes, scales = parts(x)
            return codes * spread(x, change(scales))
        return values

    if isinstance(fmt, Format) and not fmt.is_integer and fmt.mantissa_bits:
        def flushed(x: Tensor) -> Tensor:
            codes, scales = parts(x)
            return torch.where(codes.abs() < fmt.min_normal, 0.0, codes) * spread(x, scales)

        yield ActivationFault(Kind.SUBNORMAL_FLUSHED, f"what rounds to a subnormal of {fmt.name} becomes zero", flushed)
    yield ActivationFault(Kind.SIGN_LOST, "negative elements become positive", lambda x: rule.values(x).abs())
    yield ActivationFault(Kind.SCALE_MISSING, "its scale is not applied to the product", lambda x: parts(x)[0])
    yield ActivationFault(Kind.SCALE_SQUARED, "its scale is applied twice",
                          lambda x: parts(x)[0] * spread(x, parts(x)[1]).square())
    yield ActivationFault(Kind.SCALE_INVERTED, "the product is divided by its scale",
                          lambda x: parts(x)[0] / spread(x, parts(x)[1]))
    if scaling.has_tensor_scale:
        for kind, what, power in ((Kind.GLOBAL_SCALE_INVERTED, "divided by", -1), (Kind.GLOBAL_SCALE_MISSING, "not", 0),
                                  (Kind.GLOBAL_SCALE_MISREAD, "multiplied twice by", 2)):
            message = f"the product is {what} {'multiplied by ' if not power else ''}its tensor scale"
            yield ActivationFault(kind, message, with_scales(
                lambda scales, power=power: replace(scales, tensor_scale=scales.tensor_scale**power)))
    if scaling.block_rows == 1:
        for step, which in ((-1, "next"), (1, "previous")):
            def moved(x: Tensor, step: int = step) -> Tensor:
                codes, scales = parts(x)
                moved = codes * spread(x, scales).roll(step, 0)
                # The scale of zeros is arbitrary.
                return torch.where(_of_zeros(x, rule).roll(step, 0), torch.inf, moved)

            yield ActivationFault(Kind.BLOCK_OFF_BY_ONE, f"each token is multiplied by the scale of the {which} one",
                                  moved)
        yield ActivationFault(Kind.SCALE_SHARED, "every token is multiplied by the scale of the first",
                              lambda x: parts(x)[0] * spread(x, parts(x)[1])[:1])
    if scaling.block is None and scaling.block_rows == 1:
        yield ActivationFault(Kind.SCALE_TRANSPOSED, "scales are taken per channel, over all tokens, not per token",
                              lambda x: rule.values(x.T.contiguous()).T)
    yield ActivationFault(Kind.ZERO_BLOCK, "a block of zeros becomes NaN",
                          lambda x: torch.where(_of_zeros(x, rule), torch.nan, rule.values(x)))


def _of_zeros(x: Tensor, rule: ActivationRule) -> Tensor:
    scaling = scheme_named(rule.scheme).scaling
    return scaling.spread((scaling.block_amax(x.float()) == 0).float(), *x.shape).bool()


def largest_magnitude(loud: Seen, louder: Seen) -> float | None:
    """Return the largest output magnitude if it is the same for a large and a larger activation, as under a fixed scale
    with saturation; else None."""
    if not bool(loud.seen.isfinite().all() & louder.seen.isfinite().all()):
        return None
    tops = [float(one.seen.abs().max()) for one in (loud, louder)]
    return tops[0] if tops[0] > 0 and abs(tops[1] / tops[0] - 1) < 0.02 else None


def nan_threshold(probe: ActivationProbe) -> float | None:
    """Return the largest magnitude of a single element that does not become NaN; None if none becomes NaN."""
    low, high = _SMALLEST_THRESHOLD, _LARGEST_THRESHOLD
    for step in range(7):
        ends = torch.logspace(0, 1, probe.tokens + 1, base=high / low, dtype=torch.float64)[1:] * low
        x = torch.zeros(probe.tokens, probe.case.k, dtype=probe.dtype, device=probe.device)
        x[:, 0] = ends.to(probe.dtype)
        lost = probe.see(x).seen.isnan().any(dim=1)
        if step == 0 and not bool(lost[-1]):
            return None
        first = int(lost.int().argmax()) if bool(lost.any()) else probe.tokens - 1
        low, high = (low if first == 0 else float(ends[first - 1])), float(ends[first])
    return low


def find_fixed_scale(seen: Seen, fmt: Format, top: float, lost: bool) -> tuple[float, float] | None:
    """Return the fixed scale under which an activation is quantized to `fmt`, and the largest magnitude that it
    represents; None if there is none. `top` estimates that magnitude; `lost`: larger ones become NaN."""

    def share(scale: float) -> float:
        reach = scale * fmt.max
        values, slack = ActivationRule(f"{fmt.name}-tensor", scale=scale).quantized(seen.x)
        if lost:    # NaN in one element makes every output of its token NaN
            past = (seen.x.double().abs() / reach).amax(dim=1, keepdim=True)
            values = torch.where(past > 1, torch.nan, values)
            values = torch.where((past - 1).abs() < _BESIDE_THRESHOLD, torch.inf, values)
        return seen.share(values, slack)

    best, scale = share(top / fmt.max), top / fmt.max
    for step in (2.0**-11, 2.0**-15):       # `top` was rounded by the output
        best, scale = max((share(scale * (1 + at * step)), scale * (1 + at * step)) for at in range(-16, 17))
    return (scale, scale * fmt.max) if best >= _FIT_FIXED else None


def description(seen: Seen) -> str:
    """Return examples of how elements are quantized, largest errors first."""
    given = seen.x[:, : seen.seen.shape[1]].double()
    error = ((seen.seen - given).abs() / given.abs().clamp(min=2.0**-40)).nan_to_num(torch.inf)
    worst = error.reshape(-1).argsort(descending=True)[:: max(1, error.numel() // 200)][:3].tolist()
    columns = seen.seen.shape[1]
    return ", ".join(f"{float(given[at // columns, at % columns]):.6g} becomes"
                     f" {float(seen.seen[at // columns, at % columns]):.6g}" for at in worst)

"""Recover how many significand bits of an fp32 scale reach the product.

Rounding a scale to 16 bits changes a weight by less than the weight's own rounding may, so no single output shows it,
but many outputs together do. Each rounding of a 24-bit scale predicts a direction in which all outputs err. The share
of that error in the outputs is estimated by least squares, with its standard error from the residuals: 0 if scales keep
all bits, 1 if they are rounded in that way. Roundings that an implementation is free to make (of the scaled weight, of
the product of two levels of scales) are chosen to fit the outputs best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fpxbench.checking import contract, inputs
from fpxbench.checking.examination import Examination
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.experiment import Difference, Experiment
from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.numbers.formats import FP32
from fpxbench.numbers.scaling import Scaling
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict
from fpxbench.workloads import WeightContents, contents_of

NAME = "precision"
STANDARD_ERRORS = 6.5
"""An estimate is farther than this from the truth once in 1e10: the sum of thousands of errors, each bounded by a unit
in the last place, is normally distributed."""
TOKENS, WEIGHTS = 16, 8
"""Activation rows, and weights if each has a single scale; two weights are enough for scales by rows or blocks."""
LARGEST_CODE = 128.0
"""Codes of larger numbers are not used, since their sums could leave fp16's range."""
Round = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ScaleRounding:
    """A rounding of scales to `bits` significand bits, the implicit one included, to nearest or toward zero."""

    bits: int
    types: str
    to_nearest: bool = True
    of_reciprocal: bool = False
    """For a scale that divides: whether its reciprocal is rounded instead."""

    def apply(self, values: Tensor) -> Tensor:
        """Return float64 `values` rounded."""
        mantissa, exponent = torch.frexp(values.double())
        steps = mantissa * 2.0**self.bits
        return torch.ldexp((steps.round() if self.to_nearest else steps.trunc()) / 2.0**self.bits, exponent)

    def factor(self, stored: Tensor, divides: bool) -> Tensor:
        """Return the factor of a stored scale."""
        if not divides:
            return self.apply(stored)
        return self.apply(1 / stored) if self.of_reciprocal else 1 / self.apply(stored)

    def __str__(self) -> str:
        return f"{'rounded' if self.to_nearest else 'cut off'} to {self.types} ({self.bits} bits)"


_WHOLE = ScaleRounding(24, "fp32")
_ROUNDINGS = (
    *(ScaleRounding(bits, types, nearest) for bits, types in ((8, "bf16"), (11, "fp16 or TF32"))
      for nearest in (True, False)),
    ScaleRounding(4, "E4M3"), ScaleRounding(3, "E5M2"), ScaleRounding(1, "a power of two"))

_FEWEST_BITS = 8
"""Coarser roundings than bf16 show in every output."""


def recover_precision(bench: Bench) -> Experiment | None:
    """Test whether fp32 scales reach the product with all bits; return None if there are none, or they cannot be set.

    All other maps must be right.
    """
    implementation = bench.implementation
    if not bench.sets_codes or implementation.slow(bench.device) or bench.case.m == 0 \
            or implementation.activation_format_under(bench.scheme) is not None:
        return None
    experiments = [_Level(bench, level).experiment() for level in _levels(bench.scaling)]
    if not experiments:
        return None
    order = {False: 0, None: 1, True: 2}
    return min(experiments, key=lambda one: order[one.right])


def check_precision(examination: Examination) -> Verdict | None:
    """Return the verdict of a sweep if scales lose bits before they multiply; None if they do not, or if the case is
    not the canary for scales."""
    implementation, operands, name = examination.implementation, examination.operands, "precision of scales"
    if contents_of(operands.case.workload) is not WeightContents.SCALES or operands.case.m == 0 \
            or examination.new_shapes_cost_too_much(name):
        return None
    found: list[Experiment | None] = []
    examination.ask(name, lambda: found.append(
        recover_precision(Bench(implementation, operands.case, operands.device, operands.seed))))
    experiment = next(iter(found), None)
    if experiment is None:
        return None
    if experiment.right is not False:
        (examination.covered if experiment.right else examination.not_asked)[name] = experiment.message
        return None
    return Verdict(status=Status.WRONG, kind=experiment.kinds[0], summary=experiment.message,
                   evidence={"experiments": {experiment.name: experiment.message}})


def _levels(scaling: Scaling) -> Iterator[str]:
    if scaling.has_tensor_scale:
        yield "tensor scale"
    if scaling.scale_format.format == FP32:
        yield "scale"


@dataclass(frozen=True)
class _Call:
    """One product y, flattened, of x [M, K] with a weight: `codes` are the numbers of its codes, float [N, K]."""

    x: Tensor
    y: Tensor
    codes: Tensor
    block: Tensor
    """The value of each block scale, float64 [R, G]."""
    stored: Tensor
    """The scales of the tested level: [1] or [R, G]."""


@dataclass(frozen=True)
class _Fit:
    """The share of a rounding's predicted error in the outputs, its standard error, and the residual sums of squares
    with rounded and with whole scales."""

    share: float
    error: float
    left: float
    left_whole: float

    @property
    def asked(self) -> bool:
        """Whether shares of 0 and 1 can be told apart."""
        return 2 * STANDARD_ERRORS * self.error <= 1

    @property
    def fits(self) -> bool:
        return self.asked and abs(self.share - 1) <= STANDARD_ERRORS * self.error

    @property
    def excluded(self) -> bool:
        return self.asked and 1 - self.share > STANDARD_ERRORS * self.error


class _Level:
    """The experiment on one level of an implementation's scales."""

    def __init__(self, bench: Bench, level: str) -> None:
        self.bench, self.level = bench, level
        self.of_tensor = level == "tensor scale"
        self.divides = self.of_tensor and bench.divides_by_global_scale
        single = self.of_tensor or math.prod(bench.grid_shape) == 1
        self.calls = [self._call(number) for number in range(WEIGHTS if single else 2)]

    def experiment(self) -> Experiment:
        """Return the experiment: wrong, with the rounding that fits; right; or unknown if neither is certain."""
        outputs = sum(call.y.numel() for call in self.calls)
        fits = {(rounding, order): self._fit(rounding, order) for rounding in self._roundings for order in self._orders}
        fits = {key: fit for key, fit in fits.items() if math.isfinite(fit.left)}
        if not fits:
            return Experiment(name=NAME, right=None, message=f"no output shows how many bits of the {self.level} are"
                                                             " read")
        (rounding, _), best = min(fits.items(), key=lambda item: item[1].left)
        least_whole = min(fits.values(), key=lambda fit: fit.left_whole)
        if best.fits and best.left < least_whole.left_whole:
            return self._wrong(rounding, best, outputs)
        order = next(order for (_, order), fit in fits.items() if fit is least_whole)
        asked = [(one.bits, fit) for (one, of), fit in fits.items() if of is order and fit.asked]
        most = max((bits for bits, _ in asked), default=0)
        if most >= _FEWEST_BITS and all(fit.excluded for _, fit in asked):
            return Experiment(name=NAME, right=True, tried=outputs,
                              message=f"more than {most} bits of the {self.level} reach the product")
        return Experiment(name=NAME, right=None, tried=outputs,
                          message=f"how many bits of the {self.level} reach the product cannot be told")

    def _wrong(self, rounding: ScaleRounding, fit: _Fit, outputs: int) -> Experiment:
        pairs: list[tuple[float, float]] = []
        for call in self.calls:
            stored = call.stored.double().reshape(-1)
            right = 1 / stored if self.divides else stored
            pairs += zip(right.tolist(), rounding.factor(stored, self.divides).tolist(), strict=True)
        value, becomes = max(pairs[:64], key=lambda pair: abs(pair[1] / pair[0] - 1))
        kind = Kind.GLOBAL_SCALE_MISREAD if self.of_tensor else Kind.SCALE_NARROWED
        differences = [Difference(entry=f"{self.level} {right:.9g}", definition=f"{right:.9g}",
                                  effective=f"{effective:.9g}") for right, effective in pairs[:WEIGHTS]]
        subject = f"the reciprocal of the {self.level}" if rounding.of_reciprocal else f"the {self.level}"
        return Experiment(name=NAME, right=False, tried=outputs, kinds=[kind], differences=differences, message=(
            f"{subject} is {rounding} before weights are multiplied by it: {value:.6g} acts as {becomes:.6g}, gain"
            f" {becomes / value:.4f} of 1.0000 ({outputs} outputs, each within its tolerance, err by {fit.share:.3f} ±"
            f" {fit.error:.3f} of what that makes of them)"))

    def _call(self, number: int) -> _Call:
        """Return the product of random codes under random scales."""
        bench, grid = self.bench, self.bench.grid_shape
        rng = inputs.generator(bench.seed, f"precision {self.level} {number}")
        usable = bench.table.isfinite() & (bench.table.abs() <= min(LARGEST_CODE, bench.fmt.max))
        alphabet = usable.nonzero().reshape(-1).cpu()
        codes = alphabet[torch.randint(len(alphabet), (bench.n, bench.k), generator=rng)]

        def numbers(count: int, fractions: Tensor) -> Tensor:
            return torch.ldexp(1 + fractions, torch.randint(-2, 2, (count,), generator=rng))

        count = math.prod(grid)
        if self.of_tensor:      # block scales with E4M3's four significand bits
            blocks = numbers(count, torch.randint(8, (count,), generator=rng) / 8)
            tensor = numbers(1, torch.rand(1, generator=rng)).to(bench.device)
            scales = replace(bench.scales(blocks.reshape(grid)), tensor_scale=tensor)
        else:
            scales = bench.scales(numbers(count, torch.rand(count, generator=rng)).reshape(grid))
        operands: Operands = bench.hold(codes, scales)
        x = operands.activation(f"precision {number}", TOKENS)
        y = contract.checked_matmul(bench.implementation, x, operands.weight, bench.device)
        stored = scales.tensor_scale if self.of_tensor else scales.stored
        assert stored is not None
        block = bench.scaling.levels(scales)[0].double()
        return _Call(x.float(), y.double().reshape(-1), bench.table[codes.to(bench.device)], block, stored)

    # Roundings that an implementation may make.

    @cached_property
    def _roundings(self) -> tuple[ScaleRounding, ...]:
        return (*_ROUNDINGS, *(replace(one, of_reciprocal=True) for one in _ROUNDINGS if self.divides))

    @cached_property
    def _orders(self) -> list[tuple[Round, Round]]:
        """Return the allowed roundings of the product of two levels of scales, and of the scaled weight."""
        def whole(numbers: Tensor) -> Tensor:
            return numbers

        def to(dtype: torch.dtype) -> Round:
            return lambda numbers: numbers.to(dtype).double()

        def cut(numbers: Tensor) -> Tensor:
            return (numbers.float().view(torch.int32) & -65536).view(torch.float32).double()

        factors = (whole, to(self.bench.dtype)) if self.of_tensor else (whole,)
        weights = (whole, to(torch.bfloat16), to(torch.float16), cut)
        return [(factor, weight) for factor in factors for weight in weights]

    def _product(self, call: _Call, rounding: ScaleRounding, order: tuple[Round, Round]) -> Tensor:
        bench, (round_factor, round_weight) = self.bench, order
        factor = rounding.factor(call.stored.double(), self.divides)
        factors = round_factor(call.block * factor if self.of_tensor else factor)
        weight = round_weight(call.codes * bench.scaling.spread(factors, bench.n, bench.k))
        return (call.x @ weight.float().T).double().reshape(-1)

    @cached_property
    def _whole(self) -> dict[tuple[Round, Round], Tensor]:
        return {order: torch.cat([self._product(call, _WHOLE, order) for call in self.calls]) for order in self._orders}

    def _fit(self, rounding: ScaleRounding, order: tuple[Round, Round]) -> _Fit:
        """Return the least-squares fit. A common factor of all outputs, such as truncation of outputs causes, is
        projected out."""
        seen, whole = torch.cat([call.y for call in self.calls]), self._whole[order]
        rounded = torch.cat([self._product(call, rounding, order) for call in self.calls])
        counted = seen.isfinite()
        whole = whole[counted]
        own = whole.square().sum()

        def aside(values: Tensor) -> Tensor:
            return values - whole * ((values * whole).sum() / own)

        error, direction = aside(seen[counted] - whole), aside(rounded[counted] - whole)
        length = float(direction.square().sum())
        if not length:
            return _Fit(0.0, math.inf, math.inf, float(error.square().sum()))
        share = float((error * direction).sum()) / length
        standard_error = math.sqrt(float((direction * (error - share * direction)).square().sum())) / length
        return _Fit(share, standard_error, float((error - direction).square().sum()), float(error.square().sum()))

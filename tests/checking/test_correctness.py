"""What a call may not do, whatever its numbers; and that right calls, done in other ways, are left alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fpxbench.checking import correctness, inputs, poison
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.stored import diagnose_quantization
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.workloads import CANARIES

pytestmark = pytest.mark.usefixtures("one_thread")


class Right(Implementation):
    """The product as the definition has it, in fp32."""

    def matmul(self, x, weight):
        return (x.float() @ weight.dequantize().T).to(x.dtype)


class Float64(Right):
    """In float64, rounded once."""

    def matmul(self, x, weight):
        return (x.double() @ weight.dequantize().double().T).to(x.dtype)


class RoundedWeight(Right):
    """With the scaled weight rounded to the activation's dtype, as an upcast kernel has it."""

    def matmul(self, x, weight):
        return (x.float() @ weight.dequantize().to(x.dtype).float().T).to(x.dtype)


class Backwards(Right):
    """In chunks of K, the last one first."""

    def matmul(self, x, weight):
        y = torch.zeros(x.shape[0], weight.shape[0])
        for part, rows in reversed(list(zip(x.float().split(17, 1), weight.dequantize().split(17, 1), strict=True))):
            y = y + part @ rows.T
        return y.to(x.dtype)


class ScaledAfter(Right):
    """Unscaled product rounded to the output dtype, then scaled and rounded again, where a row has one scale."""

    def matmul(self, x, weight):
        if not weight.scheme.quantized or weight.scheme.scaling.block is not None:
            return super().matmul(x, weight)
        scale = weight.scale_grid()
        unscaled = (x.float() @ (weight.dequantize() / scale).T)
        limit = torch.finfo(x.dtype).max
        if bool((unscaled.abs() > limit).any()):    # fp16 cannot hold it: such a kernel would scale first
            return super().matmul(x, weight)
        return (unscaled.to(x.dtype) * scale.T.to(torch.float32)).to(x.dtype)


class TruncatedSums(Right):
    """Each partial sum truncated to fp32, as tensor cores do."""

    def matmul(self, x, weight):
        y = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
        w = weight.dequantize().double()
        for part, rows in zip(x.double().split(16, 1), w.split(16, 1), strict=True):
            total = y + part @ rows.T
            nearest = total.float()
            over = nearest.double().abs() > total.abs()
            y = torch.where(over, torch.nextafter(nearest, torch.zeros(())), nearest).double()
        return y.to(x.dtype)


RIGHT = (Right, Float64, RoundedWeight, Backwards, ScaledAfter, TruncatedSums)


def operands_for(
    implementation: Implementation,
    scheme: str = "e4m3fn-row",
    *,
    m: int = 3,
    n: int = 24,
    k: int = 96,
    activation: str = "bf16",
    workload: str = "canary.ragged",
    seed: int = 1,
) -> Operands:
    case = Case(implementation="x", scheme=scheme, workload=workload, m=m, n=n, k=k, activation=activation)
    original = inputs.make_weight(case, seed)
    weight = implementation.quantize(original, scheme_named(scheme))
    return Operands(case, "cpu", seed, original, weight, implementation.dequantize(weight).float())


def checked(implementation: Implementation, operands: Operands):
    """Return the verdict of all checks, None if there is nothing to object to."""
    _, verdict = correctness.check_calls(implementation, operands)
    return (
        verdict
        or correctness.check_one_hot(implementation, operands)
        or correctness.check_configs(implementation, operands)
    )


def kind_of(implementation: Implementation, operands: Operands) -> Kind:
    with pytest.raises(ContractViolation) as caught:
        checked(implementation, operands)
    return caught.value.verdict.kind


def test_no_right_implementation_is_ever_called_wrong() -> None:
    """396 random cases, every way of being right: order, width and truncation of sums, one rounding or two."""
    rng = random.Random(20261123)
    alarms = []
    for number in range(396):
        implementation = RIGHT[number % len(RIGHT)]()
        scheme = rng.choice([*SCHEMES, "e2m2-row", "e3m4b5-g64", "e1m1-g16", "e4m3fnuz-tensor"])
        shape = dict(m=rng.choice([1, 2, 5, 17]), n=rng.randint(1, 80), k=rng.choice([1, 7, 32, rng.randint(1, 400)]))
        activation = rng.choice(["bf16", "fp16"]) if scheme_named(scheme).quantized else scheme
        workload = rng.choice(["canary.ragged", "canary.codes"])
        operands = operands_for(implementation, scheme, activation=activation, workload=workload, seed=number, **shape)
        verdict = checked(implementation, operands)
        if operands.weight.scheme.quantized:
            diagnosis = diagnose_quantization(operands.original, operands)
            if diagnosis is not None:
                alarms.append((scheme, shape, diagnosis.sentence))
        if verdict is not None:
            alarms.append((type(implementation).__name__, operands.case.id, shape, verdict.summary))
    assert not alarms


@pytest.mark.parametrize("element", [0, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_element_that_is_never_written_shows(dtype, element) -> None:
    class Unwritten(Right):
        def matmul(self, x, weight):
            right = super().matmul(x, weight)
            y = torch.empty_like(right)
            mask = torch.ones(right.numel(), dtype=torch.bool)
            mask[element] = False
            y.view(-1)[mask] = right.view(-1)[mask]
            return y

    operands = operands_for(Unwritten(), activation="bf16" if dtype is torch.bfloat16 else "fp16")
    _, verdict = correctness.check_calls(Unwritten(), operands)
    assert (verdict.status, verdict.kind) == (Status.WRONG, Kind.UNWRITTEN_OUTPUT)
    assert verdict.summary.startswith("1 of 72")


def test_new_memory_is_poisoned_only_while_it_is_watched() -> None:
    for pattern in (*poison.PATTERNS, poison.ZERO):
        with poison.poisoned_memory("cpu", 0, pattern):
            assert bool(poison.holds_pattern(torch.empty(64, 512, dtype=torch.bfloat16), pattern).all())
    assert not bool(poison.holds_pattern(torch.ones(64, 512, dtype=torch.bfloat16), poison.NAN).any())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_one_pattern_is_nan_in_every_dtype_and_the_other_is_large_and_finite(dtype) -> None:
    def number(pattern: int) -> float:
        return float(torch.full((8,), pattern, dtype=torch.uint8).view(dtype)[0].double())

    assert math.isnan(number(poison.NAN))
    assert math.isfinite(number(poison.LARGE)) and number(poison.LARGE) > 100


def test_a_call_may_not_touch_what_it_is_given() -> None:
    class TouchesActivation(Right):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            x[0, 0] = -x[0, 0]
            return y

    class TouchesCodes(Right):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            weight.packed[0, 0] ^= 1
            return y

    class TouchesScale(Right):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            weight.scales[-1, -1] *= 2
            return y

    for implementation in (TouchesActivation(), TouchesCodes(), TouchesScale()):
        assert kind_of(implementation, operands_for(implementation)) is Kind.INPUT_MODIFIED


def test_shape_and_dtype_of_the_output_are_the_activations() -> None:
    class Transposed(Right):
        def matmul(self, x, weight):
            return super().matmul(x, weight).T

    class Widened(Right):
        def matmul(self, x, weight):
            return super().matmul(x, weight).float()

    class Nothing(Right):
        def matmul(self, x, weight):
            return None

    assert kind_of(Transposed(), operands_for(Transposed())) is Kind.WRONG_SHAPE
    assert kind_of(Widened(), operands_for(Widened())) is Kind.WRONG_DTYPE
    assert kind_of(Nothing(), operands_for(Nothing())) is Kind.WRONG_SHAPE


def test_a_square_output_that_is_transposed_is_still_wrong() -> None:
    class Transposed(Right):
        def matmul(self, x, weight):
            return super().matmul(x, weight).T.contiguous()

    _, verdict = correctness.check_calls(Transposed(), operands_for(Transposed(), m=24, n=24))
    assert verdict.status is Status.WRONG


def test_every_call_gets_an_activation_of_its_own() -> None:
    operands = operands_for(Right())
    first, second = operands.activation(0), operands.activation(1)
    assert not torch.equal(first, second)
    assert torch.equal(first, operands.activation(0))


def test_right_only_for_some_calls_is_not_right() -> None:
    class Wears(Right):
        calls = 0

        def matmul(self, x, weight):
            self.calls += 1
            return super().matmul(x, weight) * (1.0 if self.calls < correctness.CALLS else 1.5)

    _, verdict = correctness.check_calls(Wears(), operands_for(Wears()))
    assert verdict.kind is Kind.NOT_REPEATABLE
    assert f"first {correctness.CALLS - 1} calls" in verdict.summary


def test_the_output_of_the_call_before_is_recognised() -> None:
    class Stale(Right):
        kept = None

        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            self.kept, y = y, y if self.kept is None else self.kept
            return y

    _, verdict = correctness.check_calls(Stale(), operands_for(Stale()))
    assert verdict.kind is Kind.STALE_OUTPUT


def test_each_autotuning_configuration_answers_for_itself() -> None:
    class Tuned(Right):
        wrong = ()

        def configs(self, x, weight):
            return ("BLOCK_K=32", "BLOCK_K=64")

        def matmul_with(self, x, weight, config):
            return self.matmul(x, weight) * (2 if config in self.wrong else 1)

    class WronglyTuned(Tuned):
        wrong = ("BLOCK_K=64",)

    assert correctness.check_configs(Tuned(), operands_for(Tuned())) is None
    verdict = correctness.check_configs(WronglyTuned(), operands_for(WronglyTuned()))
    assert verdict.kind is Kind.CONFIG_DEPENDENT
    assert verdict.evidence["config"] == "BLOCK_K=64"


def test_a_single_weight_misread_cannot_hide_in_a_sum() -> None:
    """A subnormal read as zero changes no sum beyond its tolerance; read out alone, it shows."""
    class Flushes(Right):
        def matmul(self, x, weight):
            w = weight.dequantize()
            smallest = weight.scheme.format.min_subnormal
            return (x.float() @ w.masked_fill(w.abs() == smallest, 0.0).T).to(x.dtype)

    operands = operands_for(Flushes(), m=1, n=64, k=256, workload="canary.codes")
    assert correctness.check_calls(Flushes(), operands)[1] is None
    verdict = correctness.check_one_hot(Flushes(), operands)
    assert verdict.status is Status.WRONG
    assert verdict.evidence["code"].endswith("0000.001")


@pytest.mark.parametrize(
    "scheme", [*(name for name in SCHEMES if scheme_named(name).quantized), "e4m3fn-g2", "e3m4-mx", "e4m3fnuz-g3"]
)
def test_the_probes_of_the_code_canary_read_every_finite_code(scheme) -> None:
    """No code of any scheme can be misread without a probe that sees it, whatever the seed."""
    canary = next(workload for workload in CANARIES if workload.name == "canary.codes")
    for seed in range(5):
        weight = operands_for(Right(), scheme, n=canary.n, k=canary.k, workload=canary.name, seed=seed).weight
        fmt = weight.scheme.format
        finite = {code for code in range(1 << fmt.bits) if abs(fmt.value(code)) <= fmt.max}
        probed = weight.codes()[:, inputs.columns_covering_codes(weight, correctness.ONE_HOT_COLUMNS)]
        assert set(probed.unique().tolist()) == finite
        # The block with the largest weight makes a tensor scale a power of two, so that every quotient is exact.
        apart = (weight.scale_grid() != 1).sum()
        assert apart == (1 if weight.scheme.scaling.has_tensor_scale else 0)
        assert weight.tensor_scale is None or float(torch.frexp(weight.tensor_scale).mantissa) == 0.5


def test_infinity_is_right_only_where_the_dtype_ends() -> None:
    """E5M2 holds 57344, so an fp16 product of such weights overflows rightly; one element that could be held may
    not."""
    class Infinite(Right):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            held = y.abs().argmin()
            y.view(-1)[held] = torch.inf
            return y

    operands = operands_for(Right(), "e5m2-row", m=2, n=52, k=64, activation="fp16", workload="canary.codes")
    assert not torch.isfinite(Right().matmul(operands.activation(0), operands.weight)).all()
    assert correctness.check_calls(Right(), operands)[1] is None
    assert correctness.check_calls(Infinite(), operands)[1].status is Status.NONFINITE


def test_one_nan_among_many_outputs_is_nonfinite() -> None:
    class OneNan(Right):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            y[-1, 7] = torch.nan
            return y

    _, verdict = correctness.check_calls(OneNan(), operands_for(OneNan()))
    assert verdict.status is Status.NONFINITE
    assert "1 of 72 outputs" in verdict.summary

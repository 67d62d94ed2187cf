"""What products are summed in is measured by cancellation: bits, range, and the block that is summed before others."""

from __future__ import annotations

import pytest
import torch

from fpxbench.checking.accumulator import measure_accumulator, probe_weight
from fpxbench.checking.examination import Examination
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.numbers.tensor_codec import decode
from fpxbench.records.case import Case
from fpxbench.records.record import Properties
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import prepare, quantized

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDED = {
    24: lambda y: y.float().double(), 11: lambda y: y.half().double(), 8: lambda y: y.bfloat16().double(),
    14: lambda y: torch.ldexp((torch.frexp(y).mantissa * 2.0**14).trunc(), torch.frexp(y).exponent - 14),
}


class Sums(Implementation):
    """Sums blocks of products, and rounds the running sum after each; `backwards`, from the end."""

    def __init__(self, bits: int = 24, block: int = 1, *, backwards: bool = False) -> None:
        self.rounded, self.block, self.backwards = ROUNDED[bits], block, backwards

    def matmul(self, x, weight):
        total = torch.zeros(len(x), weight.shape[0], dtype=torch.float64)
        parts = list(
            zip(x.double().split(self.block, 1), weight.dequantize().double().split(self.block, 1), strict=True)
        )
        for a, b in reversed(parts) if self.backwards else parts:
            total = self.rounded(total + a @ b.T)
        return total.to(x.dtype)


class ScalesInTheSum(Sums):
    """Multiplies block scales into the products, and the tensor scale into the sum."""

    def matmul(self, x, weight):
        scaling = weight.scheme.scaling
        blocks, tensor_scale = scaling.levels(weight.stored_scales)
        numbers = decode(weight.codes(), weight.scheme.format) * scaling.spread(blocks, *weight.shape)
        total = torch.zeros(len(x), weight.shape[0], dtype=torch.float64)
        for a, b in zip(x.double().split(1, 1), numbers.double().split(1, 1), strict=True):
            total = self.rounded(total + a @ b.T)
        return (total * tensor_scale).to(x.dtype)


class Pairwise(Sums):
    """Halves K until one product is left: a tree."""

    def matmul(self, x, weight):
        products = x.float()[:, None, :] * weight.dequantize()[None]
        while products.shape[-1] > 1:
            half = products.shape[-1] // 2
            odd = products[..., 2 * half:]
            products = torch.cat([products[..., 0:2 * half:2] + products[..., 1:2 * half:2], odd], dim=-1)
        return products[..., 0].to(x.dtype)


def measured(
    implementation: Implementation, scheme: str = "e4m3fn-row", m: int = 16, k: int = 512, activation: str = "bf16"
) -> Examination:
    case = Case(implementation="i", scheme=scheme, workload="canary.x", m=m, n=32, k=k, activation=activation)
    operands = prepare(implementation, TrialRequest(case=case, seed=3))
    examination = Examination(implementation, operands, budget_s=30.0)
    measure_accumulator(
        examination, lambda like, original: quantized(implementation, like.case, "cpu", like.seed, original)
    )
    return examination


@pytest.mark.parametrize("bits", ROUNDED)
@pytest.mark.parametrize("activation", ["bf16", "fp16"])
def test_the_significand_is_measured_to_the_bit(bits: int, activation: str) -> None:
    assert measured(Sums(bits), activation=activation).properties["accumulator_bits"] == bits


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if scheme_named(name).quantized])
def test_it_is_measured_in_every_scheme(scheme: str) -> None:
    found = measured(Sums(14, 16), scheme)
    assert (found.properties["accumulator_bits"], found.properties["sum_block"]) == (14, 16), found.not_asked


@pytest.mark.parametrize("scheme", [
    name for name in SCHEMES if (scaling := scheme_named(name).scaling) is not None and scaling.has_tensor_scale])
@pytest.mark.parametrize("bits", [8, 14, 24])
def test_a_block_scale_within_the_sum_costs_no_bits(scheme: str, bits: int) -> None:
    assert measured(ScalesInTheSum(bits), scheme).properties["accumulator_bits"] == bits


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_the_block_is_measured(block: int) -> None:
    found = measured(Sums(24, block)).properties
    assert found["sum_block"] == block
    assert Properties(**found).messages()["sums"] == f"in 24 bits, in blocks of {block}"


def test_an_order_is_told_where_it_is_a_simple_one() -> None:
    assert measured(Sums(24, 1)).properties["sum_order"] == "one after another"
    assert measured(Pairwise()).properties["sum_block"] is None


def test_fp16_sums_overflow_and_others_do_not() -> None:
    assert measured(Sums(11)).properties["accumulator_overflows"] is True
    assert measured(Sums(8)).properties["accumulator_overflows"] is False
    assert measured(Sums(24)).properties["accumulator_overflows"] is False


def test_one_token_at_a_time_is_enough() -> None:
    assert measured(Sums(24, 32), m=1).properties["sum_block"] == 32


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if scheme_named(name).quantized])
def test_the_probe_weight_is_stored_as_ones(scheme: str) -> None:
    case = Case(implementation="i", scheme=scheme, workload="canary.x", m=1, n=8, k=128)
    operands = prepare(Implementation(), TrialRequest(case=case, seed=3))
    weight, columns = probe_weight(operands)
    decoded = Implementation().quantize(weight, scheme_named(scheme)).dequantize()
    assert bool((decoded[:, columns] == 1).all()) and len(columns) > 100


def test_what_cannot_be_measured_is_said() -> None:
    assert "dense weight" in measured(Sums(), "bf16").not_asked["accumulator"]
    found = measured(Sums(), "e4m3fn-row", k=16)
    assert "only 15 columns" in found.not_asked["accumulator"] and "accumulator_bits" not in found.properties

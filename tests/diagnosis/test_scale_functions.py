"""What a scale multiplies by is named whatever the function: also where the scale 1 gives no number, where a bias comes
with a lost NaN code, and where some blocks have no scale at all."""

from __future__ import annotations

import inspecting
import numpy as np
import pytest
import torch
import world
from fault_injection import Faulty, numbers

from fpxbench.checking.nonfinite_codes import can_be_stored, check_nonfinite_codes
from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import inspect_implementation
from fpxbench.diagnosis.scale_functions import right_range
from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.formats import FORMATS
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


def inspected(implementation, scheme: str = "mxfp4", *, n: int = 32, k: int = 96):
    return inspecting.inspected(implementation, scheme, n=n, k=k, m=32, seed=1)


def of_table(table):
    return inspected(Faulty({"function": lambda stored: np.asarray(table)[stored]}))


E8M0 = np.array([2.0 ** (code - 127) for code in range(256)])
E8M0[255] = np.nan


@pytest.mark.parametrize("bias", [128, 130, 124])
def test_a_bias_of_e8m0_is_named_with_the_nan_code_that_it_makes_a_number(bias: int) -> None:
    table = np.array([2.0 ** (code - bias) for code in range(256)])
    found = of_table(table)
    assert Kind.SCALED in found.kinds
    of_scales = next(one for one in found.experiments if one.name == "scales")
    assert f"read with bias {bias}, theirs is 127" in of_scales.message
    if bias > 127:      # else 2**(255 - bias) is infinite in fp32
        assert set(found.kinds) == {Kind.SCALED, Kind.SCALE_ENDS_LOST}
        assert "the NaN code 0xff is read as a number" in found.verdict.summary


def test_a_bias_alone_claims_no_lost_code() -> None:
    found = of_table(E8M0 / 4)
    assert found.kinds == [Kind.SCALED], found.verdict.summary


@pytest.mark.parametrize("other", ["e4m3fn", "e5m2"])
def test_scales_of_another_format_are_named_though_the_code_of_1_is_its_nan(other: str) -> None:
    found = of_table(numbers(FORMATS[other]))
    assert found.kinds == [Kind.SCALE_MISREAD] and f"scale codes are read as {other}" in found.verdict.summary


def test_an_exponent_that_is_taken_for_the_scale_is_named_though_the_scale_1_multiplies_by_0() -> None:
    found = of_table(np.arange(256.0) - 127)
    assert found.kinds == [Kind.SCALE_BITS_AS_VALUE] and "code c multiplies by c - 127" in found.verdict.summary


@pytest.mark.parametrize("at_1", [0.0, np.nan, np.inf])
def test_any_function_is_recovered_whatever_1_multiplies_by(at_1: float) -> None:
    rng = np.random.default_rng(5)
    table = 2.0 ** rng.integers(-20, 20, 256)
    table[127], table[255] = at_1, np.nan
    found = of_table(table)
    assert found.kinds == [Kind.SCALE_MISREAD], found.verdict.summary
    table_of_codes = next(one for one in found.experiments if one.name == "table")
    assert table_of_codes.right is True, table_of_codes.message


class SomeUnscaled(Implementation):
    """Leaves out the scales of some columns."""

    name = "some_unscaled"

    layout = "bytes"

    def __init__(self, columns: slice) -> None:
        self.columns = columns

    def supports(self, scheme, device):
        return Support.yes()

    def matmul(self, x, weight):
        scaling = weight.scheme.scaling
        factors = scaling.spread(weight.scale_grid(), *weight.shape).clone()
        factors[:, self.columns] = 1.0 if weight.tensor_scale is None else weight.tensor_scale
        codes = weight.dequantize() / scaling.spread(weight.scale_grid(), *weight.shape)
        return (x.float() @ (codes.nan_to_num(0.0) * factors).T).to(x.dtype)


@pytest.mark.parametrize(("scheme", "columns", "words"), [
    ("mxfp4", slice(64, None), "columns 64 to 95"),
    ("e3m2-g32", slice(0, 32), "columns 0 to 31"),
    ("nvfp4", slice(80, 96), "columns 80 to 95"),
])
def test_blocks_whose_scale_is_left_out_are_named_and_located(scheme: str, columns: slice, words: str) -> None:
    found = inspected(SomeUnscaled(columns), scheme)
    assert Kind.SCALE_MISSING in found.kinds and words in found.verdict.summary, found.verdict.summary


@pytest.mark.parametrize(("scheme", "reading", "kind", "words"), [
    ("e4m3fn-row", {"specials": "none"}, Kind.NAN_CODE_LOST, "NaN in e4m3fn, is read as -480"),
    ("e5m2-row", {"specials": "none"}, Kind.NAN_CODE_LOST, "is read as -114688"),
    ("e4m3fnuz-row", {"nan_zero": True}, Kind.NAN_CODE_LOST, "is read as 0 (1 of 1"),
    ("mxfp8_e4m3fn", {"nan_zero": True}, Kind.NAN_CODE_LOST, "is read as 0"),
    ("mxfp4", {"function": lambda stored: np.where(stored == 255, 7.0, E8M0[stored])}, Kind.SCALE_ENDS_LOST,
     "the NaN code 0xff of the scale format e8m0 multiplies by 7"),
    ("nvfp4", {"function": lambda stored: np.nan_to_num(numbers(FORMATS["e4m3fn"])[stored], nan=480.0)},
     Kind.SCALE_ENDS_LOST, "the NaN code 0x7f of the scale format e4m3fn multiplies by 480"),
    ("mxfp4", {"by_shift": True}, None, ""),
    ("nvfp4", {}, None, ""),
    ("e5m2-g32", {}, None, ""),
])
def test_a_sweep_sees_codes_that_are_no_numbers(scheme: str, reading: dict, kind, words: str) -> None:
    implementation = Faulty(reading)
    case = Case(implementation="i", scheme=scheme, workload="canary.codes", m=1, n=16, k=64)
    operands = prepare(implementation, TrialRequest(case=case, seed=1))
    assert can_be_stored(operands) is None
    verdict = check_nonfinite_codes(implementation, operands)
    assert (verdict and verdict.kind) == kind, verdict
    assert kind is None or words in verdict.summary, verdict.summary


def test_codes_that_cannot_be_stored_are_not_counted_as_asked() -> None:
    for scheme, opaque, reason in (("int8-row", False, "no code that is not a number"), ("mxfp4", True, "its own")):
        implementation = Faulty(opaque=opaque)
        case = Case(implementation="i", scheme=scheme, workload="canary.codes", m=1, n=16, k=64)
        told = can_be_stored(prepare(implementation, TrialRequest(case=case, seed=1)))
        assert told is not None and reason.replace("its own", "own") in told


def test_a_table_of_another_format_is_named() -> None:
    found = inspected(Faulty({"other_format": "e5m2"}), "e4m3fn-row")
    assert found.kinds == [Kind.FORMAT_MISTAKEN] and "the table is e5m2's" in found.verdict.summary


def test_outputs_in_another_order_are_one_fault() -> None:
    for scheme in ("e4m3fn-row", "mxfp4", "e4m3fn-tensor"):
        found = inspected(Faulty({"output_roll": 16}), scheme, n=300 if scheme == "mxfp4" else 32)
        assert found.kinds == [Kind.OUTPUT_PERMUTED], found.verdict.summary
        assert "feature n is that of row" in found.verdict.summary


def test_m_on_which_weights_depend_are_stated() -> None:
    class AboveForty(Faulty):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            return y * 1.01 if x.reshape(-1, x.shape[-1]).shape[0] > 40 else y

    request = InspectRequest(subject="here", scheme="e4m3fn-row", n=32, k=96, m=64, device="cpu", seed=1)
    verdict = inspect_implementation(AboveForty(), request).verdict
    assert verdict.kind is Kind.M_DEPENDENT, verdict.summary
    assert "wrong for M = 63 to 65" in verdict.summary and "right for M = 1 to 17, 31 to 33" in verdict.summary
    assert verdict.evidence["right_m"][-1] == 33


def test_scales_that_are_right_between_lost_and_infinite_ones_pass_through_a_narrower_type() -> None:
    values = torch.exp2(torch.arange(-30, 30).double())

    def agree(seen, wanted):
        return (seen - wanted).abs() <= 2.0**-8 * wanted

    narrowed = values.half().double()
    assert right_range(values, narrowed, agree) == (6, 45)      # 2**-24 to 2**15
    assert right_range(values, values, agree) is None
    assert right_range(values, torch.where(values == 1, 3.0, narrowed), agree) is None, "one is misread in between"
    assert right_range(values, values.flip(0), agree) is None


def test_fp16_partial_sums_are_named_by_the_scales_that_they_lose_and_not_as_misread_scale_codes() -> None:
    class Fp16Sums(world.World):
        def matmul(self, x, weight):
            first, rest = ((x[..., part].float() @ self.decoded(weight)[:, part].T).half().float()
                           for part in (slice(0, 64), slice(64, None)))
            return (first + rest).half().to(x.dtype)

    request = InspectRequest(subject="here", scheme="e4m3fn-row", n=40, k=104, m=33, device="cpu", seed=3)
    found = inspect_implementation(Fp16Sums(), request)
    assert found.kinds == [Kind.SCALE_NARROWED], found.verdict.summary
    assert "pass through a narrower type" in found.verdict.summary


def test_places_are_recovered_where_the_codes_of_scales_are_used_as_numbers() -> None:
    found = inspected(Faulty({"as_integer": True, "transposed": True}))
    assert set(found.kinds) == {Kind.SCALE_BITS_AS_VALUE, Kind.SCALE_TRANSPOSED}, found.verdict.summary
    assert inspected(Faulty({"as_integer": True})).kinds == [Kind.SCALE_BITS_AS_VALUE]

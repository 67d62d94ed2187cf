"""`fpxbench inspect` recovers the maps that an implementation applies, and never names a fault that was not
injected."""

from __future__ import annotations

import pytest
import torch
from fault_injection import Faulty, numbers
from inspecting import Decoding, experiment, inspected
from torch import nn

from fpxbench.checking import correctness, inputs
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.blackbox.module_adapter import Wrapped
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_decode_table_is_recovered_code_by_code() -> None:
    found = inspected(Faulty({"bias": 1, "specials": "fnuz"}), "e4m3fn-row")
    table = experiment(found, "table")
    assert found.verdict.kind is Kind.FN_AS_FNUZ
    assert found.verdict.summary.startswith(
        "every normal code decodes to half its value: read with bias 8, the format's is 7"
    )
    entries = {one.entry[:4]: (one.definition, one.effective) for one in table.differences}
    assert entries["0x38"] == ("1", "0.5")
    assert entries["0x7f"] == ("nan", "240")
    assert entries["0x80"] == ("-0", "nan")
    assert len(entries) == 255      # all but +0


@pytest.mark.parametrize("factor", [0.5, 2.0, 0.3, -1.0])
@pytest.mark.parametrize("scheme", ["e4m3fn-row", "mxfp4"])
def test_one_factor_on_every_weight_is_neither_a_bias_nor_another_blocks_scale(scheme, factor) -> None:
    """Reading by FNUZ's bias would make NaN of 0x80 and a number of 0x7f."""
    found = inspected(Decoding(multiply=lambda x, w: (x.float() @ (w.float() * factor).T).to(x.dtype)), scheme)
    assert (found.verdict.kind, found.kinds) == (Kind.SCALED, [Kind.SCALED])
    assert found.verdict.summary.startswith(
        f"every weight is {factor:g} times its value: a product or a scale that is off by that factor"
    )
    assert experiment(found, "table").right is False
    assert experiment(found, "scales").right is None       # a code and its scale are only ever seen multiplied
    assert experiment(found, "blocks").right is True


@pytest.mark.parametrize(
    ("added", "said"),
    [
        (lambda y: torch.full_like(y, 0.0625), "the output is 0.0625 for x = 0: something is added"),
        (
            lambda y: torch.linspace(-1, 1, y.shape[1]).to(y.dtype).expand_as(y),
            "the output is -1 to 1 for x = 0: something is added",
        ),
    ],
)
def test_what_is_added_to_the_product_is_seen_where_the_product_is_zero(added, said) -> None:
    """Read out weight by weight it would look like another table and other scales."""
    def multiply(x, w):
        y = (x.float() @ w.float().T).to(x.dtype)
        return y + added(y)

    found = inspected(Decoding(multiply=multiply), "e4m3fn-row")
    assert found.verdict.status is Status.WRONG
    assert found.verdict.summary.startswith(said)
    assert [one.name for one in found.experiments] == ["zero"]


class HalfOfTheScale(nn.Module):
    """A Linear in E4M3FN whose row scales are halved after the division by them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 448
        self.decoded = ((weight / scale).to(torch.float8_e4m3fn).float() * scale / 2).to(linear.weight.dtype)

    def forward(self, x):
        return x @ self.decoded.T


def test_a_module_that_halves_its_scales_is_not_said_to_read_another_format() -> None:
    found = inspected(Wrapped(HalfOfTheScale, torch.bfloat16), "e4m3fn-row")
    assert found.verdict.kind is Kind.SCALED, found.verdict.summary


def test_half_of_every_weight_is_no_block_scale_read_as_fnuz_where_the_nan_scale_stays_nan() -> None:
    found = inspected(Decoding(multiply=lambda x, w: (x.float() @ w.float().T / 2).to(x.dtype)), "nvfp4")
    assert found.verdict.kind is Kind.SCALED


def test_what_makes_an_output_nonfinite_stands_first_in_the_table() -> None:
    found = inspected(Faulty({"bias": -1, "specials": "fn"}), "e4m3fnuz-row")
    first, second, *others = [one.entry[:4] for one in experiment(found, "table").differences]
    assert (first, second) == ("0x7f", "0xff")      # 240, and NaN in E4M3FN
    assert others == sorted(others)


def test_weights_that_hold_a_fixed_maximum_are_reported_as_not_recoverable() -> None:
    order = experiment(inspected(Faulty({"pairs": True}, opaque=True), "mxfp4", k=128), "order")
    assert order.message == (
        "120 of 128 weights of a row are made of other codes' bits (8 more hold, or are read from, the fixed maximum"
        " of a block, and cannot be recovered): each two neighbours along K are exchanged: weight k reads the code of "
        "k ^ 1"
    )


def test_a_table_that_is_another_formats_is_named() -> None:
    class ReadsE5M2(Faulty):
        def matmul(self, x, weight):
            e5m2 = torch.from_numpy(numbers(scheme_named("e5m2-row").format))
            return self.multiply(x, e5m2[weight.codes().int()] * weight.scale_grid())

    table = experiment(inspected(ReadsE5M2(), "e4m3fn-row"), "table")
    assert table.right is False
    assert "the table is e5m2's" in table.message


def test_the_scale_that_each_weight_meets_is_recovered() -> None:
    found = inspected(Faulty({"transposed": True}), "e4m3fn-g32", n=7, k=96)
    blocks = experiment(found, "blocks")
    assert found.verdict.kind is Kind.SCALE_TRANSPOSED
    assert blocks.differences[0].entry == "row 0, column 32"
    assert blocks.differences[0].definition == "block 1 of row 0"
    assert blocks.differences[0].effective == "block 1 of row 2"      # number 7 of [7, 3]


def test_the_order_of_codes_is_recovered_bit_by_bit() -> None:
    whole = experiment(inspected(Faulty({"pairs": True}), "mxfp4"), "order")
    assert whole.message.endswith("k reads the code of k ^ 1")
    parts = experiment(inspected(Faulty({"planes": True}), "e3m2-row", k=96), "order")
    assert parts.right is False
    assert parts.differences[0].effective == "bits 0-3 of 0, bits 4-5 of 72"


def test_an_order_that_no_known_fault_gives_is_still_recovered() -> None:
    class Shifted(Decoding):
        def matmul(self, x, weight):
            return self.multiply(x, weight.dequantize().roll(5, dims=1))

    found = inspected(Shifted(), "e4m3fn-tensor", k=96)
    assert found.verdict.status is Status.WRONG
    assert found.kinds == [Kind.CODE_PERMUTED]
    assert found.verdict.summary.endswith("the code of weight c is that of weight (c + 91) mod 96")
    assert experiment(found, "order").differences[10].effective == "code of row 0, weight 5"


def test_three_faults_at_once_are_told_from_each_other_or_left_open() -> None:
    found = inspected(Faulty({"flush": True, "transposed": True, "pairs": True}), "e4m3fn-g32")
    injected = {Kind.SUBNORMAL_FLUSHED, Kind.SCALE_TRANSPOSED, Kind.PLANE_SWAP}
    assert set(found.kinds) == injected or "no known fault" in found.verdict.summary


def test_a_triple_in_one_step_is_named_by_its_table() -> None:
    found = inspected(Faulty({"flush": True, "bias": 1, "specials": "fnuz", "sign_lost": True}), "e4m3fn-row")
    assert set(found.kinds) <= {Kind.FN_AS_FNUZ, Kind.SUBNORMAL_FLUSHED, Kind.SIGN_LOST, Kind.INACCURATE,
                                Kind.GIBBERISH}


# One in a million.


class OneWeight(Decoding):
    """Misreads a single weight, of a layer large enough to have it."""

    def __init__(self, row, column):
        super().__init__()
        self.at = row, column

    def matmul(self, x, weight):
        w = weight.dequantize()
        if w.shape[0] > self.at[0]:
            w[self.at] = 1.25 * w[self.at] + 2**-10
        return self.multiply(x, w)


def test_one_misread_weight_in_a_million_is_found_and_located() -> None:
    found = inspected(OneWeight(771, 502), "e4m3fn-row", m=256, n=1024, k=1024)
    assert found.verdict.status is Status.WRONG
    assert (found.weights_read, found.weights_wrong) == (1024 * 1024, 1)
    assert "1 of 1,048,576 weights read out is misread: row 771, column 502, the code 0x" in found.verdict.summary


def test_a_sweep_finds_and_locates_one_misread_weight_of_a_small_case() -> None:
    case = Case(implementation="injected", scheme="e4m3fn-row", workload="canary.ragged", m=33, n=77, k=203)
    verdict = diagnosed_trial(OneWeight(41, 138), TrialRequest(case=case, seed=1, timing_budget_s=0))
    assert verdict.status is Status.WRONG
    assert "row 41, column 138, the code 0x" in verdict.summary


def test_one_wrong_output_element_is_found_and_located() -> None:
    class OneOutput(Decoding):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            y[3, 700] += 40
            return y

    case = Case(implementation="injected", scheme="e4m3fn-row", workload="w", m=16, n=1024, k=64)
    verdict = diagnosed_trial(OneOutput(), TrialRequest(case=case, seed=1, timing_budget_s=0))
    assert verdict.status is Status.WRONG
    assert "700 of 1024" in verdict.summary or "[3, 700]" in verdict.evidence["seen"]


def test_every_weight_of_a_canary_is_read_if_there_is_time(monkeypatch) -> None:
    monkeypatch.setattr(correctness, "EVERY_WEIGHT_SECONDS", float("inf"))
    read_out = []

    class Counting(Decoding):
        def matmul(self, x, weight):
            read_out.append(x.shape[0])
            return super().matmul(x, weight)

    case = Case(implementation="injected", scheme="mxfp4", workload="canary.ragged", m=33, n=77, k=203)
    weight = inputs.make_weight(case, 1)
    stored = Counting().quantize(weight, scheme_named("mxfp4"))
    operands = Operands(case, "cpu", 1, weight, stored, stored.dequantize())
    assert correctness.check_one_hot(Counting(), operands) is None
    assert sum(read_out) >= 203


class ScalesMoved(Decoding):
    """Reads another scale than each block's own, on weights of any shape."""

    def __init__(self, move):
        super().__init__()
        self.move = move

    def matmul(self, x, weight):
        block = weight.scheme.scaling.block or weight.shape[1]
        factors = self.move(weight.scale_grid()).repeat_interleave(block, dim=1)[:, :weight.shape[1]]
        return self.multiply(x, decode_table(weight.scheme.format)[weight.codes().long()] * factors)


@pytest.mark.parametrize(("scheme", "move", "kind"), [
    ("e4m3fn-row", lambda grid: grid.roll(1, 0), Kind.BLOCK_OFF_BY_ONE),
    ("mxfp4", lambda grid: grid.roll(1, 1), Kind.BLOCK_OFF_BY_ONE),
    ("mxfp8_e4m3fn", lambda grid: grid.reshape(grid.T.shape).T, Kind.SCALE_TRANSPOSED),
])
def test_scales_from_another_place_are_named_on_weights_larger_than_the_probes(scheme, move, kind):
    found = inspected(ScalesMoved(move), scheme, n=320, k=576, m=33)
    assert found.verdict.status is Status.WRONG and found.verdict.kind is kind, found.verdict.summary

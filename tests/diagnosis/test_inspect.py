"""`fpxbench inspect` recovers the maps that an implementation applies, and never names a fault that was not
injected."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from fault_injection import Faulty, nearest, numbers, over_rows, read, store
from places import FAULTY_IMPLS as FAULTY
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from fpxbench import implementation as implementations
from fpxbench.checking import correctness, inputs
from fpxbench.checking.operands import Operands
from fpxbench.cli import app
from fpxbench.cli.common import UsageError
from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import CannotInspect, inspect, inspect_implementation
from fpxbench.diagnosis.blackbox.module_adapter import Wrapped
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial

pytestmark = pytest.mark.usefixtures("one_thread")


def inspected(implementation, scheme, *, m=33, n=40, k=104, seed=3, activation="bf16"):
    request = InspectRequest(
        subject="here", scheme=scheme, n=n, k=k, m=m, device="cpu", seed=seed, activation=activation
    )
    return inspect_implementation(implementation, request)


def experiment(inspection, name):
    return next(one for one in inspection.experiments if one.name == name)


# The injections themselves.


@pytest.mark.parametrize(
    "scheme",
    ["e4m3fn-row", "e4m3fnuz-tensor", "e5m2-g32", "e3m4-row", "mxfp6_e2m3", "mxfp4", "nvfp4", "int8-row", "e2m2-row"],
)
def test_the_injecting_reader_and_encoder_are_right_when_no_fault_is_injected(scheme) -> None:
    """They share no code with the oracle, and agree with it on every code and weight."""
    scheme = scheme_named(scheme)
    weight = torch.randn(33, 77, generator=torch.Generator().manual_seed(0))
    stored = store(weight, scheme)
    codes, scales = scheme.quantize(weight)
    right = scheme.dequantize(codes, scales)
    assert torch.equal(stored.dequantize(), right)
    assert torch.allclose(read(stored).float(), right, rtol=1e-6, atol=0)
    table = [scheme.format.value(code) for code in range(1 << scheme.format.bits)]
    assert all(a == b or math.isnan(a) and math.isnan(b) for a, b in zip(numbers(scheme.format), table, strict=True))


# What is right.


@pytest.mark.parametrize(
    ("scheme", "layout", "activation"),
    [
        ("e4m3fn-row", "bytes", "bf16"),
        ("e4m3fnuz-tensor", "planar", "fp16"),
        ("e5m2-g32", "planar", "fp16"),
        ("e3m4-row", "planar", "bf16"),
        ("mxfp8_e5m2", "planar", "bf16"),
        ("mxfp6_e2m3", "bitstream", "bf16"),
        ("mxfp4", "nibbles_high_first", "bf16"),
        ("nvfp4", "planar", "fp16"),
        ("int8-row", "planar", "bf16"),
        ("e2m2-row", "planar", "fp16"),
        ("mxfp6_e3m2", "torchao_fp6", "bf16"),
    ],
)
@pytest.mark.parametrize("opaque", [False, True])
def test_what_is_right_is_said_to_be_in_every_layout_and_where_codes_cannot_be_seen(
    scheme, layout, activation, opaque
) -> None:
    right = Faulty(opaque=True) if opaque else Decoding(layout=layout)
    found = inspected(right, scheme, activation=activation)
    assert found.verdict.status is Status.OK, found.verdict.summary
    assert found.verdict.summary.startswith("reads all 4,160 weights as the definition says")
    assert [one.right for one in found.experiments] == [True] * 4, [one.message for one in found.experiments]
    size = 1 << scheme_named(scheme).format.bits
    if not opaque:
        assert experiment(found, "table").tried == size      # NaN and infinity included


class Decoding(Faulty):
    """Multiplies by what the oracle decodes, whatever the layout."""

    def matmul(self, x, weight):
        return self.multiply(x, weight.dequantize())


ORDERS = {
    "in one": lambda x, w: (x.float() @ w.T).to(x.dtype),
    "in fp64": lambda x, w: (x.double() @ w.double().T).to(x.dtype),
    "decoded to 16 bits first": lambda x, w: x @ w.T.to(x.dtype),
    "split along K": lambda x, w: sum(
        (x[:, part].float() @ w[:, part].T for part in (slice(0, 17), slice(17, 40), slice(40, None))), torch.zeros(())
    ).to(x.dtype),
    "from the end": lambda x, w: (x.flip(1).float() @ w.flip(1).T).to(x.dtype),
    "one by one": lambda x, w: (x.float()[:, None, :] * w[None]).cumsum(dim=2)[:, :, -1].to(x.dtype),
    "in pairs": lambda x, w: ((x.float()[:, 0::2] @ w[:, 0::2].T) + (x.float()[:, 1::2] @ w[:, 1::2].T)).to(x.dtype),
}


def _false_alarms(count: int) -> list[str]:
    """Return the false alarms among correct implementations that add up in other orders, on random cases."""
    rng = torch.Generator().manual_seed(2)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    found = []
    for number in range(count):
        scheme = pick(
            "e4m3fn-row",
            "e4m3fnuz-row",
            "e5m2-g32",
            "e3m4-tensor",
            "e3m2-g32",
            "mxfp8_e4m3fn",
            "mxfp6_e2m3",
            "mxfp4",
            "nvfp4",
            "int8-row",
            "e2m2-row",
            "e2m3-g128",
        )
        order = pick(*ORDERS, "scaled after")
        case = Case(
            implementation="injected",
            scheme=scheme,
            workload="random",
            m=pick(1, 2, 7, 16, 33),
            n=pick(1, 5, 32, 77),
            k=pick(32, 50, 96, 203),
            activation=pick("bf16", "fp16"),
        )

        class Right(Decoding):
            """Adds up in one of the orders; scales the sum where there is one scale a row."""

            def matmul(self, x, weight, order=order):
                if order != "scaled after" or weight.scheme.scaling.block is not None:
                    return over_rows(ORDERS.get(order, ORDERS["in one"]))(x, weight.dequantize())
                values = torch.from_numpy(numbers(weight.scheme.format))[weight.codes().int()].float()
                y = x.float() @ values.T
                return ((y.to(x.dtype) if x.dtype == torch.bfloat16 else y) * weight.scale_grid().T).to(x.dtype)

        verdict = diagnosed_trial(Right(), TrialRequest(case=case, seed=number, timing_budget_s=0))
        if verdict.status is not Status.OK:
            found.append(f"{case.id} n={case.n} k={case.k}, {order}: {verdict.headline}: {verdict.summary}")
    return found


def test_none_of_300_correct_cases_is_found_fault_with() -> None:
    assert _false_alarms(300) == []


@pytest.mark.slow      # 1 minute
def test_none_of_1000_correct_cases_is_found_fault_with() -> None:
    assert _false_alarms(1000) == []


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_of_additions_is_not_a_fault_to_an_inspection(order) -> None:
    found = inspected(Decoding(multiply=lambda x, w: ORDERS[order](x, w.float())), "mxfp4")
    assert found.verdict.status is Status.OK, found.verdict.summary


# What is recovered.


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
    assert set(found.kinds) <= {
        Kind.FN_AS_FNUZ,
        Kind.SUBNORMAL_FLUSHED,
        Kind.SIGN_LOST,
        Kind.INACCURATE,
        Kind.GIBBERISH,
    }


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


# Modules.


class Fp8Linear(nn.Module):
    """E4M3FN with a scale a row, as a module of its own."""

    def __init__(self, linear: nn.Linear, **how) -> None:
        super().__init__()
        stored = store(linear.weight.detach().float(), scheme_named("e4m3fn-row"), "bytes", **how)
        self.weight = nn.Parameter(read(stored).to(linear.weight.dtype), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ({}, None),
        ({"rounding": "away"}, Kind.TIES_AWAY),
        ({"rounding": "zero"}, Kind.TRUNCATED),
        ({"maximum": 240}, Kind.WRONG_MAX),
        ({"flushed": True}, Kind.SUBNORMAL_FLUSHED),
        ({"positive": True}, Kind.SIGN_LOST),
    ],
)
def test_a_module_is_diagnosed_through_forward_alone(how, kind) -> None:
    found = inspected(Wrapped(lambda linear: Fp8Linear(linear, **how), torch.bfloat16), "e4m3fn-row")
    assert found.verdict.kind is kind, found.verdict.summary
    assert found.right is (kind is None)


def test_a_module_that_quantizes_nothing_is_told() -> None:
    found = inspected(Wrapped(lambda linear: linear, torch.bfloat16), "mxfp4")
    assert "nothing was quantized" in found.verdict.summary


# The command.


def test_the_command_prints_what_differs_and_exits_with_1() -> None:
    result = CliRunner().invoke(
        app,
        [
            "inspect",
            "faulty_fn_as_fnuz",
            "e4m3fn-row",
            "--impls",
            str(FAULTY),
            "--n",
            "32",
            "--k",
            "64",
            "--m",
            "16",
            "--device",
            "cpu",
            "--seed",
            "1",
        ],
    )
    assert result.exit_code == 1
    assert "fn_as_fnuz" in result.stdout
    assert "0x38 0.0111.000" not in result.stdout       # beyond the first rows
    assert "… and 239 more" in result.stdout


def test_the_command_gives_json_and_exits_with_0_for_what_is_right() -> None:
    result = CliRunner().invoke(
        app, ["inspect", "eager_upcast", "mxfp4", "--n", "32", "--k", "64", "--m", "16", "--device", "cpu", "--json"]
    )
    assert result.exit_code == 0
    assert json.loads(result.stdout)["weights_read"] == 32 * 64


def of_files(*arguments: str):
    return CliRunner().invoke(app, ["inspect", "eager_upcast", "mxfp4", "--device", "cpu", *map(str, arguments)])


@pytest.fixture
def file_of_matrices(tmp_path):
    def written(name: str, **tensors) -> str:
        save_file(tensors, tmp_path / name)
        return str(tmp_path / name)

    return written


def test_ones_own_weight_and_activations_are_inspected(file_of_matrices) -> None:
    weights = file_of_matrices("w.safetensors", up=torch.randn(48, 96), down=torch.randn(32, 64))
    x = file_of_matrices("x.safetensors", x=3 * torch.randn(5, 96))
    result = of_files("--weights", f"{weights}:up", "--activations", x, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["n"], found["k"], found["weights_read"]) == (48, 96, 48 * 96)
    assert f"{weights}:up, [48, 96]" in of_files("--weights", f"{weights}:up").stdout


def test_mistakes_in_ones_own_files_are_told_with_the_way_out(file_of_matrices) -> None:
    weights = file_of_matrices("w.safetensors", up=torch.randn(48, 96), down=torch.randn(32, 64))
    x = file_of_matrices("x.safetensors", x=torch.randn(5, 90))
    for arguments, words in [
        (("--weights", weights), "holds 2 matrices, and one is inspected: name it"),
        (("--weights", f"{weights}:up", "--activations", x), "has K = 90, and the weight 96"),
        (("--weights", f"{weights}:no"), "no matrix of floating-point numbers 'no'"),
        (("--weights", f"{weights}:up", "--n", "8"), "brings its own N and K"),
        (("--activations", x, "--k", "8"), "brings its own K"),
        (("--weights", "absent.safetensors"), "no such file"),
    ]:
        mistake = of_files(*arguments).exception
        assert isinstance(mistake, UsageError) and words in str(mistake), (arguments, mistake)


def test_a_crash_is_a_result_with_its_log() -> None:
    result = CliRunner().invoke(
        app,
        [
            "inspect",
            "faulty_segfault",
            "e4m3fn-row",
            "--impls",
            str(FAULTY),
            "--n",
            "32",
            "--k",
            "64",
            "--device",
            "cpu",
            "--json",
        ],
    )
    assert result.exit_code == 1
    verdict = json.loads(result.stdout)["verdict"]
    assert (verdict["status"], verdict["signal"]) == ("crash", "SIGSEGV")
    assert "Segmentation fault" in verdict["log_tail"]


@pytest.mark.parametrize(
    ("subject", "scheme", "words"),
    [
        ("eager_upcas", "mxfp4", "did you mean eager_upcast"),
        ("eager_upcast", "mxfp5", "did you mean mxfp4"),
        ("eager_upcast", "bf16", "stores weights as they are"),
        ("no.such.module:f", "mxfp4", "there is no module 'no'"),
        ("json:no_such", "mxfp4", "json has no function 'no_such'"),
        (
            "shutil:copy",
            "mxfp4",
            "called with a torch.nn.Linear and nothing else, and takes .*: missing a required argument: 'dst'",
        ),
    ],
)
def test_a_mistake_in_what_is_asked_for_is_one_sentence(subject, scheme, words) -> None:
    with pytest.raises(CannotInspect, match=words):
        inspect(InspectRequest(subject=subject, scheme=scheme, n=8, k=32, m=1, device="cpu", seed=1))


AUTHORS = """
from fpxbench.implementation import Implementation, Support, implementation

class Any(Implementation):
    def supports(self, scheme, device):
        return Support.yes()

@implementation("of_no_layout")
class OfNoLayout(Any):
    layout = "nybbles"

@implementation("raising")
class Raising(Any):
    def matmul(self, x, weight):
        raise KeyError("the author's")

def five(linear):
    return 5

def raising(linear):
    raise KeyError("the author's")
"""


@pytest.fixture
def authors(tmp_path, monkeypatch):
    """Return the result of inspecting something in an author's file, and what it prints."""
    (tmp_path / "authors.py").write_text(AUTHORS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "authors", raising=False)
    monkeypatch.setattr(implementations, "_registry", dict(implementations._registry))

    def of(subject):
        impls = [] if ":" in subject else ["authors.py"]
        return inspect(
            InspectRequest(subject=subject, scheme="e4m3fn-row", n=8, k=32, m=16, device="cpu", seed=1, impls=impls)
        ).verdict

    return of


@pytest.mark.parametrize("subject", ["raising", "authors:raising"])
def test_what_an_author_raises_is_shown_from_the_authors_file_on(authors, capsys, subject):
    assert authors(subject).summary.startswith("raised KeyError")
    frames = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  File ")]
    assert len(frames) == 1 and "authors.py" in frames[0]


@pytest.mark.parametrize(
    ("subject", "words"),
    [("of_no_layout", "no layout 'nybbles'"), ("authors:five", "the factory returned int, not a torch.nn.Module")],
)
def test_what_this_package_refuses_of_an_author_is_one_sentence_without_a_traceback(authors, capsys, subject, words):
    assert words in authors(subject).summary
    assert capsys.readouterr().err == ""


def test_a_file_that_could_not_be_loaded_is_named_whatever_is_inspected(tmp_path) -> None:
    (tmp_path / "broken.py").write_text("def (:\n")
    found = inspect(
        InspectRequest(
            subject="eager_upcast", scheme="mxfp4", n=8, k=32, m=16, device="cpu", seed=1, impls=[str(tmp_path)]
        )
    )
    assert (
        found.right
        and len(found.not_loaded) == 1
        and "broken.py could not be loaded: SyntaxError" in found.not_loaded[0]
    )


def test_a_factory_is_found_in_the_current_folder(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_modules.py").write_text("def same(linear):\n    return linear\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = inspect(
        InspectRequest(subject="my_modules:same", scheme="e4m3fn-row", n=8, k=32, m=16, device="cpu", seed=1)
    )
    assert found.verdict.status is Status.WRONG


def test_nearest_rounds_ties_to_the_even_code() -> None:
    fmt = scheme_named("mxfp4").format
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).double().numpy()
    assert nearest(midpoints, fmt).tolist() == [0, 2, 2, 4, 4, 6, 6]

"""`fpxbench run --checkpoint` measures a model's own layers with its own codes; --weights and --activations too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from commands import command
from safetensors.torch import save_file

import fpxbench
from fpxbench.checkpoint.dialect_conversion import in_dialect
from fpxbench.checkpoint.dialects import DIALECTS
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.record import Record
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.repro_script import repro_script
from fpxbench.sweep.selection import make_plan
from fpxbench.sweep.settings import Settings
from fpxbench.sweep.trial import prepare, run_trial

pytestmark = pytest.mark.usefixtures("one_thread")

IMPLS = '''
import torch
from fpxbench.implementation import Implementation, Support, implementation

class Reads(Implementation):
    def supports(self, scheme, device):
        return Support.yes()

@implementation("reads_bytes")
class ReadsBytes(Reads):
    """Decodes by the oracle."""
    layout = "bytes"

    def matmul(self, x, weight):
        assert weight.layout == "bytes"
        return (x.float() @ weight.dequantize().T).to(x.dtype)

@implementation("forgets_scales")
class ForgetsScales(Reads):
    """Multiplies by the codes' numbers alone."""

    def matmul(self, x, weight):
        from fpxbench.numbers.tensor_codec import decode
        return (x.float() @ decode(weight.codes(), weight.scheme.format).T).to(x.dtype)

@implementation("own_way")
class OwnWay(ReadsBytes):
    """Quantizes for itself."""

    def quantize(self, weight, scheme):
        return super().quantize(weight, scheme)
'''
N, K = 64, 256


@pytest.fixture(scope="module")
def impls(tmp_path_factory):
    file = tmp_path_factory.mktemp("impls") / "file_cases_stub.py"
    file.write_text(IMPLS)
    return file


@pytest.fixture
def model(tmp_path):
    """Return two layers of FP8 and one of NVFP4, and their weights."""
    weights = {f"model.layers.{number}.mlp.down_proj": torch.randn(N, K) * 0.02 for number in range(3)}
    tensors = {}
    for (name, weight), (dialect, scheme) in zip(
        weights.items(), [("quark-fp8", "e4m3fn-row")] * 2 + [("modelopt-nvfp4", "nvfp4")], strict=True
    ):
        scheme = scheme_named(scheme)
        tensors |= in_dialect(name, QuantizedWeight.from_codes(*scheme.quantize(weight), scheme), DIALECTS[dialect])
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    return file


def plan(impls, *names, **settings):
    return make_plan(Settings(device="cpu", impls=(impls,), implementation=names or ("reads_bytes",), **settings)).cases


def request(planned, impls):
    return TrialRequest(case=planned.case, weight=planned.weight, activations=planned.activations, seed=1,
                        impls=[str(impls)], timing_budget_s=0)


def test_a_layer_of_each_scheme_and_shape_is_measured_unless_layers_are_named(model, impls):
    schemes = [(each.case.scheme, each.case.n, each.case.k, each.case.m) for each in plan(impls, checkpoint=model)]
    assert schemes == [("e4m3fn-row", N, K, 1), ("e4m3fn-row", N, K, 16), ("nvfp4", N, K, 1), ("nvfp4", N, K, 16)]
    chosen = plan(impls, checkpoint=model, layer=("*.1.mlp*",), workload=("*down_proj*/m33",))
    assert [each.weight.name for each in chosen] == ["model.layers.1.mlp.down_proj"]
    assert chosen[0].case.m == 33 and chosen[0].case.workload.startswith("checkpoint.model.layers.1.mlp.down_proj.")


def test_what_is_multiplied_are_the_files_codes_in_the_implementations_layout(model, impls):
    from fpxbench.implementation import discover, find

    for planned in plan(impls, "reads_bytes", "eager_upcast", checkpoint=model):
        implementation = find(planned.case.implementation, discover([impls])[0])()
        operands = prepare(implementation, request(planned, impls))
        assert operands.weight.layout == implementation.layout
        assert torch.equal(operands.decoded, fpxbench.load_checkpoint(model)[planned.weight.name].dequantize())
        assert run_trial(request(planned, impls)).verdict.status is Status.OK


def test_a_fault_on_a_files_codes_is_found_and_named(model, impls):
    planned = plan(impls, "forgets_scales", checkpoint=model)[0]
    assert run_trial(request(planned, impls)).verdict.kind == "scale_missing"


def test_an_implementation_that_quantizes_its_own_way_is_refused_with_a_sentence(model, impls):
    for planned in plan(impls, "own_way", checkpoint=model):
        assert planned.refused.startswith("own_way quantizes weights its own way, so it cannot multiply")


def test_the_same_layer_name_in_another_checkpoint_is_another_workload(model, impls, tmp_path):
    before = plan(impls, checkpoint=model, layer=("*.0.*",))[0].case
    tensors = {"model.layers.0.mlp.down_proj.weight": torch.zeros(N, K, dtype=torch.uint8).view(torch.float8_e4m3fn),
               "model.layers.0.mlp.down_proj.weight_scale": torch.ones(N, 1)}
    save_file(tensors, tmp_path / "other.safetensors")
    after = plan(impls, checkpoint=tmp_path / "other.safetensors")[0].case
    assert (before.scheme, before.workload[:-7]) == (after.scheme, after.workload[:-7])
    assert before.workload != after.workload


def test_a_layer_with_a_nan_is_said_to_be_the_files_fault(model, impls, tmp_path):
    codes = torch.full((N, K), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    save_file({"l.weight": codes, "l.weight_scale": torch.ones(N, 1)}, tmp_path / "nan.safetensors")
    planned = plan(impls, checkpoint=tmp_path / "nan.safetensors")[0]
    verdict = run_trial(request(planned, impls)).verdict
    assert verdict.status is Status.UNSUPPORTED and f"{N * K} of {N * K} weights decode to NaN" in verdict.summary


def test_own_weights_are_quantized_and_own_activations_multiplied(impls, tmp_path):
    weight, rows = torch.randn(N, K) + 3, torch.randn(5, 7, K).bfloat16()
    save_file({"l.weight": weight, "x": rows}, tmp_path / "own.safetensors")
    given = {"weights": f"{tmp_path}/own.safetensors:l.*", "activations": f"{tmp_path}/own.safetensors:x"}
    first, *rest = plan(impls, scheme=("mxfp4", "e4m3fn-row"), **given)
    assert {each.case.scheme for each in [first, *rest]} == {"mxfp4", "e4m3fn-row"}
    assert first.case.workload.startswith("own.l.")
    from fpxbench.implementation import discover

    operands = prepare(discover([impls])[0]["reads_bytes"](), request(rest[0], impls))
    assert torch.equal(operands.original, weight)
    drawn = operands.activation(0)
    assert drawn.shape == (rest[0].case.m, K) and not torch.equal(drawn, operands.activation(1))
    known = torch.cat([rows.reshape(-1, K), -rows.reshape(-1, K)])
    assert all((known == row).all(dim=1).any() for row in drawn)
    assert run_trial(request(rest[0], impls)).verdict.status is Status.OK


@pytest.mark.parametrize(("settings", "message"), [
    ({"layer": ("*.up_proj",)}, "no quantized layer '\\*.up_proj'"),
    ({"scheme": ("mxfp4",)}, "measured in their own schemes"),
    ({"weights": "other"}, "give one of them"),
    ({"workload": ("llama*",)}, "no workload 'llama\\*' in this file"),
    ({"activations": "the model"}, "activations are one tensor"),
])
def test_settings_that_select_nothing_are_refused_with_the_way_out(model, impls, settings, message):
    if "activations" in settings:
        settings = {"activations": str(model)}
    with pytest.raises(CheckpointError, match=message):
        plan(impls, checkpoint=model, **settings)


def test_a_layer_without_a_checkpoint_and_a_listed_case_of_a_file_are_refused(model, impls, tmp_path):
    with pytest.raises(ValueError, match="give --checkpoint PATH too"):
        plan(impls, layer=("*",))
    case = plan(impls, checkpoint=model)[0].case
    (tmp_path / "cases.jsonl").write_text(case.model_dump_json())
    listed, = plan(impls, cases=tmp_path / "cases.jsonl")
    assert "give it with --checkpoint or --weights" in listed.refused


def test_load_checkpoint_reads_a_layer_when_it_is_looked_up(model, tmp_path):
    loaded = fpxbench.load_checkpoint(model)
    assert list(loaded) == [f"model.layers.{number}.mlp.down_proj" for number in range(3)] and loaded.problems == []
    assert loaded["model.layers.2.mlp.down_proj"].scheme.name == "nvfp4"
    experts = {"m.w_blocks": torch.zeros(2, 8, 1, 16, dtype=torch.uint8),
               "m.w_scales": torch.full((2, 8, 1), 127, dtype=torch.uint8)}
    save_file(experts, tmp_path / "experts.safetensors")
    assert list(fpxbench.load_checkpoint(tmp_path / "experts.safetensors")) == ["m.w[0]", "m.w[1]"]


def test_the_command_writes_records_whose_script_says_how_to_measure_again(model, impls, tmp_path):
    results = tmp_path / "results"
    run = command("run --layer *.2.* -i reads_bytes -w */m1 --device cpu --no-timing --checkpoint", model,
                  "--impls", impls, "--results", results)
    assert run.exit_code == 0, run.output
    file, = results.glob("*/records/*.jsonl")
    record = Record.model_validate(json.loads(file.read_text()))
    assert record.verdict.status is Status.OK and record.case.scheme == "nvfp4"
    done = subprocess.run([sys.executable, "-c", repro_script(record)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "fpxbench run --fresh --seed" in done.stderr and "--checkpoint PATH" in done.stderr


@pytest.fixture
def experts(tmp_path):
    """Return a folder with a layer of 3 experts as gpt-oss stores them; its config sends each token to two."""
    scheme = scheme_named("mxfp4")
    stored = [QuantizedWeight.from_codes(*scheme.quantize(torch.randn(N, K) * 0.02), scheme) for _ in range(3)]
    parts = [in_dialect("m.up_proj", weight, DIALECTS["gpt-oss"]) for weight in stored]
    save_file({name: torch.stack([part[name] for part in parts]) for name in parts[0]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(
        {"quantization_config": {"quant_method": "mxfp4"}, "experts_per_token": 2}))
    return tmp_path


def test_experts_of_a_layer_are_one_grouped_product_of_the_files_codes(experts, impls):
    one, sixteen = plan(impls, checkpoint=experts)
    assert [(each.case.experts, each.case.experts_per_token, each.case.m) for each in (one, sixteen)] == [
        (3, 2, 1), (3, 2, 16)]
    from fpxbench.implementation import discover

    operands = prepare(discover([impls])[0]["reads_bytes"](), request(sixteen, impls))
    loaded = fpxbench.load_checkpoint(experts)
    for expert in range(3):
        assert torch.equal(operands.weight.experts[expert].dequantize(), loaded[f"m.up_proj[{expert}]"].dequantize())
        assert torch.equal(operands.original_of(expert), loaded[f"m.up_proj[{expert}]"].dequantize())
    assert run_trial(request(sixteen, impls)).verdict.status is Status.OK
    faulty, = plan(impls, "forgets_scales", checkpoint=experts, workload=("*/m16",))
    assert run_trial(request(faulty, impls)).verdict.kind == "scale_missing"


def test_activations_of_a_file_are_refused_for_experts(experts, impls):
    save_file({"x": torch.randn(8, K)}, experts.parent / "x.safetensors")
    with pytest.raises(CheckpointError, match="the rows of experts are random"):
        plan(impls, checkpoint=experts, activations=f"{experts.parent}/x.safetensors:x")
    (experts.parent / "x.safetensors").unlink()

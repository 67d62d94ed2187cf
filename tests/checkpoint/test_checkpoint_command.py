"""`fpxbench checkpoint` says what a file holds, which convention it follows, and what is wrong with it."""

import json
import re
from functools import cache

import pytest
import torch
from commands import command
from safetensors.torch import load_file, save_file

from fpxbench.checkpoint.checkpoint_folder import open_checkpoint
from fpxbench.checkpoint.conventions import tiled_order
from fpxbench.checkpoint.dialect_conversion import in_dialect
from fpxbench.checkpoint.dialects import DIALECTS
from fpxbench.checkpoint.layer_examination import CheckpointRequest, examine
from fpxbench.checkpoint.layers import quantized_layers
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weights import read_weight
from fpxbench.checkpoint.writing import WriteRequest, write
from fpxbench.cli.common import UsageError
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode, encode
from fpxbench.numbers.weight import QuantizedWeight

N, K, LAYERS = 256, 512, 4
SCHEMES = {
    "ct-fp8": "e4m3fn-row.bf16",
    "ct-nvfp4": "nvfp4.div",
    "ct-mxfp4": "mxfp4",
    "ct-mxfp8": "mxfp8_e4m3fn",
    "modelopt-fp8": "e4m3fn-tensor",
    "modelopt-nvfp4": "nvfp4",
    "modelopt-mxfp4": "mxfp4.rceil",
    "modelopt-int8": "int8-row",
    "quark-mxfp6_e3m2": "mxfp6_e3m2",
    "quark-fp8": "e4m3fn-row",
    "gpt-oss": "mxfp4",
    "deepseek-v3": "e4m3fn-b128x128",
    "deepseek-v4": "mxfp4.rceil",
    "torchao": "e4m3fn-row",
    "bnb-nf4": "nf4-g64",
    "bnb-fp4": "bnbfp4-g64",
}


@cache
def originals():
    """Return weights as a model has them: input channels of different size, the same for all layers that read them."""
    generator = torch.Generator().manual_seed(0)
    channels = torch.exp(0.5 * torch.randn(K, generator=generator))
    rows = [torch.exp(0.3 * torch.randn(N, 1, generator=generator)) for _ in range(LAYERS + 1)]
    return [0.02 * torch.randn(N, K, generator=generator) * channels * row for row in rows]


def model(dialect, scheme=None):
    """Return the tensors of a small checkpoint in a dialect, with one unquantized layer."""
    *weights, plain = originals()
    tensors = {"model.layers.0.self_attn.q_proj.weight": plain.bfloat16()}
    for number, weight in enumerate(weights):
        scheme = scheme_named(scheme if isinstance(scheme, str) else scheme.name if scheme else SCHEMES[dialect])
        codes, scales = scheme.quantize(weight)
        stored = QuantizedWeight.from_codes(codes, scales, scheme, "bytes")
        tensors |= in_dialect(f"model.layers.{number}.mlp.up_proj", stored, DIALECTS[dialect])
    return tensors


def written(tmp_path, tensors, method=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": method}} if method else {})
    )
    return tmp_path


def method_of(dialect):
    return min(DIALECTS[dialect].methods)


def wrong(report):
    """Return what a report finds wrong: problems, and conventions that the numbers contradict."""
    return [
        *report.problems,
        *(problem for layer in report.layers for problem in layer.problems),
        *(
            f"{found.convention}: {found.fits_better}"
            for layer in report.layers
            for found in layer.evidence
            if found.fits_better
        ),
    ]


@pytest.mark.parametrize("dialect", SCHEMES)
def test_a_right_checkpoint_has_no_problem_in_any_dialect(tmp_path, dialect):
    report = examine(CheckpointRequest(path=str(written(tmp_path, model(dialect), method_of(dialect))), deep=True))
    assert wrong(report) == []
    assert {layer.scheme for layer in report.layers} == {SCHEMES[dialect].removesuffix(".rceil")}
    assert len(report.layers) == report.read == LAYERS and report.plain == {"BF16": 2 * N * K}
    for layer in report.layers:
        assert sum(layer.histogram) == N * K


def each(tensors, suffix, change):
    return {name: change(tensor) if name.endswith(suffix) else tensor for name, tensor in tensors.items()}


def swapped(tensor):
    return (tensor << 4) | (tensor >> 4)


def swizzled(tensor):
    flat = torch.empty(tensor.numel(), dtype=torch.uint8)
    flat[tiled_order(*tensor.shape).reshape(-1)] = tensor.view(torch.uint8).reshape(-1)
    return flat.reshape(tensor.shape).view(tensor.dtype)


def as_fnuz(tensor):
    """Return the codes that an FNUZ quantizer writes, whose largest number is 240, under FN's dtype."""
    values = decode(tensor.view(torch.uint8), FORMATS["e4m3fn"]) * (240 / 448)
    return encode(values, FORMATS["e4m3fnuz"]).view(torch.float8_e4m3fn)


def as_e5m2(tensor):
    values = decode(tensor.view(torch.uint8), FORMATS["e4m3fn"]) * (57344 / 448)
    return encode(values, FORMATS["e5m2"]).view(torch.float8_e4m3fn)


def blank_from(row):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(torch.uint8)[row:] = 0
        return tensor
    return change


def first_element(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(torch.uint8 if tensor.element_size() == 1 else tensor.dtype).reshape(-1)[0] = value
        return tensor
    return change


FAULTS = {
    "nibbles swapped": ("modelopt-nvfp4", ".weight", swapped, "the nibble order: nibbles_high_first"),
    "nibbles swapped, bitsandbytes": ("bnb-nf4", ".weight", swapped, "the nibble order: nibbles_low_first"),
    "other numbers in the table": (
        "bnb-nf4", ".quant_map", lambda t: -t, "its table holds 1 for code 0, but nf4 has -1 (15 codes differ)"),
    "a description of another size": (
        "bnb-nf4", "bitsandbytes__nf4", lambda t: torch.tensor(
            list(bytes(t.tolist()).replace(b"[256, 512]", b"[256, 500]")), dtype=torch.uint8),
        "bytes of codes and 2048 scales, where [256, 500] in blocks of 64"),
    "nibbles swapped, packed": ("ct-mxfp4", ".weight_packed", swapped, "the nibble order: nibbles_high_first"),
    "scales swizzled": ("modelopt-nvfp4", ".weight_scale", swizzled, "the order of the scales: 128 x 4 tiles"),
    "scales swizzled, mx": ("ct-mxfp8", ".weight_scale", swizzled, "the order of the scales: 128 x 4 tiles"),
    "global scale inverted": ("modelopt-nvfp4", ".weight_scale_2", torch.reciprocal, "the global scale: divides"),
    "global scale not inverted": ("ct-nvfp4", ".weight_global_scale", torch.reciprocal, "the global scale: multiplies"),
    "scales inverted, bitsandbytes": ("bnb-nf4", ".absmax", torch.reciprocal, "the scale: divides"),
    "scales squared": ("quark-fp8", ".weight_scale", torch.square, "the size of the scales: another"),
    "signs dropped": ("ct-mxfp4", ".weight_packed", lambda t: t & 0x77, "codes is negative: the sign is lost"),
    "an offset": ("modelopt-int8", ".weight", lambda t: (t.view(torch.uint8) ^ 0x80).view(torch.int8),
                  "of the codes are larger than half of int8's largest"),
    "rows that were never written": ("deepseek-v3", ".weight", blank_from(200),
                                     "rows 200 to 255 of 256 hold only the byte"),
    "E5M2 codes in an E4M3 file": ("quark-fp8", ".weight", as_e5m2, "the exponent of the format: 5 bits"),
    "scales inverted": ("deepseek-v3", ".weight_scale_inv", torch.reciprocal, "the scale: divides"),
    "FNUZ codes in an FN file": ("quark-fp8", ".weight", as_fnuz, "the format: e4m3fnuz"),
    "a NaN code": ("quark-fp8", ".weight", first_element(0x7F), "1 codes are NaN or infinity in e4m3fn: 0x7f (1)"),
    "a NaN scale": ("ct-mxfp4", ".weight_scale", first_element(0xFF), "1 of 4096 scales are NaN or infinite"),
    "a negative scale": ("deepseek-v3", ".weight_scale_inv", first_element(-1.0), "1 of 8 scales are negative"),
    "a zero scale over weights": ("modelopt-nvfp4", ".weight_scale", first_element(0),
                                  "scales are zero over weights that are not"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_named(tmp_path, fault):
    dialect, suffix, change, says = FAULTS[fault]
    tensors = model(dialect)
    tensors |= each({name: tensor for name, tensor in tensors.items() if "up_proj" in name}, suffix, change)
    found = wrong(examine(CheckpointRequest(path=str(written(tmp_path, tensors, method_of(dialect))), deep=True)))
    assert any(says in problem for problem in found), found
    # A file of NaN codes is both: what they are, and what they would be in the other format.
    assert len(
        {"NaN" in problem for problem in found}
        if "FNUZ" in fault
        else {re.sub(r"\d+%?", "N", problem.split(": ", 1)[-1]) for problem in found}
    ) == (2 if "FNUZ" in fault else 1), found


@pytest.mark.parametrize("rounding", ["mxfp4", "mxfp4.ceil", "mxfp4.even", "mxfp4.rceil"])
def test_the_quantizers_rounding_of_scales_is_told_from_the_codes(tmp_path, rounding):
    report = examine(CheckpointRequest(path=str(written(tmp_path, model("gpt-oss", rounding), "mxfp4")), deep=True))
    assert wrong(report) == []
    said = {
        found.read_as
        for layer in report.layers
        for found in layer.evidence
        if found.convention == "the scales' rounding"
    }
    assert said == {rounding.replace("mxfp4", "mx")}


def test_layers_without_a_common_structure_give_no_alarm_about_the_nibble_order(tmp_path):
    """As in MiniLM, where a layer of another kind reads as many inputs, but not the same ones."""
    generator = torch.Generator().manual_seed(1)
    scheme = scheme_named("mxfp4")
    tensors = {f"plain.{number}.weight": 0.02 * torch.randn(64, 256, generator=generator) for number in range(3)}
    for number in range(64):
        codes, scales = scheme.quantize(0.02 * torch.randn(64, 256, generator=generator))
        tensors |= in_dialect(f"model.layers.{number}.mlp.up_proj", QuantizedWeight.from_codes(codes, scales, scheme),
                              DIALECTS["modelopt-mxfp4"])
    report = examine(CheckpointRequest(path=str(written(tmp_path, tensors, "quark")), deep=True))
    assert wrong(report) == []
    told = [found.sureness for layer in report.layers for found in layer.evidence
            if found.convention == "the nibble order"]
    assert len(told) == 64 and 0.2 < sum(sureness < 0.75 for sureness in told) / 64 < 0.8


def test_a_layer_of_zeros_is_a_problem_and_no_evidence_of_a_convention(tmp_path):
    tensors = each(model("quark-fp8"), "up_proj.weight", lambda codes: torch.zeros_like(codes.view(torch.uint8)).view(
        codes.dtype))
    report = examine(CheckpointRequest(path=str(written(tmp_path, tensors, "quark")), deep=True))
    assert wrong(report) == [f"model.layers.{number}.mlp.up_proj: every code is zero" for number in range(LAYERS)]


def test_a_missing_and_a_stray_scale_are_problems(tmp_path):
    tensors = model("quark-fp8")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    tensors["model.layers.9.mlp.up_proj.weight_scale"] = torch.ones(4)
    report = examine(CheckpointRequest(path=str(written(tmp_path, tensors, "quark"))))
    assert "model.layers.1.mlp.up_proj.weight holds F8_E4M3 but has no scale" in report.problems
    assert "model.layers.9.mlp.up_proj.weight_scale is a scale without codes" in report.problems
    assert len(report.layers) == LAYERS - 1


def test_codes_of_no_dialect_beside_a_scale_are_said_to_be_that(tmp_path):
    tensors = model("quark-fp8")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].view(torch.uint8)
    report = examine(CheckpointRequest(path=str(written(tmp_path, tensors, "quark"))))
    about = [problem for problem in report.problems if problem.startswith(name + " ")]
    assert len(about) == 1 and "U8" in about[0] and about[0].endswith("codes of no supported dialect")


@pytest.mark.parametrize("shape", [(0, 128), (64, 0)])
def test_a_layer_without_elements_is_a_problem_of_its_own(tmp_path, shape):
    tensors = model("quark-fp8")
    name = "model.layers.1.mlp.up_proj"
    codes = tensors[f"{name}.weight"]
    tensors[f"{name}.weight"] = torch.empty(shape, dtype=codes.dtype)
    for deep in (False, True):
        report = examine(CheckpointRequest(path=str(written(tmp_path, tensors, "quark")), deep=deep))
        assert f"{name}: has no elements: {list(shape)}" in wrong(report)


@pytest.mark.parametrize(("output", "message"), [
    ("nowhere/out.safetensors", "there is no folder"), (".", "is a folder")])
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_decoded(tmp_path, output, message):
    written(tmp_path, model("quark-fp8"), "quark")
    run = command("checkpoint --dequantize -o", tmp_path / output, tmp_path)
    assert isinstance(run.exception, UsageError) and message in str(run.exception)


@pytest.mark.parametrize("dialect", ["ct-mxfp4", "modelopt-mxfp4", "gpt-oss", "deepseek-v4"])
def test_packed_codes_without_their_scale_are_a_problem(tmp_path, dialect):
    tensors, layer = model(dialect), "model.layers.1.mlp.up_proj"
    del tensors[layer + DIALECTS[dialect].scales]
    report = examine(CheckpointRequest(path=str(written(tmp_path, tensors, method_of(dialect)))))
    assert [problem for problem in report.problems if problem.startswith(layer + DIALECTS[dialect].codes)
            and problem.endswith("but has no scale")]


def test_fused_layers_with_different_global_scales_are_a_problem(tmp_path):
    tensors = model("modelopt-nvfp4")
    tensors |= {
        name.replace("up_proj", "gate_proj"): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.0.mlp" in name
    }
    tensors["model.layers.0.mlp.gate_proj.weight_scale_2"] = tensors["model.layers.0.mlp.up_proj.weight_scale_2"] * 1.5
    report = examine(CheckpointRequest(path=str(written(tmp_path, tensors, "modelopt"))))
    assert any(
        "model.layers.0.mlp: global scales of layers that are fused differ" in problem for problem in report.problems
    )


def test_against_the_original_the_worst_layers_come_first_with_the_quantizer_that_explains_them(tmp_path):
    (tmp_path / "original").mkdir()
    *weights, _ = originals()
    save_file({f"model.layers.{number}.mlp.up_proj.weight": weight for number, weight in enumerate(weights)},
              tmp_path / "original" / "model.safetensors")
    tensors = model("modelopt-mxfp4")
    spoilt = "model.layers.2.mlp.up_proj.weight"
    tensors[spoilt] = tensors[spoilt].flip(0)
    path = str(written(tmp_path, tensors, "quark"))
    report = examine(CheckpointRequest(path=path, against=str(tmp_path / "original")))
    assert report.layers[0].name == "model.layers.2.mlp.up_proj" and report.layers[0].sqnr_db < 0
    assert report.layers[0].explained_by == ""
    for layer in report.layers[1:]:
        assert (
            16 < layer.sqnr_db < 20 and layer.explained_by == "mxfp4.rceil: 100.00% of the codes, 100.00% of the scales"
        )


@pytest.mark.parametrize(("source", "target"), [
    ("modelopt-mxfp4", "ct-mxfp4"), ("ct-mxfp4", "gpt-oss"), ("gpt-oss", "deepseek-v4"), ("quark-fp8", "torchao"),
    ("deepseek-v3", "deepseek-v3"), ("modelopt-fp8", "ct-fp8"),
    ("quark-fp8", "modelopt"), ("ct-mxfp4", "modelopt"),
])
def test_a_conversion_keeps_every_code_and_scale(tmp_path, source, target):
    folder = written(tmp_path, model(source))
    done = write(WriteRequest(path=str(folder), dialect=target, output=str(tmp_path / "out.safetensors")))
    assert (done.written, done.refusals) == (LAYERS, [])
    before = quantized_layers(open_checkpoint(folder))
    after = quantized_layers(open_checkpoint(tmp_path / "out.safetensors"))
    for one, other in zip(before, after, strict=True):
        assert torch.equal(read_weight(one).dequantize(), read_weight(other).dequantize())


def test_what_a_dialect_cannot_hold_exactly_is_refused_and_nearest_is_asked_for(tmp_path):
    folder = written(tmp_path, model("modelopt-nvfp4"))
    request = WriteRequest(path=str(folder), dialect="ct-nvfp4", output=str(tmp_path / "out.safetensors"))
    refusals = write(request).refusals
    assert refusals and all("stores the reciprocal" in refusal and "--nearest" in refusal for refusal in refusals)
    assert write(request.model_copy(update={"nearest": True})).written == LAYERS
    after = quantized_layers(open_checkpoint(tmp_path / "out.safetensors"))
    for one, other in zip(quantized_layers(open_checkpoint(folder)), after, strict=True):
        torch.testing.assert_close(read_weight(one).dequantize(), read_weight(other).dequantize(), rtol=3e-7, atol=0)
    assert "holds e4m3fn" in write(request.model_copy(update={"dialect": "quark-fp8"})).refusals[0]
    with pytest.raises(CheckpointError, match="no dialect 'onnx'"):
        write(request.model_copy(update={"dialect": "onnx"}))


def test_the_command_prints_a_table_the_evidence_and_what_was_not_read(tmp_path):
    run = command("checkpoint", written(tmp_path, model("modelopt-nvfp4"), "modelopt"))
    assert run.exit_code == 0, run.output
    assert "modelopt-nvfp4" in run.output and "4 × [256, 512]" in run.output and "4.50" in run.output
    assert "✓ the nibble order: nibbles_low_first" in run.output
    assert "Codes of 4 of 4 layers read" in run.output
    broken = model("modelopt-nvfp4") | {"x.weight_scale": torch.ones(4)}
    run = command("checkpoint --json", written(tmp_path, broken, "modelopt"))
    assert run.exit_code == 1 and json.loads(run.output)["problems"] == [
        "x.weight_scale is a scale without codes"
    ]
    run = command("checkpoint --layer *.2.* --dequantize -o", tmp_path / "out.safetensors", tmp_path)
    assert run.exit_code == 0 and set(load_file(tmp_path / "out.safetensors")) == {"model.layers.2.mlp.up_proj.weight"}


def test_a_reading_that_the_numbers_lean_against_is_not_shown_as_right(tmp_path):
    """They lean to the other one, but by less than a finding takes: neither a tick nor a cross."""
    tensors = model("bnb-nf4")
    tensors = each(tensors, "up_proj.weight.absmax", lambda scales: scales.reciprocal() * 0.2)
    report = examine(CheckpointRequest(path=str(written(tmp_path, tensors, "bitsandbytes"))))
    leaning = [found for layer in report.layers for found in layer.evidence if found.convention == "the scale"]
    assert {(found.fits_better, found.leans_to) for found in leaning} == {("", "divides")}
    run = command("checkpoint", tmp_path)
    line, = [line for line in " ".join(run.output.split()).replace(" · ", "\n· ").splitlines() if "the scale:" in line]
    assert line.startswith("· the scale: multiplies, though divides fits better, but not significantly")


def test_the_page_has_findings_first_a_bar_for_each_code_and_only_escaped_names(tmp_path):
    hostile = "<script>alert(1)</script>"
    tensors = {name.replace("layers.3", hostile): tensor for name, tensor in model("quark-fp8").items()}
    broken = "model.layers.1.mlp.up_proj.weight"
    tensors[broken] = first_element(0x7F)(tensors[broken])
    folder = written(tmp_path, tensors, "quark")
    run = command("checkpoint --deep", folder, "--html", tmp_path / "page")
    assert run.exit_code == 1, run.output
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert (tmp_path / "page" / "assets" / "style.css").exists()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    layers = re.findall(r"<tr>\n<td>(model\S+)</td>", page)
    assert layers[0] == "model.layers.1.mlp.up_proj" and len(layers) == LAYERS
    report = examine(CheckpointRequest(path=str(folder), deep=True))
    codes = sum(count > 0 for layer in report.layers for count in layer.histogram)
    assert page.count("<rect") == codes
    assert page.count('fill="#c22"') == 1 and "0x7f = nan: 1" in page

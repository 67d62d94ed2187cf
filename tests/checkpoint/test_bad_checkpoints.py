"""At the command line, whatever is wrong with a checkpoint is one sentence, and the rest is still shown."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
import torch
from commands import command
from safetensors.torch import save_file

from fpxbench.checkpoint.dialect_conversion import in_dialect
from fpxbench.checkpoint.dialects import DIALECTS
from fpxbench.cli.common import UsageError
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scheme import scheme_named

pytestmark = pytest.mark.usefixtures("one_thread", "few_targets")

GOOD, LAYER = "nvfp4", "model.layers.0.mlp.up_proj"


def tensors(layer=LAYER, dialect="modelopt-nvfp4", scheme="nvfp4"):
    weight = 0.02 * torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    return in_dialect(layer, quantize(weight, scheme_named(scheme), "bytes"), DIALECTS[dialect])


def folder(tmp_path, found=None, method="modelopt"):
    save_file({name: tensor.contiguous() for name, tensor in (found or tensors()).items()},
              tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    return tmp_path


def raw(path, header, content=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


def shown(path, *options):
    return said_by("checkpoint", path, *options)


def said_by(*arguments):
    """Return what a command prints, on one line, and its exit status."""
    run = command(*arguments)
    if isinstance(run.exception, UsageError | ValueError):      # `main` prints it and exits with status 2
        return str(run.exception), 2
    assert isinstance(run.exception, SystemExit | None) and "Traceback" not in run.output, run.output
    return " ".join(run.output.split()), run.exit_code


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def truncated(path):
    save_file({"model.norm.weight": torch.ones(8), "x": torch.zeros(1000)}, path / "whole")
    (path / "other.safetensors").write_bytes((path / "whole").read_bytes()[:-1000])


def of_petabytes(path):
    (path / "other.safetensors").write_bytes((1 << 52).to_bytes(8, "little") + b"{}")


def overlapping(path):
    raw(path / "other.safetensors", {"x": entry("F32", (4,), 0, 16), "y": entry("F32", (4,), 8, 24)}, bytes(24))


def many_tensors(path, count):
    header = ",".join(f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(count))
    raw(path / "other.safetensors", f"{{{header}}}".encode(), bytes(count))


def a_link(path):
    outside = path.parent / f"{path.name}-outside.safetensors"
    save_file({"x": torch.zeros(4)}, outside)
    os.symlink(outside, path / "other.safetensors")


def unknown_gguf_types(path):
    name = b"blk.0.ffn_up.weight"
    described = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 32, 4, 250, 0)
    (path / "other.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + described + bytes(256))


def weights_that_are_no_floats(path):
    raw(path / "other.safetensors", {"a.weight": entry("I64", (4, 4), 0, 128), "b.weight": entry("C64", (2,), 128, 144),
                                     "c.weight": entry("F4", (2, 4), 144, 148)}, bytes(148))


BAD = {
    "truncated": (truncated, "the file is cut short"),
    "a header of petabytes": (of_petabytes, "its header claims 4503599627370496 bytes and the file has 2"),
    "overlapping offsets": (overlapping, "'y' overlaps 'x' in the file"),
    "a link out of the folder": (a_link, "is a link out of the folder"),
    "unknown types in a GGUF": (unknown_gguf_types, "has the unknown type 250"),
    "weights that are no floats": (weights_that_are_no_floats, "c.weight holds F4 but has no scale"),
}


@pytest.mark.parametrize("fault", BAD)
def test_each_is_one_sentence_and_the_rest_is_shown(tmp_path, fault):
    make, says = BAD[fault]
    make(folder(tmp_path))
    said, status = shown(tmp_path)
    assert status == 1 and said.count("✗") == said.count(says) == 1, said
    assert "modelopt-nvfp4" in said and "1 × [128, 256]" in said and "Codes of 1 of 1 layer read" in said


@pytest.mark.parametrize("count", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_however_many_tensors_are_listed(tmp_path, count):
    many_tensors(folder(tmp_path), count)
    said, status = shown(tmp_path, "--json")
    report = json.loads(said)
    assert status == 0 and (report["tensors"], len(report["layers"]), report["read"]) == (count + 3, 1, 1)
    assert report["plain"] == {"U8": count} and report["problems"] == []


def test_two_dialects_in_one_folder_are_both_shown_and_the_one_that_is_not_declared_is_a_sentence(tmp_path):
    both = tensors() | tensors("model.layers.1.mlp.up_proj", "deepseek-v3", "e4m3fn-b128x128")
    said, status = shown(folder(tmp_path, both))
    assert status == 1 and "modelopt-nvfp4" in said and "deepseek-v3" in said and "Codes of 2 of 2 layers" in said
    assert said.count("✗") == 1
    assert "model.layers.1.mlp.up_proj is stored as deepseek-v3, but the config declares modelopt" in said


@pytest.mark.parametrize(("content", "says"), [
    (b"", "0 bytes, too short"), (b"\x80\x04K\x01.", "5 bytes, too short"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "claims 1152921504606846976 tensors"),
])
def test_a_file_of_which_nothing_can_be_used_is_a_usage_error_of_one_sentence(tmp_path, content, says):
    (tmp_path / "model.safetensors").write_bytes(content)
    said, status = shown(tmp_path / "model.safetensors")
    assert status == 2 and says in said


@pytest.mark.parametrize(("content", "says"), [
    (np.zeros((4, 8), np.int64), "no matrix of floating-point numbers"),
    (np.full((16, 32), np.nan, np.float32), "numbers that are NaN or infinite"),
])
def test_weights_that_cannot_be_quantized_are_refused_with_the_reason(tmp_path, content, says):
    save_file({"x.weight": torch.from_numpy(content)}, tmp_path / "own.safetensors")
    said, _ = said_by("run", "--weights", str(tmp_path / "own.safetensors"), "-s", "mxfp4", "-i", "eager_upcast",
                      "--device", "cpu", "--no-timing", "--results", str(tmp_path / "r"))
    stored = "".join(file.read_text() for file in (tmp_path / "r").rglob("*.jsonl"))
    assert says in said + stored


def test_what_is_kept_in_the_results_has_a_page_that_the_first_page_links(tmp_path):
    results, checkpoint = tmp_path / "results", tmp_path / "Model <b>"
    checkpoint.mkdir()
    broken = tensors()
    broken[f"{LAYER}.weight_scale_2"] = broken[f"{LAYER}.weight_scale_2"].reciprocal()
    folder(checkpoint, broken)
    for _ in range(2):      # the second replaces the first
        _, status = shown(checkpoint, "--results", str(results))
        assert status == 1
    kept, = (results / "checkpoints").iterdir()
    (results / "checkpoints" / "other.json").write_text('{"path": 5}')
    run = command("report --results", results, "--output", tmp_path / "site")
    assert run.exit_code == 0, run.output
    first = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert f'href="checkpoints/{kept.stem}.html"' in first
    assert "Model &lt;b&gt;" in first and "1 with a finding" in first
    assert "not an examination of a checkpoint" in first
    page = (tmp_path / "site" / "checkpoints" / f"{kept.stem}.html").read_text(encoding="utf-8")
    assert "the global scale: divides, not multiplies" in page and page.count("<rect") == 16 and "<script" not in page
    assert 'href="../index.html"' in page and 'href="../assets/style.css"' in page

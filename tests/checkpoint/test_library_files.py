"""Files that NVIDIA Model Optimizer and AMD Quark wrote are read as these libraries read them, bit for bit.

`written/` holds files of both (tools/library_checkpoints.py). Where a library is installed it writes anew.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from places import CHECKOUT

from fpxbench import load_checkpoint
from fpxbench.checkpoint.checkpoint_folder import open_checkpoint
from fpxbench.checkpoint.checkpoint_report import CheckpointRequest
from fpxbench.checkpoint.layer_examination import examine
from fpxbench.checkpoint.layers import quantized_layers

WRITTEN = Path(__file__).parent / "written"
TOOL = CHECKOUT / "tools" / "library_checkpoints.py"
sys.path.insert(0, str(TOOL.parent))
from library_checkpoints import digest  # noqa: E402

FORMATS = {
    "modelopt-fp8": ("modelopt-fp8", "e4m3fn-tensor"), "modelopt-fp8-channel": ("modelopt-fp8", "e4m3fn-row"),
    "modelopt-fp8-block": ("modelopt-fp8", "e4m3fn-b32x32"), "modelopt-int8": ("modelopt-int8", "int8-row"),
    "modelopt-nvfp4": ("modelopt-nvfp4", "nvfp4"), "modelopt-mxfp4": ("modelopt-mxfp4", "mxfp4"),
    "modelopt-mxfp8": ("modelopt-mxfp8", "mxfp8_e4m3fn"), "quark-fp8": ("quark-fp8", "e4m3fn-tensor"),
    "quark-fp8-channel": ("quark-fp8", "e4m3fn-row"), "quark-int8": ("modelopt-int8", "int8-row"),
    "quark-mxfp4": ("modelopt-mxfp4", "mxfp4"), "quark-mxfp6_e3m2": ("quark-mxfp6_e3m2", "mxfp6_e3m2"),
    "quark-mxfp6_e2m3": ("quark-mxfp6_e2m3", "mxfp6_e2m3"),
}


def check(folder: Path, name: str) -> None:
    """Assert that every layer of a format is read as its library read it."""
    read, weights = json.loads((folder / "read.json").read_text())[name], load_checkpoint(folder / name)
    assert set(weights) == set(read) and len(read) == 7 and weights.problems == []
    for layer, expected in read.items():
        weight = weights[layer]
        one_block = name == "modelopt-fp8-block" and weight.shape == (32, 32)
        assert weight.scheme.name == ("e4m3fn-tensor" if one_block else FORMATS[name][1])
        assert digest(weight.dequantize()) == expected, layer


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_library_wrote_is_read_bit_for_bit_as_the_library_reads_it(name):
    layers = quantized_layers(open_checkpoint(WRITTEN / name))
    assert {layer.dialect.name for layer in layers} == {FORMATS[name][0]}
    check(WRITTEN, name)


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_library_wrote_has_no_finding(name):
    report = examine(CheckpointRequest(path=str(WRITTEN / name), deep=True))
    assert report.problems == [] and report.read == 7
    assert [problem for layer in report.layers for problem in layer.problems] == []
    assert [found.message for layer in report.layers for found in layer.evidence if found.fits_better] == []


def test_a_wrong_byte_would_show(tmp_path):
    (tmp_path / "quark-mxfp4").mkdir()
    (tmp_path / "read.json").write_text((WRITTEN / "read.json").read_text())
    for file in (WRITTEN / "quark-mxfp4").iterdir():
        content = bytearray(file.read_bytes())
        if file.suffix == ".safetensors":
            content[-1] ^= 0x11
        (tmp_path / "quark-mxfp4" / file.name).write_bytes(content)
    with pytest.raises(AssertionError):
        check(tmp_path, "quark-mxfp4")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("writer", ["modelopt", "quark"])
def test_what_an_installed_library_writes_now_is_read_as_it_reads_it(tmp_path, writer):
    if importlib.util.find_spec(writer) is None:
        pytest.skip(f"needs {writer}: pip install {'nvidia-modelopt' if writer == 'modelopt' else 'amd-quark'}")
    done = subprocess.run([sys.executable, TOOL, str(tmp_path), writer], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in json.loads((tmp_path / "read.json").read_text()):
        check(tmp_path, name)

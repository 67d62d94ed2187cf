"""Conventions are not contradicted by chance, whatever the weights are like."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from places import CHECKOUT
from safetensors.torch import save_file

from fpxbench.checkpoint.checkpoint_report import CheckpointRequest
from fpxbench.checkpoint.conventions import _pairs_correlate
from fpxbench.checkpoint.dialect_conversion import in_dialect
from fpxbench.checkpoint.dialects import DIALECTS
from fpxbench.checkpoint.layer_examination import examine
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scheme import scheme_named

sys.path.insert(0, str(CHECKOUT / "tools"))
from convention_alarms import DUE, KINDS, alarms, by_value

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWS = 4000


@pytest.mark.parametrize("kind", KINDS)
def test_unrelated_channels_contradict_each_other_as_often_as_chance_does(kind):
    most = DUE + 5 * math.sqrt(DUE / DRAWS)
    assert alarms(kind, 64, DRAWS, _pairs_correlate) <= most
    if kind in ("one outlier channel", "2% dead channels"):      # what ranks are for
        assert alarms(kind, 64, DRAWS, by_value) > 2 * most


def test_the_other_order_gives_the_opposite_sign_and_ties_say_nothing():
    rng = torch.Generator().manual_seed(0)
    channels, profile = torch.randn(256, generator=rng), torch.randn(256, generator=rng)
    channels[:80] = 0.0
    swapped = channels.reshape(-1, 2).flip(1).reshape(-1)
    there, back = _pairs_correlate(channels, profile), _pairs_correlate(swapped, profile)
    assert there == pytest.approx(tuple(-value for value in back))
    assert _pairs_correlate(torch.zeros(256), profile) == (0.0, 0.0)
    assert _pairs_correlate(profile, profile)[0] == pytest.approx(1)


def _pruned(values, keep, of):
    groups = values.reshape(-1, of)
    least = groups.abs().topk(keep, dim=1).values[:, -1:]
    return torch.where(groups.abs() >= least, groups, 0.0).reshape(values.shape)


def _normal(n, k, rng):
    return 0.02 * torch.randn(n, k, generator=rng)


def _outlier(values):
    values = values.clone()
    values[:, 7] *= 50
    return values


WEIGHTS = {
    "independent": lambda rng: _normal(512, 256, rng),
    "heavy tails": lambda rng: _normal(256, 256, rng) / (torch.randn(256, 256, generator=rng).abs() + 0.1),
    "2 of 4": lambda rng: _pruned(_normal(256, 256, rng), 2, 4),
    "9 of 10 pruned": lambda rng: _pruned(_normal(256, 320, rng), 1, 10),
    "half of the rows zero": lambda rng: _normal(256, 256, rng) * (torch.arange(256) % 2)[:, None],
    "an outlier channel": lambda rng: _outlier(_normal(256, 256, rng)),
    "small": lambda rng: _normal(32, 64, rng),
    "large weights": lambda rng: 40 * _normal(256, 256, rng),
}
SCHEMES = {"modelopt-fp8": "e4m3fn-tensor", "quark-fp8": "e4m3fn-row", "modelopt-nvfp4": "nvfp4",
           "ct-mxfp8": "mxfp8_e4m3fn", "ct-mxfp4": "mxfp4", "bnb-nf4": "nf4-g64", "deepseek-v3": "e4m3fn-b128x128"}


@pytest.mark.parametrize("dialect", SCHEMES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_right_file_of_odd_weights_contradicts_no_convention(tmp_path, dialect, kind):
    rng = torch.Generator().manual_seed(3)
    tensors = {"model.layers.9.self_attn.q_proj.weight": WEIGHTS[kind](rng).bfloat16()}
    for number in range(4):
        stored = quantize(WEIGHTS[kind](rng), scheme_named(SCHEMES[dialect]), "bytes")
        tensors |= in_dialect(f"model.layers.{number}.mlp.up_proj", stored, DIALECTS[dialect])
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": min(DIALECTS[dialect].methods)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = examine(CheckpointRequest(path=str(tmp_path), deep=True))
    assert [found for layer in report.layers for found in layer.evidence if found.fits_better] == []
    assert report.problems == [] and [problem for layer in report.layers for problem in layer.problems] == []

"""The projections of one input are one product, and a model computes what it did."""

import pytest
import torch
from live_bytes import LiveBytes
from test_generate import folder, measured, prepared, settings_of  # noqa: F401
from test_quantize import CONFIGS, model_of
from torch import nn

from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.generate_measurement import prepare
from fpxbench.model.merged_projections import MergedProduct, merge_projections_, projection_groups
from fpxbench.model.quantize_model import quantize_
from fpxbench.records.verdict import Status

QKV, GATE_UP = "self_attn.q_proj+k_proj+v_proj", "mlp.gate_proj+up_proj"
EXPECTED = {"llama": [QKV, GATE_UP], "mistral": [QKV, GATE_UP], "qwen2": [QKV, GATE_UP], "gemma3_text": [QKV, GATE_UP],
            "mixtral": [QKV], "qwen3_moe": [QKV], "gpt_oss": [QKV], "phi3": [], "gpt2": []}
TOKENS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_layers_are_found_by_their_input_and_compute_the_same_bits(name):
    model = model_of(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))      # biases are zero otherwise
    due, size = logits_of(model), sum(parameter.numel() for parameter in model.parameters())
    assert merge_projections_(model) == {}
    merged = [each for each, module in model.named_modules() if type(module) is nn.Linear and "+" in each]
    assert [each.partition("layers.")[2] for each in merged] == [
        f"{n}.{each}" for n in range(2) for each in EXPECTED[name]]
    called = []
    for each in merged:
        model.get_submodule(each).register_forward_hook(lambda *_, name=each: called.append(name))
    assert torch.equal(logits_of(model), due) and called == merged, "each once"
    assert sum(parameter.numel() for parameter in model.parameters()) == size


def test_a_merged_model_compiles_whole_and_has_the_codes_of_its_parts():
    model, parts = model_of("llama"), model_of("llama")
    merge_projections_(model)
    for each in (model, parts):
        quantize_(each, "e4m3fn-row")
    weights = dict(model.named_parameters())
    for name, weight in parts.named_parameters():
        if name.endswith("q_proj.weight"):
            merged = weights[name.replace("q_proj", "q_proj+k_proj+v_proj")].dequantize()
            assert torch.equal(merged[:len(weight)], weight.dequantize())
    due = logits_of(model)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(TOKENS).logits, due)
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", ["e4m3fn-row", "mxfp4", "nvfp4"])
def test_codes_are_joined_as_they_are_where_their_scales_allow_it(scheme):
    model = model_of("llama")
    quantize_(model, scheme)
    due, weight = logits_of(model), model.model.layers[0].mlp.gate_proj.weight.dequantize()
    left = merge_projections_(model)
    if scheme == "nvfp4":
        assert len(left) == 4 and all("different tensor scales" in reason for reason in left.values())
        assert f"model.layers.0.{QKV}" in left
    else:
        assert not left
        merged = model.model.layers[0].mlp.get_submodule("gate_proj+up_proj").weight
        assert isinstance(merged.data, FloatTensor) and torch.equal(merged.dequantize()[:len(weight)], weight)
    torch.testing.assert_close(logits_of(model), due, rtol=2**-6, atol=2**-6)


def test_a_weight_in_a_form_of_its_own_is_left():
    model = model_of("llama")
    groups = projection_groups(model)
    quantize_(model, "mxfp4", "boxed")
    assert all("form of its own" in reason for reason in merge_projections_(model, groups).values())


class Layers(nn.Module):
    """Linear layers that cannot be merged: other inputs, one that is changed or used between them, a layer that is
    called twice, a weight that another holds too."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        if how == "tied":
            self.c.weight = self.b.weight = self.a.weight

    def forward(self, x):
        a = self.a(x)
        if self.how == "in between":
            return self.c(a) + self.b(x)
        if self.how == "changed":
            x += 1
        return self.b(x if self.how != "others" else x + 1) + (self.a(x) if self.how == "twice" else a)


@pytest.mark.parametrize("how", ["others", "changed", "twice", "tied", "in between"])
def test_what_is_not_one_product_is_not_merged(how):
    assert projection_groups(Layers(how), x=torch.ones(1, 8)) == []
    assert projection_groups(Layers("alike"), x=torch.ones(1, 8)) == [["a", "b"]]


def test_one_group_at_a_time_is_in_memory_twice():
    model = model_of("llama", tie_word_embeddings=True)
    groups = projection_groups(model)
    largest = max(sum(model.get_submodule(name).weight.nbytes for name in group) for group in groups)
    with LiveBytes(model) as live:
        before = live.live
        merge_projections_(model, groups)
    assert live.most <= before + largest


def test_a_row_has_merged_projections_unless_told_otherwise(prepared, tmp_path):  # noqa: F811
    settings, ready, _ = prepared
    assert len(ready.merged) == 4 and all(row.merged for row in ready.rows)
    unmerged = prepare(settings.model_copy(update={"merge_projections": False}), tmp_path)
    assert not unmerged.merged and not any(row.merged for row in unmerged.rows)
    result = measured((settings, unmerged, tmp_path), "mxfp4", "eager_upcast")
    assert result.verdict.status is Status.OK and "14 weights quantized" in result.quantized
    assert "8 weights quantized" in measured(prepared, "mxfp4", "eager_upcast").quantized


def test_parts_that_are_exchanged_are_seen_by_the_unquantized_row(prepared, monkeypatch):  # noqa: F811
    right = MergedProduct.part
    monkeypatch.setattr(MergedProduct, "part", lambda self, x, index: right(
        self, x, index if len(self.sizes) == 3 else 1 - index))
    result = measured(prepared, "bf16", "plain", merged=True)
    assert result.verdict.status is Status.WRONG and "with merged projections" in result.verdict.summary
    assert result.speed is None

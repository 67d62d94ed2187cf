"""A model is quantized in place: which weights, by which scheme, and what is left with its reason."""

import pytest
import torch
from live_bytes import LiveBytes
from torch import nn

from fpxbench.model import quantize_parts
from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.quantize_model import quantize_
from fpxbench.model.token_speed import stored_bytes
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scheme import scheme_named

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=128, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
CONFIGS = {
    "llama": SMALL,
    "mistral": SMALL,
    "qwen2": SMALL,
    "phi3": SMALL,
    "gemma3_text": SMALL | dict(head_dim=16),
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=64),
    "mixtral": SMALL | EXPERTS,
    "qwen3_moe": SMALL | dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16),
    "gpt_oss": SMALL | EXPERTS | dict(head_dim=16),
}


def model_of(name, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **CONFIGS[name], **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_model_computes_what_its_dequantized_weights_compute(name):
    model, plain = model_of(name), model_of(name)
    done = quantize_(model, "e4m3fn-row")
    assert not any("embed" in each.name or "lm_head" in each.name for each in done.replaced)
    assert done.bytes_after < 0.6 * done.bytes_before
    parameters = dict(plain.named_parameters())
    for parameter, quantized in model.named_parameters():
        if isinstance(quantized.data, FloatTensor):
            parameters[parameter].copy_(quantized.data.dequantize())
    tokens = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, expected = model(tokens).logits.float(), plain(tokens).logits.float()
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_quantized_and_routers_are_left(name):
    done = quantize_(model_of(name), "mxfp4")
    experts = [each for each in done.replaced if "experts" in each.name]
    assert experts and all(each.shape[0] == 4 for each in experts)
    assert not any("router" in each.name or each.name.endswith("gate.weight") for each in done.replaced)


def test_schemes_go_by_glob_and_what_none_fits_is_left():
    model = model_of("llama")
    done = quantize_(model, {"*.self_attn.*": "e4m3fn-row", "*.down_proj": "mxfp4"})
    assert {each.name.rpartition(".weight")[0].rpartition(".")[2]: each.scheme for each in done.replaced} == {
        "q_proj": "e4m3fn-row",
        "k_proj": "e4m3fn-row",
        "v_proj": "e4m3fn-row",
        "o_proj": "e4m3fn-row",
        "down_proj": "mxfp4",
    }
    assert done.left["model.layers.0.mlp.up_proj.weight"] == "no glob of the schemes matches its name"
    assert (
        "quantized" in str(done)
        and quantize_(model, "e4m3fn-row").left["model.layers.0.mlp.down_proj.weight"] == "quantized already"
    )


def test_tied_weights_are_left_unless_nothing_else_holds_them():
    model = model_of("llama", tie_word_embeddings=True)
    done = quantize_(model, "e4m3fn-row", select=lambda name, module: True)
    assert "tied to model.embed_tokens.weight" in done.left["lm_head.weight"]


def peak_beyond_the_model(scheme, keep):
    """Return the bytes beyond those of a 16-bit model that quantizing it takes at most, and the bytes of one layer."""
    model = nn.Sequential(*(nn.Linear(512, 1024, bias=False, dtype=torch.bfloat16) for _ in range(4)))
    FloatTensor.from_float(model[0].weight.data, scheme)    # makes the codec's tables
    kept = list(model.parameters()) if keep else []
    with LiveBytes(model) as counted:
        quantize_(model, scheme)
    return counted.most - 4 * 2 * 512 * 1024, 2 * 512 * 1024, kept


@pytest.mark.parametrize("scheme", ["e4m3fn-row", "nvfp4"])
def test_a_model_is_never_larger_than_its_16_bit_weights_and_one_layer(scheme, monkeypatch):
    monkeypatch.setattr(quantize_parts, "PART", 1 << 15)    # as small beside a layer as it is beside a 7B model's
    beyond, layer, _ = peak_beyond_the_model(scheme, keep=False)
    assert 0 < beyond <= layer
    beyond, layer, _ = peak_beyond_the_model(scheme, keep=True)
    assert beyond > layer, "a second copy of the model would be seen"


@pytest.mark.parametrize(("scheme", "layout"), [
    *((scheme, "planar") for scheme in ("e4m3fn-row", "mxfp4", "nvfp4", "nvfp4.4over6", "e2m1-g32", "e3m2-tensor")),
    ("nvfp4", "fragment_m1"), ("e3m2-row", "fragment_m2"), ("e3m2-row", "fp6_llm"),
])
def test_a_weight_quantized_in_parts_has_the_codes_of_one_quantized_at_once(scheme, layout, monkeypatch):
    rows = 50 if layout == "planar" else 64
    values = torch.randn(rows, 192, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    whole = quantize(values, scheme, layout)
    monkeypatch.setattr(quantize_parts, "PART", 7 * 192)
    parts = quantize_parts.quantize_in_parts(values, scheme_named(scheme), layout)
    assert torch.equal(parts.packed, whole.packed) and torch.equal(parts.scales, whole.scales)
    assert (parts.tensor_scale is None) == (whole.tensor_scale is None)
    assert parts.tensor_scale is None or torch.equal(parts.tensor_scale, whole.tensor_scale)


def test_a_weight_with_a_nan_in_its_last_part_is_refused_as_before(monkeypatch):
    monkeypatch.setattr(quantize_parts, "PART", 64)
    values = torch.ones(9, 64)
    values[8, 3] = float("nan")
    for scheme in ("e4m3fn-row", "nvfp4"):
        with pytest.raises(ValueError, match="finite"):
            quantize_parts.quantize_in_parts(values, scheme_named(scheme), "planar")


def test_a_k_that_the_block_does_not_divide_ends_with_a_short_block_and_is_said():
    model = nn.Sequential(nn.Linear(40, 16, bias=False), nn.Linear(64, 16, bias=False))
    done = quantize_(model, "mxfp4")
    assert [each.name for each in done.short_blocks] == ["0.weight"] and "last block of 1 is short" in str(done)
    values = model[0].weight.data.dequantize(torch.float32)
    assert values.shape == (16, 40) and values.abs().amax(dim=1).min() > 0
    assert "short" not in str(quantize_(nn.Sequential(nn.Linear(40, 16)), "e4m3fn-row"))


def test_bytes_are_those_stored():
    model = nn.Sequential(nn.Linear(256, 128, bias=False, dtype=torch.bfloat16))
    assert stored_bytes(model) == 2 * 256 * 128
    quantize_(model, "mxfp4")
    assert stored_bytes(model) == 256 * 128 // 2 + 256 * 128 // 32


@pytest.mark.parametrize(("model", "scheme", "says"), [
    (nn.Sequential(nn.ReLU()), "mxfp4", "no weight of Sequential was quantized: it has no linear layer"),
    (nn.Sequential(nn.Linear(8, 8)), "mxfp5", "no scheme 'mxfp5'"),
    (nn.Sequential(nn.Linear(8, 8)), {"other": "mxfp4"}, "0.weight: no glob of the schemes matches its name"),
])
def test_a_model_without_anything_to_quantize_says_so(model, scheme, says):
    with pytest.raises(ValueError, match=says):
        quantize_(model, scheme)

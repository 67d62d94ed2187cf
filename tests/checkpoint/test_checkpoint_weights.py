"""A layer's weight is what its writer meant: the reference readers of each library decode the same numbers."""

import json

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fpxbench.checkpoint.checkpoint_folder import open_checkpoint
from fpxbench.checkpoint.dialect_conversion import in_dialect
from fpxbench.checkpoint.dialects import DIALECTS
from fpxbench.checkpoint.layers import quantized_layers
from fpxbench.checkpoint.tensor_entry import CheckpointError
from fpxbench.checkpoint.weights import read_numbers, read_weight, rows_of
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scheme import scheme_named

WEIGHT = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))


def layer_of(tmp_path, tensors, config=None, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors", metadata)
    (tmp_path / "config.json").write_text(json.dumps(config or {}))
    layer, = quantized_layers(open_checkpoint(tmp_path))
    return layer


def test_torchaos_float8_and_nvfp4_tensors_read_as_torchao_dequantizes_them(tmp_path):
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    linear = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16))
    quantize_(linear, Float8WeightOnlyConfig())
    tensors, metadata = flatten_tensor_state_dict(linear.state_dict())
    weight = read_weight(layer_of(tmp_path, tensors, metadata=metadata))
    assert weight.scheme.name == "e4m3fn-row"
    torch.testing.assert_close(weight.dequantize().bfloat16(), linear[0].weight.dequantize())
    for scale in (None, WEIGHT.abs().max() / 2688):
        stored = NVFP4Tensor.to_nvfp4(WEIGHT.bfloat16(), per_tensor_scale=scale)
        tensors, metadata = flatten_tensor_state_dict({"l.weight": stored})
        weight = read_weight(layer_of(tmp_path, tensors, metadata=metadata))
        assert weight.scheme.name == "nvfp4"
        torch.testing.assert_close(weight.dequantize().bfloat16(), stored.dequantize(torch.bfloat16))


def test_a_compressed_tensors_global_scale_divides(tmp_path):
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import helpers

    arguments = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16,
                                 scale_dtype=torch.float8_e4m3fn)
    divisor = helpers.generate_gparam(WEIGHT.amin(), WEIGHT.amax())
    blocks = WEIGHT.reshape(64, -1, 16)
    scales, _ = helpers.calculate_qparams(blocks.amin(2), blocks.amax(2), arguments, global_scale=divisor)
    codes = torch.randint(0, 256, (64, 128), dtype=torch.uint8)
    layer = layer_of(
        tmp_path,
        {"l.weight_packed": codes, "l.weight_scale": scales.to(torch.float8_e4m3fn), "l.weight_global_scale": divisor},
        {"quantization_config": {"quant_method": "compressed-tensors"}},
    )
    weight = read_weight(layer)
    e2m1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])
    values = e2m1[torch.stack([codes & 15, codes >> 4], dim=2).reshape(64, 256).long()]
    expected = values * (scales.to(torch.float8_e4m3fn).float() / divisor).repeat_interleave(16, dim=1)
    assert weight.scheme.name == "nvfp4.div" and torch.equal(weight.dequantize(), expected)


def test_deepseeks_blocks_multiply_and_experts_are_read_one_by_one(tmp_path):
    scale = torch.rand(2, 2) + 0.5
    codes = torch.randint(0, 126, (200, 256), dtype=torch.uint8)
    layer = layer_of(tmp_path, {"l.weight": codes.view(torch.float8_e4m3fn), "l.weight_scale_inv": scale})
    expected = codes.view(torch.float8_e4m3fn).float() * scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
    assert torch.equal(read_weight(layer).dequantize(), expected)
    part = rows_of(read_weight(layer), slice(128, 200))
    assert torch.equal(part.dequantize(), expected[128:])
    with pytest.raises(CheckpointError, match="row 100 lies inside a block of 128 rows"):
        rows_of(read_weight(layer), slice(100, 200))


def test_gpt_oss_experts_are_mxfp4(tmp_path):
    blocks, scales = (
        torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8),
        torch.randint(118, 128, (3, 8, 2), dtype=torch.uint8),
    )
    layer = layer_of(tmp_path, {"mlp.gate_up_proj_blocks": blocks, "mlp.gate_up_proj_scales": scales})
    e2m1 = torch.tensor([0, .5, 1, 1.5, 2, 3, 4, 6, -0., -.5, -1, -1.5, -2, -3, -4, -6])
    for expert in range(3):
        values = e2m1[torch.stack([blocks[expert] & 15, blocks[expert] >> 4], dim=-1).flatten(1).long()]
        expected = values * torch.exp2(scales[expert].float() - 127).repeat_interleave(32, dim=1)
        assert torch.equal(read_weight(layer, expert).dequantize(), expected)
    with pytest.raises(CheckpointError, match="has 3 experts; 3 is not one of them"):
        read_weight(layer, 3)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "MXFP4", "NVFP4"])
def test_a_gguf_block_type_is_decoded_as_the_gguf_library_does(tmp_path, kind):
    quantization = gguf.GGMLQuantizationType[kind]
    elements, nbytes = gguf.GGML_QUANT_SIZES[quantization]
    generator = np.random.default_rng(0)
    packed = generator.integers(0, 256, (16, 256 // elements * nbytes), dtype=np.uint8)
    blocks = packed.reshape(16, -1, nbytes)
    if kind in ("Q8_0", "Q4_0"):
        blocks[..., :2] = generator.random((16, 256 // elements, 1)).astype(np.float16).view(np.uint8)
    elif kind == "Q4_1":
        blocks[..., :4] = generator.normal(size=(16, 256 // elements, 2)).astype(np.float16).view(np.uint8)
    elif kind == "MXFP4":
        blocks[..., 0] = generator.integers(100, 140, blocks.shape[:2])
    else:
        blocks[..., :4] = generator.integers(0, 0x7f, (*blocks.shape[:2], 4))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    layer, = quantized_layers(open_checkpoint(tmp_path / "model.gguf"))
    expected = torch.from_numpy(gguf.quants.dequantize(packed, quantization).astype(np.float32))
    torch.testing.assert_close(read_numbers(layer), expected, rtol=1e-6, atol=1e-6 if kind == "Q4_1" else 0)
    if kind == "Q4_1":      # a number and an offset for each block: of no scheme
        assert layer.scheme is None
        with pytest.raises(CheckpointError, match="its scheme is not known"):
            read_weight(layer)
    else:
        assert torch.equal(read_numbers(layer), read_weight(layer).dequantize())


def bitsandbytes_file(tmp_path, weight=WEIGHT, **how):
    """Return the layer that bitsandbytes writes, and what it reads of it."""
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, state = functional.quantize_4bit(weight, **how)
    tensors = {"l.weight": codes, **{f"l.weight.{name}": part for name, part in state.as_dict(packed=True).items()}}
    layer = layer_of(tmp_path, tensors, {"quantization_config": {"quant_method": "bitsandbytes"}})
    return layer, functional.dequantize_4bit(codes, state).float(), set(tensors)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("kind", "scheme"), [("nf4", "nf4-g64"), ("fp4", "bnbfp4-g64")])
def test_a_file_of_bitsandbytes_is_decoded_as_it_does_itself_scales_of_codes_included(tmp_path, kind, scheme, nested,
                                                                                   storage):
    layer, expected, names = bitsandbytes_file(tmp_path, quant_type=kind, compress_statistics=nested,
                                               quant_storage=storage)
    assert (layer.dialect.name, layer.scheme, layer.problems) == (f"bnb-{kind}", scheme, [])
    assert (layer.n, layer.k) == (64, 256) and {entry.name for entry in layer.tensors.values()} == names
    assert torch.equal(read_weight(layer).dequantize(), expected)
    assert torch.equal(rows_of(read_weight(layer), slice(8, 40)).dequantize(), expected[8:40])


def test_blocks_of_bitsandbytes_that_run_across_rows_are_of_no_scheme(tmp_path):
    layer, _, _ = bitsandbytes_file(tmp_path, WEIGHT[:, :160].contiguous(), quant_type="nf4", blocksize=64)
    assert layer.scheme is None
    assert layer.problems == ["l: blocks of 64 cross the rows of a weight [64, 160], which no scheme has"]


def test_8_bit_weights_of_bitsandbytes_are_decoded_as_it_does_itself(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    codes, scales, _ = functional.int8_vectorwise_quant(WEIGHT.half())
    tensors = {"l.weight": codes, "l.SCB": scales, "l.weight_format": torch.tensor(0, dtype=torch.uint8)}
    layer = layer_of(tmp_path, tensors, {"quantization_config": {"quant_method": "bitsandbytes"}})
    assert (layer.dialect.name, layer.scheme) == ("bnb-int8", "int8-row")
    expected = functional.int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(read_weight(layer).dequantize(), expected.float(), rtol=1e-6, atol=0)


def test_what_we_write_for_bitsandbytes_it_reads_as_the_same_numbers(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    stored = quantize(WEIGHT, scheme_named("nf4-g64"))
    tensors = in_dialect("l", stored, DIALECTS["bnb-nf4"])
    state = functional.QuantState.from_dict(
        {name.removeprefix("l.weight."): part for name, part in tensors.items() if name != "l.weight"},
        device=torch.device("cpu"))
    state.dtype = torch.float32
    assert torch.equal(functional.dequantize_4bit(tensors["l.weight"], state), stored.dequantize())
    with pytest.raises(CheckpointError, match="an fp32 scale for each whole block along K, but this is nf4-row"):
        in_dialect("l", quantize(WEIGHT, scheme_named("nf4-row")), DIALECTS["bnb-nf4"])


@pytest.mark.parametrize(("content", "says"), [
    (b"{", "is not JSON"), (b"[]", "describes no matrix"), (b'{"shape": [64, 256]}', "describes no matrix"),
    (b'{"shape": [64, -256], "blocksize": 64}', "describes no matrix"),
    (b'{"shape": [64, 256], "blocksize": 0}', "describes no matrix"),
    (b'{"shape": [64, 256], "blocksize": 64, "nested_blocksize": 256}', "scales are F32, and the description says"),
    (b"[" * 4000, "is not JSON"), (b" " * 5000, "not a few bytes of JSON"),
])
def test_a_description_that_cannot_be_meant_is_one_sentence(tmp_path, content, says):
    tensors = in_dialect("l", quantize(WEIGHT, scheme_named("nf4-g64")), DIALECTS["bnb-nf4"])
    tensors["l.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(content), dtype=torch.uint8)
    layer = layer_of(tmp_path, tensors)
    assert len(layer.problems) == 1 and says in layer.problems[0]
    with pytest.raises(CheckpointError):
        read_weight(layer)

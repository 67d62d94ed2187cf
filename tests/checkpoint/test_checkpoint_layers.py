"""The quantized layers of a checkpoint are found, each with its dialect, shape, scheme and scales."""

import json

import numpy as np
import pytest

from fpxbench.checkpoint.checkpoint_folder import open_checkpoint
from fpxbench.checkpoint.dialects import DIALECTS
from fpxbench.checkpoint.layers import grid_of, quantized_layers

SIZES = {"F4": 0.5, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "F32": 4, "BF16": 2}


def write(folder, tensors, config=None):
    """Return a safetensors file of zeros with these dtypes and shapes."""
    header, place = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape) * SIZES[dtype])
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(place))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return quantized_layers(open_checkpoint(folder))


L = "model.layers.0.mlp.down_proj"
CASES = {
    "ct-fp8": ({f"{L}.weight": ("F8_E4M3", (64, 256)), f"{L}.weight_scale": ("BF16", (64, 1))},
               "compressed-tensors", "e4m3fn-row.bf16"),
    "ct-nvfp4": ({f"{L}.weight_packed": ("U8", (64, 128)), f"{L}.weight_scale": ("F8_E4M3", (64, 16)),
                  f"{L}.weight_global_scale": ("F32", (1,)), f"{L}.input_global_scale": ("F32", (1,))},
                 "compressed-tensors", "nvfp4.div"),
    "ct-mxfp4": ({f"{L}.weight_packed": ("U8", (64, 128)), f"{L}.weight_scale": ("U8", (64, 8))},
                 "compressed-tensors", "mxfp4"),
    "ct-mxfp8": ({f"{L}.weight": ("F8_E4M3", (64, 256)), f"{L}.weight_scale": ("U8", (64, 8))},
                 "compressed-tensors", "mxfp8_e4m3fn"),
    "modelopt-fp8": ({f"{L}.weight": ("F8_E4M3", (64, 256)), f"{L}.weight_scale": ("F32", ()),
                      f"{L}.input_scale": ("F32", ())}, "modelopt", "e4m3fn-tensor"),
    "modelopt-nvfp4": ({f"{L}.weight": ("U8", (64, 128)), f"{L}.weight_scale": ("F8_E4M3", (64, 16)),
                        f"{L}.weight_scale_2": ("F32", ()), f"{L}.input_scale": ("F32", ())}, "modelopt", "nvfp4"),
    "modelopt-mxfp4": ({f"{L}.weight": ("U8", (64, 128)), f"{L}.weight_scale": ("U8", (64, 8))},
                       "quark", "mxfp4"),
    "modelopt-mxfp8": ({f"{L}.weight": ("F8_E4M3", (64, 256)), f"{L}.weight_scale": ("U8", (64, 8))},
                       "modelopt", "mxfp8_e4m3fn"),
    "modelopt-int8": ({f"{L}.weight": ("I8", (64, 256)), f"{L}.weight_scale": ("F32", (64,))}, "modelopt", "int8-row"),
    "ct-int8": ({f"{L}.weight": ("I8", (64, 256)), f"{L}.weight_scale": ("BF16", (64, 1)),
                 f"{L}.weight_zero_point": ("I8", (64, 1))}, "compressed-tensors", "int8-row.bf16"),
    **{f"quark-mxfp6_{fmt}": ({f"{L}.weight": ("U8", (64, 192)), f"{L}.weight_scale": ("U8", (64, 8))},
                              {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": f"fp6_{fmt}"}}},
                              f"mxfp6_{fmt}") for fmt in ("e3m2", "e2m3")},
    "quark-fp8": ({f"{L}.weight": ("F8_E4M3", (64, 256)), f"{L}.weight_scale": ("F32", (64,))}, "quark", "e4m3fn-row"),
    "gpt-oss": ({"experts.gate_up_proj_blocks": ("U8", (4, 64, 8, 16)),
                 "experts.gate_up_proj_scales": ("U8", (4, 64, 8))}, "mxfp4", "mxfp4"),
    "deepseek-v3": ({f"{L}.weight": ("F8_E4M3", (200, 256)), f"{L}.weight_scale_inv": ("F32", (2, 2))},
                    "fp8", "e4m3fn-b128x128"),
    "deepseek-v4": ({f"{L}.weight": ("I8", (64, 128)), f"{L}.scale": ("F8_E8M0", (64, 8))}, "fp8", "mxfp4"),
    "bnb-int8": ({f"{L}.weight": ("I8", (64, 256)), f"{L}.SCB": ("F32", (64,))}, "bitsandbytes", "int8-row"),
    "torchao": ({"0._weight_qdata": ("F8_E4M3", (64, 128)), "0._weight_scale": ("F32", (64, 1))},
                "torchao", "e4m3fn-row"),
}


def test_every_dialect_has_a_case():
    # A format of its own, and those that describe themselves in a tensor of JSON: in test_checkpoint_weights.
    assert set(CASES) == {name for name, dialect in DIALECTS.items() if not (dialect.interleaved or dialect.state)}


@pytest.mark.parametrize("dialect", CASES)
def test_a_layer_is_found_with_its_dialect_and_scheme(tmp_path, dialect):
    tensors, method, scheme = CASES[dialect]
    config = {"quantization_config": {"quant_method": method} if isinstance(method, str) else method}
    layer, = write(tmp_path, {**tensors, "model.norm.weight": ("BF16", (256,))}, config)
    assert (layer.dialect.name, layer.scheme, layer.problems) == (dialect, scheme, [])
    assert {tensor.name for tensor in layer.tensors.values()} == set(tensors)
    assert layer.nbytes == sum(int(np.prod(shape)) * SIZES[dtype] for dtype, shape in tensors.values())
    assert (layer.experts, layer.k) == ((4, 256) if dialect == "gpt-oss" else (1, 128 if dialect == "torchao" else 256))


def test_without_a_config_what_cannot_be_told_apart_is_said_as_several(tmp_path):
    tensors = {f"{L}.weight": ("F8_E4M3", (64, 256)), f"{L}.weight_scale": ("F32", (64, 1))}
    layer, = write(tmp_path, tensors)
    assert {layer.dialect.name, *layer.others} == {"ct-fp8", "modelopt-fp8", "quark-fp8"}


def test_a_config_that_names_another_library_does_not_hide_the_layer(tmp_path):
    tensors, _, scheme = CASES["deepseek-v3"]
    layer, = write(tmp_path, tensors, {"quantization_config": {"quant_method": "modelopt"}})
    assert (layer.dialect.name, layer.scheme) == ("deepseek-v3", scheme)


def test_block_scales_without_their_global_scale_are_a_problem(tmp_path):
    tensors = {name: shape for name, shape in CASES["modelopt-nvfp4"][0].items() if not name.endswith("weight_scale_2")}
    layer, = write(tmp_path, tensors)
    assert "has no weight_scale_2" in layer.problems[0]


def test_scales_that_fit_no_block_are_a_problem(tmp_path):
    layer, = write(tmp_path, {f"{L}.weight": ("F8_E4M3", (64, 256)), f"{L}.weight_scale": ("F32", (64, 7))})
    assert layer.scheme is None and "[64, 7] fit no block of a weight [64, 256]" in layer.problems[0]


@pytest.mark.parametrize(("dtype", "codes", "dialects"), [
    ("U8", (64, 48), {"quark-mxfp6_e3m2", "quark-mxfp6_e2m3"}),        # as FP4 it would be [64, 96] in blocks of 48
    ("U8", (64, 32), {"modelopt-mxfp4"}), ("F4", (64, 64), {"modelopt-mxfp4"}),     # F4 has its shape in elements
])
def test_codes_are_as_wide_as_their_blocks_of_32_say(tmp_path, dtype, codes, dialects):
    layer, = write(tmp_path, {f"{L}.weight": (dtype, codes), f"{L}.weight_scale": ("U8", (64, 2))})
    assert (layer.n, layer.k, layer.problems) == (64, 64, []) and {layer.dialect.name, *layer.others} == dialects


def test_scales_of_which_there_is_no_scheme_are_a_problem(tmp_path):
    layer, = write(tmp_path, {"0._weight_qdata": ("U8", (64, 128)), "0._weight_scale": ("F8_E4M3", (64, 8))})
    assert layer.problems == ["0: no scheme of e2m1 has e4m3fn scales for g32"]


@pytest.mark.parametrize(("shape", "n", "k", "block", "name"), [
    ((), 8, 8, None, "tensor"), ((1,), 8, 8, None, "tensor"), ((1, 1), 8, 8, None, "tensor"),
    ((8,), 8, 64, None, "row"), ((8, 1), 8, 64, None, "row"),
    ((4096, 32), 4096, 4096, None, "g128"), ((8, 3), 8, 96, None, "g32"),
    ((56, 16), 7168, 2048, None, "b128x128"), ((57, 3), 7200, 300, None, "b128x128"),
    ((8, 3), 8, 300, None, "g128"),                # ragged: 100 is no standard block
    ((8, 2), 8, 100, 64, "g64"),                   # 64 and 50 would both give two
    ((8, 7), 8, 100, None, "g16"),
    ((2, 1, 2, 1), 256, 256, None, "b128x128"), ((2, 1, 1, 1), 256, 128, None, "b128x128"),      # ModelOpt's
    ((8, 2), 8, 96, None, "g64"), ((8, 3), 8, 192, None, "g64"), ((8, 4), 8, 400, None, "g128"),
    ((8, 8), 8, 384, None, None), ((8, 8), 8, 384, 48, "g48"),      # 48 is no standard block
    ((3, 7), 64, 256, None, None), ((2, 2, 2), 8, 8, None, None),
])
def test_the_block_is_told_from_the_scales_shape(shape, n, k, block, name):
    grid = grid_of(shape, n, k, block)
    assert (grid.name if grid else None) == name

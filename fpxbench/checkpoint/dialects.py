"""Dialects of quantized checkpoints, as data: which tensors make a layer, and what their bytes mean.

A dialect is one entry of `DIALECTS`. Nothing else names a library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Element:
    """The contents of a tensor of codes: a number format's name, and where its codes lie in the bytes of a row."""

    format: str
    layout: str = "bytes"

    @property
    def bits(self) -> int:
        """Bits that a code takes in the file."""
        return {"bytes": 8, "bitstream": 6}.get(self.layout, 4)


FP8 = {"F8_E4M3": Element("e4m3fn"), "F8_E4M3FNUZ": Element("e4m3fnuz"), "F8_E5M2": Element("e5m2"),
       "F8_E5M2FNUZ": Element("e5m2fnuz")}
FP4 = {"U8": Element("e2m1", "nibbles_low_first"), "I8": Element("e2m1", "nibbles_low_first"),
       "F4": Element("e2m1", "nibbles_low_first")}
INT8 = {"I8": Element("int8")}

SCALE_FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F8_E4M3": "e4m3fn", "F8_E8M0": "e8m0", "U8": "e8m0"}
"""The dtype that a file gives a scale -> the scale's format. safetensors before 0.6 stores E8M0 as uint8."""


@dataclass(frozen=True)
class Dialect:
    """One way to store a quantized linear layer.

    Parameters
    ----------
    name : as used in commands
    writer : the library or the models that write it
    source : where that is documented
    codes, scales : suffixes of the tensors' names, after the layer's name
    elements : dtype of the codes -> what they are; tensors of another dtype are not in this dialect
    scale_dtypes : dtypes that the scales may have
    global_scale : suffix of the second-level scale, if there is one
    global_divides : the stored global scale divides (it is the reciprocal of the factor) instead of multiplying
    global_optional : E4M3 block scales may stand without a global scale
    activation_scale : suffix of the activation's static scale
    methods : values of ``quant_method`` (config.json), ``quant_algo`` (hf_quant_config.json) or Quark's ``dtype`` that
        mean this dialect
    grouped : codes and scales have a further dimension, the blocks: ``[..., N, G, bytes]`` and ``[..., N, G]``
    interleaved : scales and codes stand in one tensor, block by block (GGUF)
    state : suffix of the JSON that describes flat codes and scales (`fpxbench.checkpoint.quant_state`)
    values : suffix of the table of the numbers that codes stand for
    nested_scales, nested_values : where scales are codes: suffixes of their scales, and of the numbers they stand for
    scale_divisor : what the stored scales are divided by
    block : number of weights along K that share a scale, if the dialect fixes it; 0: any
    zero_point : suffix of the zero points, which must be 0, as schemes have none
    """

    name: str
    writer: str
    source: str
    codes: str
    scales: str
    elements: Mapping[str, Element]
    scale_dtypes: frozenset[str]
    global_scale: str = ""
    global_divides: bool = False
    global_optional: bool = False
    activation_scale: str = ""
    methods: frozenset[str] = field(default_factory=frozenset)
    grouped: bool = False
    interleaved: bool = False
    state: str = ""
    values: str = ""
    nested_scales: str = ""
    nested_values: str = ""
    scale_divisor: float = 1.0
    block: int = 0
    zero_point: str = ""


def _bitsandbytes(quant_type: str, fmt: str) -> Dialect:
    codes = Element(fmt, "nibbles_high_first")
    return Dialect(
        f"bnb-{quant_type}", "bitsandbytes, QLoRA", "bitsandbytes, functional.py: QuantState.as_dict", ".weight",
        ".weight.absmax", {"U8": codes, "BF16": codes, "F16": codes, "F32": codes}, frozenset({"F32", "U8"}),
        methods=frozenset({"bitsandbytes"}), state=f".weight.quant_state.bitsandbytes__{quant_type}",
        values=".weight.quant_map", nested_scales=".weight.nested_absmax", nested_values=".weight.nested_quant_map")


_VALUES = frozenset({"F32", "BF16", "F16"})
_E8M0 = frozenset({"U8", "F8_E8M0"})
_E4M3 = frozenset({"F8_E4M3"})
_CT = "compressed-tensors, compressors/ and quantization/ (vllm-project/compressed-tensors)"
_MODELOPT = "NVIDIA Model Optimizer, torch/export (NVIDIA/Model-Optimizer)"
_QUARK = "AMD Quark, torch/export and torch/utils/pack.py (amd/Quark)"

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (
    Dialect("ct-fp8", "compressed-tensors, LLM Compressor", f"{_CT}: float-quantized", ".weight", ".weight_scale", FP8,
            _VALUES, activation_scale=".input_scale", methods=frozenset({"compressed-tensors"})),
    Dialect("ct-nvfp4", "compressed-tensors, LLM Compressor", f"{_CT}: nvfp4-pack-quantized", ".weight_packed",
            ".weight_scale", FP4, _E4M3, global_scale=".weight_global_scale", global_divides=True,
            activation_scale=".input_global_scale", methods=frozenset({"compressed-tensors"}), block=16),
    Dialect("ct-mxfp4", "compressed-tensors, LLM Compressor", f"{_CT}: mxfp4-pack-quantized", ".weight_packed",
            ".weight_scale", FP4, _E8M0, methods=frozenset({"compressed-tensors"})),
    Dialect("ct-mxfp8", "compressed-tensors, LLM Compressor", f"{_CT}: mxfp8-quantized", ".weight", ".weight_scale",
            FP8, _E8M0, methods=frozenset({"compressed-tensors"}), block=32),
    Dialect("ct-int8", "compressed-tensors, LLM Compressor", f"{_CT}: int-quantized", ".weight", ".weight_scale", INT8,
            _VALUES, activation_scale=".input_scale", zero_point=".weight_zero_point",
            methods=frozenset({"compressed-tensors"})),
    Dialect("modelopt-fp8", "NVIDIA Model Optimizer", _MODELOPT, ".weight", ".weight_scale", FP8, _VALUES,
            activation_scale=".input_scale",
            methods=frozenset({"modelopt", "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"})),
    Dialect("modelopt-nvfp4", "NVIDIA Model Optimizer", _MODELOPT, ".weight", ".weight_scale", FP4, _E4M3,
            global_scale=".weight_scale_2", activation_scale=".input_scale",
            methods=frozenset({"modelopt", "modelopt_fp4", "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4"}), block=16),
    Dialect("modelopt-mxfp4", "NVIDIA Model Optimizer, AMD Quark", _MODELOPT, ".weight", ".weight_scale", FP4, _E8M0,
            methods=frozenset({"modelopt", "MXFP4", "quark"}), block=32),
    Dialect("modelopt-mxfp8", "NVIDIA Model Optimizer, AMD Quark", _MODELOPT, ".weight", ".weight_scale", FP8, _E8M0,
            methods=frozenset({"modelopt", "MXFP8", "quark"}), block=32),
    Dialect("modelopt-int8", "NVIDIA Model Optimizer, AMD Quark", _MODELOPT, ".weight", ".weight_scale", INT8, _VALUES,
            activation_scale=".input_scale", zero_point=".weight_zero_point",
            methods=frozenset({"modelopt", "W8A16", "W8A8_SQ_PER_CHANNEL", "quark"})),
    Dialect("quark-fp8", "AMD Quark", _QUARK, ".weight", ".weight_scale", FP8, _VALUES,
            activation_scale=".input_scale", methods=frozenset({"quark"})),
    *(Dialect(f"quark-mxfp6_{fmt}", "AMD Quark", _QUARK, ".weight", ".weight_scale", {"U8": Element(fmt, "bitstream")},
              _E8M0, methods=frozenset({"quark", f"fp6_{fmt}"}), block=32) for fmt in ("e3m2", "e2m3")),
    Dialect("gpt-oss", "gpt-oss", "openai/gpt-oss, gpt_oss/torch/weights.py", "_blocks", "_scales", FP4, _E8M0,
            methods=frozenset({"mxfp4"}), grouped=True, block=32),
    Dialect("deepseek-v3", "DeepSeek-V3, V3.1, Qwen3-FP8", "deepseek-ai/DeepSeek-V3, README_WEIGHTS.md", ".weight",
            ".weight_scale_inv", FP8, _VALUES | _E8M0, activation_scale=".activation_scale",
            methods=frozenset({"fp8"})),
    Dialect("deepseek-v4", "DeepSeek-V4", "deepseek-ai/DeepSeek-V4, inference/", ".weight", ".scale", {**FP8, **FP4},
            _E8M0 | _VALUES, methods=frozenset({"fp8", "fp4"})),
    Dialect("torchao", "torchao 0.14 and later", "torchao/prototype/safetensors (pytorch/ao)", "._weight_qdata",
            "._weight_scale", {**FP8, **FP4}, _VALUES | _E8M0 | _E4M3, global_scale="._weight_per_tensor_scale",
            global_optional=True, methods=frozenset({"torchao"})),
    _bitsandbytes("nf4", "nf4"),
    _bitsandbytes("fp4", "bnbfp4"),
    Dialect("bnb-int8", "bitsandbytes LLM.int8", "bitsandbytes, nn/modules.py: Linear8bitLt", ".weight", ".SCB",
            INT8, frozenset({"F32"}), methods=frozenset({"bitsandbytes"}), scale_divisor=127.0),
    Dialect("gguf", "llama.cpp", "ggml-org/ggml, ggml-common.h", ".weight", "", {
        "Q8_0": Element("int8", "gguf"), "Q4_0": Element("int4", "gguf"), "Q4_1": Element("int4", "gguf"),
        "MXFP4": Element("e2m1", "gguf"), "NVFP4": Element("e2m1", "gguf")}, frozenset(), interleaved=True),
)}

GGUF_SCHEMES = {"Q8_0": "int8-g32.fp16", "Q4_0": "int4-g32.fp16", "MXFP4": "mxfp4", "NVFP4": "nvfp4"}
"""The scheme of a GGUF block type. Types with an offset (Q4_1) or two levels of integer scales have none."""

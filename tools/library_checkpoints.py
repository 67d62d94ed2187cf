"""Write small checkpoints by NVIDIA Model Optimizer and AMD Quark, and what each library reads of them.

``python tools/library_checkpoints.py FOLDER [modelopt] [quark]`` writes a folder for each format, and ``read.json``:
for each layer the SHA-256 of the fp32 numbers that the library decodes. tests/checkpoint/written holds a run of it.
Needs `pip install nvidia-modelopt amd-quark`, which need no GPU.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Read = dict[str, Tensor]
"""What a library reads of each layer, fp32 [N, K]."""
Decode = Callable[[Tensor, dict[str, Tensor]], Tensor]
BLOCK = 32
"""Of the blocks in two dimensions: the model is smaller than a block of 128."""


def small_model() -> torch.nn.Module:
    """Return a Llama of one layer with random weights, fp32; its smallest linear layer is [32, 32]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=8, max_position_embeddings=16, architectures=["LlamaForCausalLM"]))


def _forward(model: torch.nn.Module) -> None:
    model(torch.arange(8)[None])


def by_modelopt(folder: Path) -> Iterator[tuple[str, Read]]:
    """Write a checkpoint in each format of ModelOpt's; yield its name and what ModelOpt's own tensors decode."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import (
        FP8QTensor,
        INT8QTensor,
        MXFP4QTensor,
        MXFP8QTensor,
        NVFP4QTensor,
    )

    def read(kind: type, per_byte: int = 1, block: int = 0, rows: int = 0) -> Decode:
        def decoded(codes: Tensor, parts: dict[str, Tensor]) -> Tensor:
            shape = torch.Size([codes.shape[0], codes.shape[1] * per_byte])
            scale = parts["weight_scale"]
            if kind is INT8QTensor or (kind is FP8QTensor and scale.dim() == 1):
                scale = scale[:, None]
            if rows:
                scale = scale.reshape(shape[0] // rows, shape[1] // block)
            sizes = {-1: block, **({-2: rows} if rows else {})} if block else None
            return kind(shape, torch.float32, codes).dequantize(
                torch.float32, scale=scale, double_scale=parts.get("weight_scale_2"), block_sizes=sizes)
        return decoded

    formats = {
        "fp8": ("FP8_DEFAULT_CFG", read(FP8QTensor)),
        "fp8-channel": ("FP8_PER_CHANNEL_PER_TOKEN_CFG", read(FP8QTensor)),
        "fp8-block": ("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", read(FP8QTensor, block=BLOCK, rows=BLOCK)),
        "int8": ("INT8_WEIGHT_ONLY_CFG", read(INT8QTensor)),
        "nvfp4": ("NVFP4_DEFAULT_CFG", read(NVFP4QTensor, 2, 16)),
        "mxfp4": ("MXFP4_DEFAULT_CFG", read(MXFP4QTensor, 2, 32)),
        "mxfp8": ("MXFP8_DEFAULT_CFG", read(MXFP8QTensor, block=32)),
    }
    for name, (config_name, decode) in formats.items():
        config = copy.deepcopy(getattr(mtq, config_name))
        if name == "fp8-block":
            config = json.loads(json.dumps(config).replace("128", str(BLOCK)))
            config["quant_cfg"] = _with_integer_axes(config["quant_cfg"])
        model = mtq.quantize(small_model(), config, _forward)
        target = folder / f"modelopt-{name}"
        export_hf_checkpoint(model, export_dir=target)
        tensors = load_file(target / "model.safetensors")
        layers = [each.removesuffix(".weight_scale") for each in tensors if each.endswith(".weight_scale")]
        yield target.name, {layer: decode(tensors[f"{layer}.weight"], {
            part: tensors[f"{layer}.{part}"] for part in ("weight_scale", "weight_scale_2")
            if f"{layer}.{part}" in tensors}) for layer in layers}


def _with_integer_axes(config):
    """Return a configuration whose keys that are numbers are numbers again, which JSON made strings of."""
    if isinstance(config, dict):
        return {int(key) if key.lstrip("-").isdigit() else key: _with_integer_axes(value)
                for key, value in config.items()}
    return [_with_integer_axes(each) for each in config] if isinstance(config, list) else config


def by_quark(folder: Path) -> Iterator[tuple[str, Read]]:
    """Write a checkpoint in each format of Quark's; yield its name and what Quark's quantizers make of the weights."""
    from quark.torch import ModelQuantizer, export_safetensors
    from quark.torch.quantization.config import config as specs
    from torch.utils.data import DataLoader

    formats = {
        "fp8": specs.FP8E4M3PerTensorSpec(observer_method="min_max", is_dynamic=False),
        "fp8-channel": specs.FP8E4M3PerChannelSpec(ch_axis=0, is_dynamic=False),
        "int8": specs.Int8PerChannelSpec(symmetric=True, scale_type="float", round_method="half_even", ch_axis=0,
                                         is_dynamic=False),
        "mxfp4": specs.OCP_MXFP4Spec(ch_axis=-1, is_dynamic=False),
        "mxfp6_e3m2": specs.OCP_MXFP6E3M2Spec(ch_axis=-1, is_dynamic=False),
        "mxfp6_e2m3": specs.OCP_MXFP6E2M3Spec(ch_axis=-1, is_dynamic=False),
    }
    for name, spec in formats.items():
        weights = specs.QLayerConfig(weight=spec.to_quantization_spec())
        quantizer = ModelQuantizer(specs.QConfig(global_quant_config=weights, exclude=["lm_head"]))
        model = quantizer.freeze(quantizer.quantize_model(small_model(), DataLoader([torch.arange(8)], batch_size=1)))
        read = {layer: module._weight_quantizer(module.weight.detach()).float()
                for layer, module in model.named_modules() if hasattr(module, "_weight_quantizer")}
        target = folder / f"quark-{name}"
        with torch.no_grad():
            export_safetensors(model, str(target))
        yield target.name, read


def digest(numbers: Tensor) -> str:
    """Return the SHA-256 of fp32 numbers. Zeros are without a sign, which ModelOpt drops in FP4."""
    return hashlib.sha256((numbers + 0.0).contiguous().numpy().tobytes()).hexdigest()


def main(folder: str, *writers: str) -> None:
    read: dict[str, dict[str, str]] = {}
    for writer in writers or ("modelopt", "quark"):
        for name, layers in {"modelopt": by_modelopt, "quark": by_quark}[writer](Path(folder)):
            read[name] = {layer: digest(numbers) for layer, numbers in sorted(layers.items())}
            for extra in (Path(folder) / name).iterdir():
                if extra.name not in ("model.safetensors", "config.json", "hf_quant_config.json"):
                    extra.unlink()
    Path(folder, "read.json").write_text(json.dumps(read, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A scheme is a format and a scaling, of the weight and, where they are quantized too, of the activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from fpxbench.did_you_mean import did_you_mean
from fpxbench.numbers.codebook import CODEBOOKS, NumberFormat, table_named
from fpxbench.numbers.dtypes import DTYPE_NAMES
from fpxbench.numbers.formats import FORMATS, Format, format_named
from fpxbench.numbers.scaling import Scales, Scaling, scaling_named

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored, and how the activations that it multiplies are rounded first.

    format, scaling : None for the dense schemes ``bf16`` and ``fp16``
    activation : how activations [M, K] are quantized: ``row`` is one scale per token, ``g128`` one per 128 neighbours
        along K, ``tensor`` one for all. None: not at all (weight-only)
    """

    name: str
    format: NumberFormat | None
    scaling: Scaling | None
    activation: Scheme | None = None

    @property
    def quantized(self) -> bool:
        return self.format is not None

    @property
    def element_format(self) -> Format:
        """The format, where the bits of a code are its fields. Raises ValueError for a codebook and a dense scheme."""
        if not isinstance(self.format, Format):
            raise ValueError(f"the codes of {self.name} have no exponent and mantissa")
        return self.format

    @property
    def dense_dtype(self) -> torch.dtype | None:
        """The stored dtype of a dense scheme; None for a quantized one."""
        import torch

        return getattr(torch, DTYPE_NAMES[self.name].torch) if self.name in _DENSE else None

    def bits_per_weight(self, n: int, k: int) -> float:
        """Return the bits per element of an [n, k] weight: its code and its share of the scales."""
        if not self.quantized:
            return 16.0
        return self.format.bits + self.scaling.bits_per_weight(n, k)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Scales]:
        """Return the oracle's codes (uint8 [N, K]) and scales of a float `weight` [N, K]: nearest-even, saturating.

        Raises ValueError, naming what is wrong, for a weight that is not a finite, floating-point matrix.
        """
        from fpxbench.numbers.tensor_codec import encode

        if not self.quantized:
            raise ValueError(f"scheme {self.name!r} stores the weight as it is; there is nothing to quantize")
        weight = checked_weight(weight)
        scales = self.scaling.choose(weight, self.format)
        return encode(self.scaling.divide(weight, scales), self.format), scales

    def rounded_activation(self, x: Tensor) -> Tensor:
        """Return activations `x` [..., K] as the product uses them: fp32, quantized if the scheme says so."""
        if self.activation is None or x.numel() == 0:
            return x.float()
        flat = x.reshape(-1, x.shape[-1])
        return self.activation.dequantize(*self.quantized_activation(flat)).reshape(x.shape)

    def quantized_activation(self, x: Tensor) -> tuple[Tensor, Scales]:
        """Return codes uint8 [M, K] and scales of activations `x` [M, K], by the rule of `activation`.

        NaN or infinity makes the scale of its block NaN or infinite, and so the block's numbers NaN; other blocks are
        not affected.
        """
        from fpxbench.numbers.tensor_codec import encode

        rule, x = self.activation, x.float()
        scales = rule.scaling.choose(x, rule.format)
        return encode(rule.scaling.divide(x, scales).nan_to_num(0.0), rule.format), scales

    def dequantize(self, codes: Tensor, scales: Scales) -> Tensor:
        """Return fp32 [N, K] from uint8 `codes` [N, K] and their scales: decode exactly, multiply once."""
        from fpxbench.numbers.tensor_codec import decode

        values = decode(codes, self.format)
        return values * self.scaling.spread(self.scaling.factors(scales), *codes.shape)


def checked_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return `weight` in `dtype` (fp32 if None), if it is a finite, floating-point, non-empty [N, K] and stays finite.
    Raise ValueError or TypeError if not.
    """
    import torch

    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TypeError(f"a weight is quantized from float64, float32, bfloat16 or float16, not {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"a weight is a matrix [N, K]; this one has shape {list(weight.shape)}")
    if weight.numel() == 0:
        raise ValueError(f"the weight of shape {list(weight.shape)} has no elements")
    dtype = dtype or torch.float32
    if torch.compiler.is_compiling():
        return weight.to(dtype)     # a compiled graph cannot branch on numbers
    # Only a narrower range can overflow; a copy for no reason would take a layer's memory.
    fits = torch.finfo(weight.dtype).max <= torch.finfo(dtype).max
    checked = weight if fits else weight.to(dtype)
    if not bool(torch.isfinite(checked).all()):
        bad = ~torch.isfinite(checked)
        row, column = bad.nonzero()[0].tolist()
        narrowed = f" in {str(dtype).removeprefix('torch.')}" if bool(weight.isfinite().all()) else ""
        raise ValueError(
            f"the weight is not finite{narrowed}: {weight[row, column].item()} at row {row}, column {column}"
            f" ({int(bad.sum())} such elements); no scale can hold it"
        )
    return checked.to(dtype)


_DENSE = ("bf16", "fp16")

# Names of standards. A scheme may also be named by its parts (e2m1-mx = mxfp4); its name is then the standard's.
_STANDARD = {
    "mxfp8_e4m3fn": ("e4m3fn", "mx"),
    "mxfp8_e5m2": ("e5m2", "mx"),
    "mxfp6_e3m2": ("e3m2", "mx"),
    "mxfp6_e2m3": ("e2m3", "mx"),
    "mxfp4": ("e2m1", "mx"),
    "nvfp4": ("e2m1", "nv"),
}
_BY_PARTS = {parts: name for name, parts in _STANDARD.items()}

SCHEMES: tuple[str, ...] = ("bf16", "fp16", "int8-row", "e4m3fn-tensor", "e4m3fn-row", "e4m3fnuz-row", "e5m2-row",
                            "e5m2fnuz-row", "e3m4-row", "e4m3fn-g128", "e3m2-row", "e3m2-g128", "e2m3-row", "e2m1-g32",
                            *_STANDARD)
"""The schemes that profiles sweep; any other is made from its parts."""

USED_BY: dict[str, str] = {
    "int8-row": "torchao int8 weight-only, bitsandbytes LLM.int8",
    "e4m3fn-tensor": "TensorRT-LLM and ModelOpt FP8",
    "e4m3fn-row": "torchao float8 weight-only, LLM Compressor FP8",
    "e4m3fnuz-row": "vLLM on MI300 (from e4m3fn checkpoints)",
    "e4m3fn-b128x128": "DeepSeek-V3 and R1, Qwen3-FP8",
    "e4m3fn-b128x128.e8m0": "DeepSeek-V3.1",
    "int4-g128.bf16": "torchao int4 weight-only",
    "int4-g128.fp16": "GPTQ and AWQ with symmetric weights",
    "mxfp4": "gpt-oss",
    "mxfp4.rceil": "DeepSeek-V4, cuBLAS, torchao RCEIL",
    "mxfp4.ceil": "torchao CEIL",
    "mxfp4.even": "torchao EVEN",
    "mxfp8_e4m3fn.rceil": "cuBLAS and torchao MXFP8 training",
    "nvfp4": "ModelOpt, TensorRT-LLM",
    "nvfp4.div": "LLM Compressor (compressed-tensors)",
    "nvfp4.4over6": "Four Over Six",
    "e2m1-nv16x16": "NVFP4 training (TransformerEngine)",
    "nf4-g64": "bitsandbytes, QLoRA",
    "bnbfp4-g64": "bitsandbytes",
    "e4m3fn-row+e4m3fn-row": "torchao float8 dynamic, LLM Compressor FP8-dynamic",
    "e4m3fn-tensor+e4m3fn-tensor.static": "TensorRT-LLM and ModelOpt FP8 with calibrated activations",
    "e4m3fn-b128x128+e4m3fn-g128": "DeepSeek-V3 and R1 as served",
    "int8-row+int8-row": "torchao int8 dynamic, LLM Compressor W8A8",
    "mxfp4+mxfp8_e4m3fn": "gpt-oss on Blackwell",
    "mxfp4+mxfp4": "MXFP4 on MI350 (Quark)",
    "nvfp4+nvfp4": "ModelOpt and LLM Compressor NVFP4 on Blackwell",
}
"""Where a scheme is in use, as far as its library or model documents it."""


@cache
def scheme_named(name: str) -> Scheme:
    """Return the scheme of that name: a standard's (``mxfp4``), or ``FORMAT-SCALING`` (``e3m2-g128``, ``e2m2-row``).

    A standard's name takes modifiers too (``mxfp4.rceil``). The part after a ``+`` says how activations are quantized
    (``e4m3fn-row+e4m3fn-row``, ``nvfp4+nvfp4``). Raises ValueError naming the nearest valid schemes.
    """
    weight, plus, activation = name.partition("+")
    if plus:
        of_weight, of_activation = scheme_named(weight), scheme_named(activation)
        if not (of_weight.quantized and of_activation.quantized) or of_activation.activation is not None:
            raise ValueError(f"no scheme {name!r}: both sides of its + must be quantized schemes, as in "
                             "e4m3fn-row+e4m3fn-row")
        return replace(of_weight, name=f"{of_weight.name}+{of_activation.name}", activation=of_activation)
    if name in _DENSE:
        return Scheme(name, None, None)
    standard, dot, modifiers = name.partition(".")
    if standard in _STANDARD:
        fmt, scaling = _STANDARD[standard]
    else:
        fmt, dash, scaling = name.rpartition("-")
        base, dot, modifiers = scaling.partition(".")
        if (fmt, base) in _BY_PARTS:
            return scheme_named(_BY_PARTS[fmt, base] + dot + modifiers)
    try:
        if standard in _STANDARD:
            return Scheme(name, FORMATS[fmt], scaling_named(scaling + dot + modifiers))
        if not dash:
            raise ValueError("a scheme is FORMAT-SCALING")
        scheme = Scheme(name, _element_named(fmt), scaling_named(scaling))
        scheme.scaling.reach(scheme.format)     # raises ValueError if format and scaling cannot be combined
    except ValueError as error:
        hint = did_you_mean(name, SCHEMES, f"known by name: {', '.join(SCHEMES)}", cutoff=0.5)
        raise ValueError(f"no scheme {name!r} ({error}); {hint}") from None
    if not scheme.format.signed:
        raise ValueError(f"no scheme {name!r}: {scheme.format.name} holds scales, not weights: it has no sign")
    return scheme


def _element_named(name: str) -> NumberFormat:
    if name in CODEBOOKS:
        return CODEBOOKS[name]
    return table_named(name.replace(":", ".", 1)) if name.startswith(("table.", "table:")) else format_named(name)

"""What each framework calls a number format. Imports none of them.

Lists only dtypes with one number per element, so not torch's packed ``float4_e2m1fn_x2``. docs/codec.md lists where the
frameworks' casts differ from the definition.
"""

from __future__ import annotations

from dataclasses import dataclass

from fpxbench.numbers.formats import BF16, FORMATS, FP16, FP32, FP64, Format, format_named


@dataclass(frozen=True)
class DTypeNames:
    """A format's names; None where the framework has no such dtype.

    torch : ``torch.float8_e4m3fn``
    triton : ``triton.language.float8e4nv``
    triton_short : as Triton's compiler prints it and as its kernels' signatures spell it, ``fp8e4nv``
    ml_dtypes : ``ml_dtypes.float8_e4m3fn``
    gfloat : ``gfloat.formats.format_info_ocp_e4m3``
    onnx : ``onnx.TensorProto.FLOAT8E4M3FN``
    """

    torch: str | None = None
    triton: str | None = None
    triton_short: str | None = None
    ml_dtypes: str | None = None
    gfloat: str | None = None
    onnx: str | None = None


def _ocp(name: str) -> str:
    return f"format_info_ocp_{name}"


DTYPE_NAMES: dict[str, DTypeNames] = {
    "fp64": DTypeNames("float64", "float64", "fp64", None, "format_info_binary64", "DOUBLE"),
    "fp32": DTypeNames("float32", "float32", "fp32", None, "format_info_binary32", "FLOAT"),
    "bf16": DTypeNames("bfloat16", "bfloat16", "bf16", "bfloat16", "format_info_bfloat16", "BFLOAT16"),
    "fp16": DTypeNames("float16", "float16", "fp16", None, "format_info_binary16", "FLOAT16"),
    "e4m3fn": DTypeNames("float8_e4m3fn", "float8e4nv", "fp8e4nv", "float8_e4m3fn", _ocp("e4m3"), "FLOAT8E4M3FN"),
    "e4m3fnuz": DTypeNames("float8_e4m3fnuz", "float8e4b8", "fp8e4b8", "float8_e4m3fnuz", None, "FLOAT8E4M3FNUZ"),
    # Triton's own, for GPUs before FP8: every code a number, the largest 1.875.
    "e4m3b15": DTypeNames(None, "float8e4b15", "fp8e4b15"),
    "e5m2": DTypeNames("float8_e5m2", "float8e5", "fp8e5", "float8_e5m2", _ocp("e5m2"), "FLOAT8E5M2"),
    "e5m2fnuz": DTypeNames("float8_e5m2fnuz", "float8e5b16", "fp8e5b16", "float8_e5m2fnuz", None, "FLOAT8E5M2FNUZ"),
    "e4m3ieee": DTypeNames(ml_dtypes="float8_e4m3"),
    "e4m3b11fnuz": DTypeNames(ml_dtypes="float8_e4m3b11fnuz"),
    "e3m4": DTypeNames(ml_dtypes="float8_e3m4"),
    "e3m2": DTypeNames(ml_dtypes="float6_e3m2fn", gfloat=_ocp("e3m2")),
    "e2m3": DTypeNames(ml_dtypes="float6_e2m3fn", gfloat=_ocp("e2m3")),
    "e2m1": DTypeNames(ml_dtypes="float4_e2m1fn", gfloat=_ocp("e2m1"), onnx="FLOAT4E2M1"),
    "e8m0": DTypeNames("float8_e8m0fnu", ml_dtypes="float8_e8m0fnu", gfloat=_ocp("e8m0"), onnx="FLOAT8E8M0"),
    "int8": DTypeNames("int8", "int8", "i8", onnx="INT8"),
    "int4": DTypeNames(ml_dtypes="int4", onnx="INT4"),
}
"""Names by format."""

TORCH_FLOAT8: dict[str, str] = {
    name: names.torch for name, names in DTYPE_NAMES.items()
    if names.torch and name in FORMATS and FORMATS[name].signed and not FORMATS[name].is_integer
}
"""The float8 formats of weights that torch has a dtype for, and its name there."""


def format_of(name: str) -> Format:
    """Return the format of a name in `DTYPE_NAMES`, wide ones included. Raise ValueError for what `format_named`
    refuses."""
    wide = {fmt.name: fmt for fmt in (FP64, FP32, BF16, FP16)}
    return wide[name] if name in wide else format_named(name)

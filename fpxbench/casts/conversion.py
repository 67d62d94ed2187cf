"""A conversion: an operation from one dtype to another, as one engine carries it out on one device. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from pydantic import BaseModel, ConfigDict, field_validator

from fpxbench.numbers.formats import FORMATS, Format


class Engine(StrEnum):
    """What carries a conversion out."""

    EAGER = "eager"
    COMPILED = "compiled"                       # torch.compile with Inductor
    TRITON = "triton"                           # a kernel of its own, on a GPU
    TRITON_INTERPRETER = "triton_interpreter"   # the same kernel under TRITON_INTERPRET=1, on a CPU


class Operation(StrEnum):
    """What is done to the source."""

    CAST = "cast"                           # x.to(target), rounding as it does by default
    CAST_RTZ = "cast_rtz"                   # Triton's x.to(target, fp_downcast_rounding="rtz")
    SCALE_THEN_CAST = "scale_then_cast"     # (x * scale).to(target), product and scale in the source's dtype
    FINFO = "finfo"                         # the constants of torch.finfo
    SHIFT_LEFT = "shift_left"
    SHIFT_RIGHT = "shift_right"
    AND = "and"
    OR = "or"
    XOR = "xor"
    NOT = "not"
    # The other operand is a Python int, as in (packed >> 4) & 15.
    SHIFT_LEFT_SCALAR = "shift_left_scalar"
    SHIFT_RIGHT_SCALAR = "shift_right_scalar"
    AND_SCALAR = "and_scalar"

    @property
    def on_bits(self) -> bool:
        return self in _ON_BITS


_ON_BITS = frozenset(Operation) - {Operation.CAST, Operation.CAST_RTZ, Operation.SCALE_THEN_CAST, Operation.FINFO}


@dataclass(frozen=True)
class DType:
    """A number type as the frameworks have it.

    torch, triton : its names there; None where it has none
    exponent_bits, mantissa_bits : of a float wider than a `Format`; an unsigned integer has neither
    """

    name: str
    bits: int
    torch: str | None
    triton: str | None = None
    format: Format | None = None
    exponent_bits: int = 0
    mantissa_bits: int = 0

    @property
    def is_float8(self) -> bool:
        return self.format is not None

    @property
    def is_integer(self) -> bool:
        return self.format is None and self.exponent_bits == 0


def _float8(name: str, torch: str | None, triton: str | None, fmt: Format | None = None) -> DType:
    return DType(name, 8, torch, triton, fmt or FORMATS[name])


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("fp64", 64, "float64", "float64", exponent_bits=11, mantissa_bits=52),
        DType("fp32", 32, "float32", "float32", exponent_bits=8, mantissa_bits=23),
        DType("bf16", 16, "bfloat16", "bfloat16", exponent_bits=8, mantissa_bits=7),
        DType("fp16", 16, "float16", "float16", exponent_bits=5, mantissa_bits=10),
        _float8("e4m3fn", "float8_e4m3fn", "float8e4nv"),
        _float8("e5m2", "float8_e5m2", "float8e5"),
        _float8("e4m3fnuz", "float8_e4m3fnuz", "float8e4b8"),
        _float8("e5m2fnuz", "float8_e5m2fnuz", "float8e5b16"),
        _float8("e8m0", "float8_e8m0fnu", None),
        # Triton's own, for GPUs before FP8: every code a number, the largest 1.875.
        _float8("e4m3b15", None, "float8e4b15", Format("e4m3b15", 4, 3, 15)),
        DType("uint16", 16, "uint16"),
        DType("uint32", 32, "uint32"),
        DType("uint64", 64, "uint64"),
    )
}


class Conversion(BaseModel):
    """Operation, source and target dtype by name, engine, device."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    operation: Operation
    source: str
    target: str
    engine: Engine
    device: str

    @field_validator("source", "target")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in DTYPES:
            raise ValueError(f"no dtype {name!r}: one of {', '.join(DTYPES)}")
        return name

    @field_validator("device")
    @classmethod
    def _device(cls, name: str) -> str:
        if name not in ("cpu", "cuda"):
            raise ValueError(f"device is cpu or cuda, not {name!r}")
        return name

    @cached_property
    def id(self) -> str:
        """``cast/fp32/e4m3fn/eager/cpu``."""
        return f"{self.what}/{self.engine}/{self.device}"

    @property
    def what(self) -> str:
        """The conversion without who carries it out: ``cast/fp32/e4m3fn``."""
        return f"{self.operation}/{self.source}/{self.target}"

    @property
    def runs_on(self) -> str:
        """Who carries it out: ``eager/cpu``."""
        return f"{self.engine}/{self.device}"

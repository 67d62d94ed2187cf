"""A conversion: an operation from one dtype to another, by one engine on one device. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from pydantic import BaseModel, ConfigDict, field_validator

from fpxbench.numbers.dtypes import DTYPE_NAMES, format_of
from fpxbench.numbers.formats import Format


class Engine(StrEnum):
    """What carries out a conversion."""

    EAGER = "eager"
    COMPILED = "compiled"                       # torch.compile with Inductor
    TRITON = "triton"                           # a kernel of its own, on a GPU
    TRITON_INTERPRETER = "triton_interpreter"   # the same kernel under TRITON_INTERPRET=1, on a CPU


class CastOperation(StrEnum):
    """What is computed from the source."""

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


_ON_BITS = frozenset(CastOperation) - {CastOperation.CAST, CastOperation.CAST_RTZ, CastOperation.SCALE_THEN_CAST,
                                       CastOperation.FINFO}


@dataclass(frozen=True)
class DType:
    """A number type that the frameworks convert: a float with its `format`, or an unsigned integer of `bits`, without
    one."""

    name: str
    bits: int
    format: Format | None = None

    @property
    def torch(self) -> str | None:
        """Its name in torch; None where torch has no such dtype."""
        return self.name if self.is_integer else DTYPE_NAMES[self.name].torch

    @property
    def triton(self) -> str | None:
        """Its name in triton.language; None where Triton has no such dtype, and for integers."""
        return None if self.is_integer else DTYPE_NAMES[self.name].triton

    @property
    def is_float8(self) -> bool:
        """Whether it is a float of a byte."""
        return self.format is not None and self.bits == 8

    @property
    def is_integer(self) -> bool:
        return self.format is None


_FLOATS = ("fp64", "fp32", "bf16", "fp16", "e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0", "e4m3b15")
_IN_BYTES = ("e3m4", "e3m2", "e2m3", "e2m1")
"""Formats that no framework converts to: targets of users' casts, which return one code per byte."""

DTYPES: dict[str, DType] = {
    **{fmt.name: DType(fmt.name, fmt.bits, fmt) for fmt in map(format_of, _FLOATS)},
    **{name: DType(name, 8, format_of(name)) for name in _IN_BYTES},
    **{f"uint{bits}": DType(f"uint{bits}", bits) for bits in (16, 32, 64)},
}


class Conversion(BaseModel):
    """Operation, source and target dtype by name, engine, device."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    operation: CastOperation
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
        """The conversion without engine and device: ``cast/fp32/e4m3fn``."""
        return f"{self.operation}/{self.source}/{self.target}"

    @property
    def runs_on(self) -> str:
        """Engine and device: ``eager/cpu``."""
        return f"{self.engine}/{self.device}"

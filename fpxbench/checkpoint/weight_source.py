"""Which weight or activation of a file a case is measured on. Imports no torch: plans and requests carry it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class WeightSource(BaseModel):
    """A layer of a file."""

    model_config = ConfigDict(frozen=True)

    path: str
    name: str
    """The quantized layer's, without its tensors' suffixes; or the tensor's, for one that is not quantized."""
    expert: int = 0
    quantized: bool = True
    """Whether its codes and scales are used as stored; if not, each implementation quantizes its numbers."""

    def __str__(self) -> str:
        return f"{self.path}:{self.name}" + (f"[{self.expert}]" if self.expert else "")


class TensorSource(BaseModel):
    """A tensor of a file of ordinary floating-point numbers."""

    model_config = ConfigDict(frozen=True)

    path: str
    name: str
    digest: str
    """Of its shape, dtype, and first and last bytes."""

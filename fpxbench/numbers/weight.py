"""A weight as an implementation stores it: packed codes, scales, and the scheme by which they are read."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from fpxbench.numbers import packing
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import Scheme

HELD = "held"
"""The layout of a weight that an object holds."""
_FIELDS = ("packed", "scales", "tensor_scale")


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight ``[N, K]`` as stored.

    scheme : how codes and scales are read
    shape : ``(N, K)``
    layout : a layout of `fpxbench.numbers.packing`, or ``dense``
    packed : uint8 ``[N, row_bytes]``; for a dense scheme the 16-bit ``[N, K]`` itself
    scales : fp32 ``[1, 1]``, ``[N, 1]`` or ``[N, G]``, or uint8 codes ``[N, G]`` (mx: E8M0, nv: E4M3FN); None if dense
    tensor_scale : fp32 ``[1]``, nv only
    extra : further tensors that an implementation keeps with the weight; they count as stored bytes
    held : an object that holds the weight in place of codes and scales, see `holding`
    """

    scheme: Scheme
    shape: tuple[int, int]
    layout: str
    packed: Tensor
    scales: Tensor | None = None
    tensor_scale: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    held: Any = None

    @classmethod
    def holding(cls, held: Any, scheme: Scheme, shape: tuple[int, int]) -> Self:
        """Return a weight [N, K] that any object holds: a module, another library's tensor.

        Its tensors, those of a module or of its attributes, count as stored bytes and must stay unchanged.
        ``held.dequantize()``, if it has one, reads it back as [N, K]. Its codes cannot be read or set.
        """
        return cls(scheme, shape, HELD, torch.empty(0, dtype=torch.uint8), held=held)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Scales, scheme: Scheme, layout: str = "planar") -> Self:
        """Return a weight of uint8 `codes` [N, K], packed in `layout`."""
        packed = packing.pack(codes, scheme.format.bits, layout)
        return cls(scheme, (codes.shape[0], codes.shape[1]), layout, packed, scales.stored, scales.tensor_scale)

    def codes(self) -> Tensor:
        """Return the codes, uint8 ``[N, K]``. Raise ValueError for a dense scheme, which has none."""
        if not self.scheme.quantized:
            raise ValueError(f"a {self.scheme.name} weight has no codes")
        return packing.unpack(self.packed, self.scheme.format.bits, self.shape[1], self.layout)

    def relayout(self, layout: str) -> Self:
        """Return the same codes and scales in another layout. Raise ValueError for a dense weight, and for a width or a
        shape that the layout does not support."""
        return replace(self, layout=layout, packed=packing.pack(self.codes(), self.scheme.format.bits, layout))

    @property
    def has_codes(self) -> bool:
        """Whether `codes` and `scale_grid` can be read: not of dense weights, nor of a layout that is an
        implementation's own."""
        return self.scheme.quantized and packing.is_layout(self.layout)

    @property
    def stored_scales(self) -> Scales:
        return Scales(self.scales, self.tensor_scale)

    def scale_grid(self) -> Tensor:
        """Return the factor of each block, fp32 ``[R, G]``; a tensor scale is included."""
        return self.scheme.scaling.factors(self.stored_scales)

    def row_scales(self) -> Tensor:
        """Return the factor of each row's blocks along K, fp32 ``[N or 1, G]``; those of blocks of several rows are
        repeated."""
        grid, rows = self.scale_grid(), self.scheme.scaling.block_rows
        return grid if rows in (1, None) else grid.repeat_interleave(rows, dim=0)[:self.shape[0]]

    def dequantize(self) -> Tensor:
        """Return the stored codes and scales decoded by the oracle, fp32 ``[N, K]``. An object that holds the weight is
        decoded by its own ``dequantize``. Raise TypeError if it has none."""
        if self.held is not None:
            read = getattr(self.held, "dequantize", None)
            if not callable(read):
                raise TypeError(f"a weight held by a {type(self.held).__name__}, which has no method dequantize():"
                                " override Implementation.dequantize")
            return read().float()
        if not self.scheme.quantized:
            return self.packed.float()
        return self.scheme.dequantize(self.codes(), self.stored_scales)

    def tensors(self) -> dict[str, Tensor]:
        """Return every stored tensor, by name."""
        named = {"packed": self.packed, "scales": self.scales, "tensor_scale": self.tensor_scale, **self.extra,
                 **_tensors_of(self.held, "held")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes stored, scales and extras included."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.tensors().values() if tensor.numel()), self.packed.device)

    def to(self, device: torch.device | str) -> Self:
        """Return the same weight with its tensors on `device`; an object that holds it, by its own ``to``."""
        moved: dict[str, Any] = {
            name: tensor.to(device) for name in _FIELDS if (tensor := getattr(self, name)) is not None
        }
        if self.held is not None:
            moved["held"] = copy.deepcopy(self.held).to(device)
        return replace(self, **moved, extra={name: tensor.to(device) for name, tensor in self.extra.items()})

    def clone(self) -> Self:
        """Return a copy that shares no memory with this one."""
        copies: dict[str, Any] = {
            name: tensor.clone() for name in _FIELDS if (tensor := getattr(self, name)) is not None
        }
        if self.held is not None:
            copies["held"] = copy.deepcopy(self.held)
        return replace(self, **copies, extra={name: tensor.clone() for name, tensor in self.extra.items()})


def _tensors_of(held: Any, name: str, depth: int = 4) -> dict[str, Tensor]:
    """Return the tensors that an object holds, by name: a module's, a tensor subclass's parts, those of its attributes,
    of lists and of dictionaries, `depth` objects deep."""
    if held is None or depth == 0:
        return {}
    parts: Iterable[tuple[Any, Any]]
    if isinstance(held, torch.nn.Module):
        parts = [*held.named_parameters(), *held.named_buffers()]
    elif isinstance(held, Tensor):
        flatten = getattr(held.data if isinstance(held, torch.nn.Parameter) else held, "__tensor_flatten__", None)
        if flatten is None:
            return {name: held}
        parts = [(part, getattr(held, part)) for part in flatten()[0]]
    elif isinstance(held, dict):
        parts = held.items()
    elif isinstance(held, list | tuple):
        parts = enumerate(held)
    else:
        parts = getattr(held, "__dict__", {}).items()
    found: dict[str, Tensor] = {}
    for part, value in parts:
        found |= _tensors_of(value, f"{name}.{part}", depth - 1)
    return found

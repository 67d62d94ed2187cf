"""The weights of several experts as an implementation stores them: one `QuantizedWeight` with an expert dimension."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.weight import QuantizedWeight


class CannotStack(ValueError):
    """Weights of a kind that is not stored together as experts."""


@dataclass(frozen=True)
class QuantizedExperts(QuantizedWeight):
    """Weights ``[E, N, K]`` of experts that share one scheme, shape and layout.

    `shape` is ``(N, K)`` of each. The tensors are those of `QuantizedWeight`, one expert after another: packed
    ``[E, N, row_bytes]``, scales ``[E, R, G]``, tensor_scale ``[E, 1]``, and `extra` likewise. ``experts[e]`` is a
    `QuantizedWeight` that shares their memory, the same object each time.
    """

    @classmethod
    def stack(cls, experts: Sequence[QuantizedWeight]) -> Self:
        """Return the experts' weights [N, K] as one object. Raise ValueError if they differ in scheme, shape, layout or
        tensors."""
        first = experts[0]
        for other in experts:
            if (other.scheme, other.shape, other.layout, list(other.tensors()), list(other.extra)) != (
                    first.scheme, first.shape, first.layout, list(first.tensors()), list(first.extra)):
                raise ValueError("experts that are stored together have one scheme, shape, layout and set of tensors;"
                                 f" {first.scheme.name} {first.shape} in {first.layout} and {other.scheme.name}"
                                 f" {other.shape} in {other.layout} differ")
        if first.held is not None:
            raise CannotStack(f"weights that an object holds ({type(first.held).__name__}) are not stored together as"
                              " experts")
        stacked = {name: torch.stack([expert.tensors()[name] for expert in experts]) for name in first.tensors()}
        extra = {name: stacked.pop(name) for name in first.extra}
        return cls(first.scheme, first.shape, first.layout, extra=extra, **stacked)

    @cached_property
    def experts(self) -> tuple[QuantizedWeight, ...]:
        """The weight of each expert: the same objects each time, so that tensors derived from a weight can be cached
        with it."""
        def part(tensor: Tensor | None, expert: int) -> Tensor | None:
            return None if tensor is None else tensor[expert]

        return tuple(
            QuantizedWeight(self.scheme, self.shape, self.layout, self.packed[expert], part(self.scales, expert),
                            part(self.tensor_scale, expert), {name: t[expert] for name, t in self.extra.items()})
            for expert in range(len(self.packed)))

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, expert: int) -> QuantizedWeight:
        return self.experts[expert]

    def __iter__(self) -> Iterator[QuantizedWeight]:
        return iter(self.experts)

    def codes(self) -> Tensor:
        """Return the codes, uint8 ``[E, N, K]``. Raise ValueError for a dense scheme, which has none."""
        return torch.stack([expert.codes() for expert in self])

    def relayout(self, layout: str) -> Self:
        """Return the same codes and scales in another layout. Raise ValueError as `QuantizedWeight.relayout` does."""
        return type(self).stack([expert.relayout(layout) for expert in self])

    @property
    def stored_scales(self) -> Scales:
        raise TypeError("each expert has its own scales: use experts[e].stored_scales")

    def scale_grid(self) -> Tensor:
        """Return the factor of each block, fp32 ``[E, R, G]``; a tensor scale is included."""
        return torch.stack([expert.scale_grid() for expert in self])

    def row_scales(self) -> Tensor:
        """Return `QuantizedWeight.row_scales` of each expert, fp32 ``[E, N or 1, G]``."""
        return torch.stack([expert.row_scales() for expert in self])

    def dequantize(self) -> Tensor:
        """Return the stored codes and scales decoded by the oracle, fp32 ``[E, N, K]``."""
        return torch.stack([expert.dequantize() for expert in self])


def rows_of_experts(offsets: Tensor | Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (expert, first row, row past the last) of each expert that has rows.

    offsets : [E], the row past the last of each expert, ascending; expert 0 begins at row 0
    """
    ends: list[Any] = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
    return [(expert, first, last) for expert, (first, last) in enumerate(zip([0, *ends], ends, strict=False))
            if last > first]

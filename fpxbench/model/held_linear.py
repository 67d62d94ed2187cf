"""A linear layer whose weight an implementation keeps in a form of its own, which a FloatTensor cannot hold."""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.weight import QuantizedWeight


class HeldWeight:
    """A weight [N, K] in an implementation's own form, with the instance that stored it."""

    def __init__(self, values: Tensor, scheme: Scheme, instance: Implementation) -> None:
        """Quantize 16-bit `values` [N, K]. Raise what the implementation raises for unsupported values."""
        self.instance, self.implementation, self.scheme = instance, instance.name, scheme.name
        self.stored_shape, self.dtype, self.device = tuple(values.shape), values.dtype, values.device
        self.weight: QuantizedWeight = instance.quantize(values.detach(), scheme)
        self.handle = next(_handles)
        _weights[self.handle] = self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight as the implementation decodes it, [N, K] in `dtype` (the model's own if None)."""
        return self.instance.dequantize(self.weight).to(dtype or self.dtype)

    @property
    def nbytes_stored(self) -> int:
        return self.weight.nbytes


_handles = count()
_weights: WeakValueDictionary[int, HeldWeight] = WeakValueDictionary()


@torch.library.custom_op("fpxbench::held_linear", mutates_args=())
def held_linear(x: Tensor, handle: int, n: int) -> Tensor:
    """Return ``x @ weight.T``, [..., N] in x's dtype, for the weight with this handle."""
    held = _weights[handle]
    return x.new_empty(*x.shape[:-1], n) if x.numel() == 0 else held.instance.matmul(x, held.weight)


@held_linear.register_fake
def _product_like(x: Tensor, handle: int, n: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


class HeldLinear(nn.Linear):
    """An `nn.Linear` with a `HeldWeight`. It multiplies by its parameter ``weight`` instead if that is set.

    For inference on the device where it was made: the weight has no gradient, is not in the state dict, and stays on
    its device.
    """

    def __init__(self, held: HeldWeight, bias: nn.Parameter | None) -> None:
        n, k = held.stored_shape
        super().__init__(k, n, bias=False, device="meta")
        self.held = held
        self._parameters.update(weight=None, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self._parameters["weight"]
        if weight is not None:
            return F.linear(x, weight, self.bias)
        bias: Any = self._parameters["bias"]
        out = torch.ops.fpxbench.held_linear(x, self.held.handle, self.out_features)
        return out if bias is None else out + bias


def is_opaque(cls: type[Implementation]) -> bool:
    """Return whether only the class itself can read the weights that it stores."""
    return cls.opaque or cls.dequantize is not Implementation.dequantize

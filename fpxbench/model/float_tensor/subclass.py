"""The tensor subclass: parts, context, conversion, sharding. `handlers` and `cuts` register its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Self

import torch
from torch import Tensor

from fpxbench.model.operator import AUTO, instance_for, kept_experts, resolve
from fpxbench.model.quantize_parts import quantize_in_parts
from fpxbench.numbers.packing import layout_named
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.weight import QuantizedWeight

_PARTS = ("packed", "scales", "tensor_scale")
_CONTEXT = ("scheme", "layout", "shape", "dtype", "implementation", "transposed", "flat", "is_copy")
PORTABLE = "planar"
"""The layout with separate rows, for any shape, used where an implementation's own layout cannot be sliced."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
"""Python function, such as `F.linear` -> its replacement."""
OPERATIONS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}
"""Dispatcher operation -> its replacement, called with the operation, its arguments and its keyword arguments."""


class FloatTensor(Tensor):
    """A quantized weight as a tensor.

    Parameters
    ----------
    packed : uint8 codes, ``[..., N, row_bytes]``
    scales : as `QuantizedWeight.scales`, ``[..., R, G]``
    tensor_scale : the second-level scale, fp32 ``[..., 1]``; None for schemes without one
    scheme, layout : names, as in `QuantizedWeight`; attributes ``scheme`` and ``code_layout``
    shape : ``(N, K)`` or ``(E, N, K)``
    dtype : of the tensor that it represents, and of `dequantize`
    implementation : the one that multiplies; ``auto`` is resolved per scheme and device by `fpxbench.model.operator`
    transposed : whether the last two dimensions are swapped, as after ``.t()``
    flat : whether it is viewed as one dimension, as FSDP2 keeps its shards
    is_copy : whether it is a slice that had to be repacked, and so shares no memory with the tensor it was cut from
    """

    __module__ = "fpxbench.model.float_tensor"      # the name in saved files

    packed: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    is_copy: bool = False       # files written before this field existed lack it

    @staticmethod
    def __new__(cls, packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, scheme: str, layout: str,
                shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, implementation: str = AUTO,
                transposed: bool = False, flat: bool = False, is_copy: bool = False) -> Self:
        outer = (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape)
        outer = (prod(shape),) if flat else outer
        return Tensor._make_wrapper_subclass(cls, outer, dtype=dtype, device=packed.device, requires_grad=False)

    def __init__(self, packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, scheme: str, layout: str,
                 shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, implementation: str = AUTO,
                 transposed: bool = False, flat: bool = False, is_copy: bool = False) -> None:
        self.packed, self.scales, self.tensor_scale = packed, scales, tensor_scale
        self.scheme, self.code_layout, self.stored_shape = scheme, layout, tuple(shape)
        self.implementation, self.transposed, self.flat = implementation, transposed, flat
        self.is_copy = is_copy

    # Conversion.

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16, implementation: str = AUTO
    ) -> Self:
        """Return a tensor that holds the codes and scales of `weight`.

        Raise ValueError for a dense weight, and for one in an implementation's private layout.
        """
        if not weight.has_codes or weight.extra:
            raise ValueError(
                f"a FloatTensor holds codes in a known layout; this {weight.scheme.name} weight is in {weight.layout!r}"
            )
        return cls(weight.packed, weight.scales, weight.tensor_scale, weight.scheme.name, weight.layout, weight.shape,
                   dtype, implementation)

    @classmethod
    def from_float(cls, values: Tensor, scheme: str | Scheme, implementation: str = AUTO) -> Self:
        """Quantize `values` [N, K] or [E, N, K] into the layout that `implementation` reads on their device, by the
        oracle or by the implementation's own quantizer (`Implementation.own_layouts`).

        Raise ValueError for values out of every scale's range, and if the implementation does not support the scheme.
        """
        chosen = scheme_named(scheme) if isinstance(scheme, str) else scheme
        name, cls_of = resolve(implementation, chosen, values.device.type)
        with torch.no_grad():
            if values.dim() == 3:
                return cls.stack([cls.from_float(expert, chosen, name) for expert in values])
            instance = cls_of()
            if chosen.name in cls_of.own_layouts:
                weight = instance.quantize(values.detach(), chosen)
            else:
                layout = instance.layout_for(chosen, (values.shape[0], values.shape[1]), values.device)
                weight = instance.stored(quantize_in_parts(values.detach(), chosen, layout))
        return cls.from_weight(
            weight, values.dtype if values.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16, name
        )

    @classmethod
    def stack(cls, experts: Sequence[Self]) -> Self:
        """Return one tensor [E, N, K] of experts [N, K], in planar rows if their layouts differ.

        Raise ValueError if their schemes, shapes or dtypes differ.
        """
        if len({expert.code_layout for expert in experts}) > 1:
            experts = [expert.relayout(PORTABLE) for expert in experts]
        first = experts[0]
        if any(expert._context() != first._context() for expert in experts):
            raise ValueError("stacked experts must have one scheme, shape, layout and dtype")
        packed, scales, tensor_scale = (
            None if getattr(first, part) is None else torch.stack([getattr(expert, part) for expert in experts])
            for part in _PARTS
        )
        return first._holding(packed, scales, tensor_scale, shape=(len(experts), *first.stored_shape))

    @property
    def weight(self) -> QuantizedWeight:
        """The codes and scales of an [N, K] tensor. Raise ValueError for experts; index them first."""
        if len(self.stored_shape) != 2:
            raise ValueError(f"a FloatTensor {list(self.shape)} holds several weights; index it first")
        return QuantizedWeight(
            scheme_named(self.scheme), self.stored_shape, self.code_layout, self.packed, self.scales, self.tensor_scale
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the decoded numbers, a plain tensor in `dtype` (this tensor's own if None)."""
        if len(self.stored_shape) == 3:
            values = torch.stack([self._expert(index).weight.dequantize() for index in range(self.stored_shape[0])])
        else:
            values = self.weight.dequantize()
        values = values.transpose(-1, -2) if self.transposed else values
        return (values.reshape(-1) if self.flat else values).to(dtype or self.dtype)

    def relayout(self, layout: str) -> Self:
        """Return the codes and scales in another layout of `fpxbench.numbers.packing`; this tensor if it has that one.

        Raise ValueError for a width or a shape that the layout does not support.
        """
        if layout == self.code_layout:
            return self
        if len(self.stored_shape) == 3:
            packed = torch.stack([self._expert(index).weight.relayout(layout).packed
                                  for index in range(self.stored_shape[0])])
        else:
            packed = self.weight.relayout(layout).packed
        return self._holding(packed, self.scales, self.tensor_scale, layout=layout)

    def portable(self) -> Self:
        """Return the codes and scales in a layout of separate rows that any device reads: this tensor if it has one,
        else planar rows."""
        return self if self.row_tile == 1 else self.relayout(PORTABLE)

    @property
    def row_tile(self) -> int | None:
        """The number of rows that the layout interleaves: `Layout.row_tile`."""
        return layout_named(self.code_layout).row_tile

    def laid_out(self) -> Self:
        """Return the codes and scales in the layout that the implementation reads on this device; this tensor if it has
        that layout, or if the implementation does not run here."""
        n, k = self.stored_shape[-2:]
        try:
            instance = instance_for(self.implementation, self.scheme, self.device.type, n, k)
        except ValueError:
            return self
        if len(self.stored_shape) == 3:
            layouts = {instance.stored(self._expert(index).weight).layout for index in range(self.stored_shape[0])}
            return self.relayout(layouts.pop() if len(layouts) == 1 else PORTABLE)
        stored = instance.stored(self.weight)
        return self if stored.layout == self.code_layout else self._holding(
            stored.packed, stored.scales, stored.tensor_scale, layout=stored.layout)

    def prepare(self) -> None:
        """Let the implementation precompute what it keeps beside this weight; do nothing if it does not run on this
        device."""
        n, k = self.stored_shape[-2:]
        try:
            instance = instance_for(self.implementation, self.scheme, self.device.type, n, k)
        except ValueError:
            return
        if len(self.stored_shape) == 2:
            instance.prepare(self.weight)
            return
        for expert in kept_experts(self.packed, self.scales, self.tensor_scale, self.scheme, self.code_layout, (n, k)):
            instance.prepare(expert)

    @property
    def nbytes_stored(self) -> int:
        """Bytes of codes and scales; `nbytes` is the size of the tensor that they represent."""
        return sum(part.nbytes for part in self._parts().values())

    def _parts(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in _PARTS if getattr(self, part) is not None}

    def _context(self) -> tuple[Any, ...]:
        return (self.scheme, self.code_layout, self.stored_shape, self.dtype, self.implementation, self.transposed,
                self.flat, self.is_copy)

    def context(self) -> dict[str, Any]:
        """Return the constructor's arguments other than the parts."""
        return dict(zip(_CONTEXT, self._context(), strict=True))

    def _holding(self, packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, **context: Any) -> Self:
        """Return a tensor of these parts, with this one's context updated by `context`."""
        return type(self)(packed, scales, tensor_scale, **(self.context() | context))

    def _with(self, change: Callable[[Tensor], Tensor], **context: Any) -> Self:
        """Return a tensor with `change` applied to each part, and the context updated by `context`."""
        packed, scales, tensor_scale = (
            None if getattr(self, part) is None else change(getattr(self, part)) for part in _PARTS
        )
        return self._holding(packed, scales, tensor_scale, **context)

    def _expert(self, index: int) -> Self:
        return self._with(lambda part: part[index], shape=self.stored_shape[1:])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return list(self._parts()), self._context()

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> Self:
        return cls(parts["packed"], parts["scales"], parts.get("tensor_scale"), *context)

    def _stable_hash_for_caching(self) -> str:
        """Return what compiled code depends on, as a key for PyTorch's compile cache."""
        parts = [(name, tuple(part.shape), part.dtype, part.device) for name, part in self._parts().items()]
        return repr((type(self).__name__, self._context(), parts))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = self._with(torch.clone, is_copy=False)
        memo[id(self)] = copy
        return copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (f"FloatTensor({list(self.shape)}, {self.scheme}, {self.dtype}, device='{self.device}', "
                f"implementation='{self.implementation}', {self.nbytes_stored} bytes)")

    # FSDP2: shards along dimension 0 are gathered part by part.

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return the rows that ranks gather, codes and scales as bytes, and the metadata for `fsdp_post_all_gather`."""
        scaling = scheme_named(self.scheme).scaling
        if scaling.block_rows != 1:
            raise NotImplementedError(f"{self.scheme} shares scales between rows, which shards along N would separate; "
                                      "FSDP2 needs a scheme with separate scales for each row")
        # One tensor: with a single rank, PyTorch 2.13 returns only the first.
        rows = torch.cat([self.packed, self.scales.contiguous().view(torch.uint8)], dim=1)
        return (rows,), (self._context(), self.tensor_scale, self.packed.shape[1], self.scales.dtype)

    def fsdp_post_all_gather(self, gathered: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *,
                             out: Self | None = None) -> Any:
        """Return the whole tensor and the parts to free after use; fill `out` instead if it is given."""
        (rows,), (context, tensor_scale, row_bytes, dtype) = gathered, metadata
        packed, scales = rows[:, :row_bytes].contiguous(), rows[:, row_bytes:].contiguous().view(dtype)
        if out is not None:
            out.packed.copy_(packed)
            out.scales.copy_(scales)
            return None
        known = dict(zip(_CONTEXT, context, strict=True))
        known |= {"shape": (packed.shape[0], known["shape"][-1]), "flat": False, "transposed": False}
        return FloatTensor(packed, scales, tensor_scale, **known), (packed, scales)

    # Operations.

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = OPERATIONS.get(func)
        if handler is None:
            raise NotImplementedError(
                f"FloatTensor does not implement {func}; dequantize() gives a plain tensor"
            )
        return handler(func, args, kwargs or {})


def _registering(table: dict[Any, Callable[..., Any]]) -> Callable[..., Any]:
    def of(*replaced: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def register(handler: Callable[..., Any]) -> Callable[..., Any]:
            table.update(dict.fromkeys(replaced, handler))
            return handler
        return register
    return of


function, operation = _registering(FUNCTIONS), _registering(OPERATIONS)
"""Decorators: register a handler for functions, or for operations."""

torch.serialization.add_safe_globals([FloatTensor])

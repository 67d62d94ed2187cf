"""FloatTensor: a quantized weight that an `nn.Linear` holds in place of its parameter.

It looks like a 16-bit tensor [N, K], or [E, N, K] of experts, and stores packed codes and scales. `F.linear` and
`torch.matmul` call an implementation's fused product through one custom operator, which `torch.compile` and
`torch.export` keep whole. What a quantized tensor cannot do raises NotImplementedError that names `dequantize()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any, Self

import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from fpxbench.model.operator import AUTO, resolve
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.weight import QuantizedWeight

_PARTS = ("packed", "scales", "tensor_scale")
_CONTEXT = ("scheme", "layout", "shape", "dtype", "implementation", "transposed", "flat")
_SLICED_ALONG_K = {"bytes": 1, "nibbles_low_first": 2, "nibbles_high_first": 2}
"""Layouts whose columns can be cut without moving a bit, and the codes in a byte."""


class FloatTensor(Tensor):
    """A quantized weight as a tensor.

    Parameters
    ----------
    packed : uint8 codes, ``[..., N, row_bytes]``
    scales : as `QuantizedWeight.scales`, ``[..., R, G]``
    tensor_scale : the second-level scale, fp32 ``[..., 1]``; None for schemes without one
    scheme, layout : names, as `QuantizedWeight` has them; attributes ``scheme`` and ``code_layout``
    shape : ``(N, K)`` or ``(E, N, K)``
    dtype : of the tensor that it stands for, and of `dequantize`
    implementation : which multiplies; ``auto`` is resolved for each scheme and device by `fpxbench.model.operator`
    transposed : whether the last two dimensions are swapped, as after ``.t()``
    flat : whether it is seen as one dimension, as FSDP2 keeps its shards
    """

    packed: Tensor
    scales: Tensor
    tensor_scale: Tensor | None

    @staticmethod
    def __new__(cls, packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, scheme: str, layout: str,
                shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, implementation: str = AUTO,
                transposed: bool = False, flat: bool = False) -> Self:
        outer = (*shape[:-2], shape[-1], shape[-2]) if transposed else tuple(shape)
        outer = (prod(shape),) if flat else outer
        return Tensor._make_wrapper_subclass(cls, outer, dtype=dtype, device=packed.device, requires_grad=False)

    def __init__(self, packed: Tensor, scales: Tensor, tensor_scale: Tensor | None, scheme: str, layout: str,
                 shape: Sequence[int], dtype: torch.dtype = torch.bfloat16, implementation: str = AUTO,
                 transposed: bool = False, flat: bool = False) -> None:
        self.packed, self.scales, self.tensor_scale = packed, scales, tensor_scale
        self.scheme, self.code_layout, self.stored_shape = scheme, layout, tuple(shape)
        self.implementation, self.transposed, self.flat = implementation, transposed, flat

    # Making and unmaking.

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16, implementation: str = AUTO
    ) -> Self:
        """Return a tensor that holds the codes and scales of `weight`.

        Raises ValueError for a dense weight, and for one whose layout is an implementation's own.
        """
        if not weight.has_codes or weight.extra:
            raise ValueError(
                f"a FloatTensor holds codes in a known layout; this {weight.scheme.name} weight is in {weight.layout!r}"
            )
        return cls(
            weight.packed,
            weight.scales,
            weight.tensor_scale,
            weight.scheme.name,
            weight.layout,
            weight.shape,
            dtype,
            implementation,
        )

    @classmethod
    def from_float(cls, values: Tensor, scheme: str | Scheme, implementation: str = AUTO) -> Self:
        """Quantize `values` [N, K] or [E, N, K], in the layout that `implementation` reads.

        Raises ValueError for values that no scale can hold, and for an implementation that does not take the scheme.
        """
        chosen = scheme_named(scheme) if isinstance(scheme, str) else scheme
        name, cls_of = resolve(implementation, chosen, values.device.type)
        with torch.no_grad():
            if values.dim() == 3:
                return cls.stack([cls.from_float(expert, chosen, name) for expert in values])
            codes, scales = chosen.quantize(values.detach())
        weight = QuantizedWeight.from_codes(codes, scales, chosen, cls_of.layout)
        return cls.from_weight(
            weight, values.dtype if values.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16, name
        )

    @classmethod
    def stack(cls, experts: Sequence[Self]) -> Self:
        """Return one tensor [E, N, K] of experts [N, K] that are alike. Raises ValueError if they are not."""
        first = experts[0]
        if any(expert._context() != first._context() for expert in experts):
            raise ValueError("experts that are stacked have one scheme, shape, layout and dtype")
        packed, scales, tensor_scale = (
            None if getattr(first, part) is None else torch.stack([getattr(expert, part) for expert in experts])
            for part in _PARTS
        )
        return cls(packed, scales, tensor_scale, first.scheme, first.code_layout,
                   (len(experts), *first.stored_shape), first.dtype, first.implementation)

    @property
    def weight(self) -> QuantizedWeight:
        """The codes and scales of a [N, K] tensor. Raises ValueError for experts; take one of them first."""
        if len(self.stored_shape) != 2:
            raise ValueError(f"a FloatTensor {list(self.shape)} holds several weights; index it first")
        return QuantizedWeight(
            scheme_named(self.scheme), self.stored_shape, self.code_layout, self.packed, self.scales, self.tensor_scale
        )

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the numbers that the codes stand for, a plain tensor in `dtype` (this tensor's own if None)."""
        if len(self.stored_shape) == 3:
            values = torch.stack([self._expert(index).weight.dequantize() for index in range(self.stored_shape[0])])
        else:
            values = self.weight.dequantize()
        values = values.transpose(-1, -2) if self.transposed else values
        return (values.reshape(-1) if self.flat else values).to(dtype or self.dtype)

    @property
    def nbytes_stored(self) -> int:
        """Bytes of codes and scales, where `nbytes` is of the tensor that it stands for."""
        return sum(part.nbytes for part in self._parts().values())

    def _parts(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in _PARTS if getattr(self, part) is not None}

    def _context(self) -> tuple[Any, ...]:
        return (self.scheme, self.code_layout, self.stored_shape, self.dtype, self.implementation, self.transposed,
                self.flat)

    def _with(self, change: Callable[[Tensor], Tensor], **context: Any) -> Self:
        """Return a tensor whose parts are changed, and of whose context what is named."""
        known: dict[str, Any] = dict(zip(_CONTEXT, self._context(), strict=True))
        packed, scales, tensor_scale = (
            None if getattr(self, part) is None else change(getattr(self, part)) for part in _PARTS
        )
        return type(self)(packed, scales, tensor_scale, **(known | context))

    def _expert(self, index: int) -> Self:
        return self._with(lambda part: part[index], shape=self.stored_shape[1:])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return list(self._parts()), self._context()

    @classmethod
    def __tensor_unflatten__(
        cls, parts: dict[str, Tensor], context: tuple[Any, ...], outer_size: Any, outer_stride: Any
    ) -> Self:
        return cls(parts["packed"], parts["scales"], parts.get("tensor_scale"), *context)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = self._with(torch.clone)
        memo[id(self)] = copy
        return copy

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (f"FloatTensor({list(self.shape)}, {self.scheme}, {self.dtype}, device='{self.device}', "
                f"implementation='{self.implementation}', {self.nbytes_stored} bytes)")

    # FSDP2: shards along dimension 0 are gathered part by part.

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return what ranks gather, each row's codes and scales as bytes, and what `fsdp_post_all_gather` needs
        besides.
        """
        scaling = scheme_named(self.scheme).scaling
        if scaling.block_rows != 1:
            raise NotImplementedError(f"{self.scheme} has scales over several rows, which shards along N would cut; "
                                      "FSDP2 takes schemes with scales of their own for each row")
        # One tensor: with a single rank, PyTorch 2.13 hands back the first alone.
        rows = torch.cat([self.packed, self.scales.contiguous().view(torch.uint8)], dim=1)
        return (rows,), (self._context(), self.tensor_scale, self.packed.shape[1], self.scales.dtype)

    def fsdp_post_all_gather(self, gathered: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *,
                             out: Self | None = None) -> Any:
        """Return the whole tensor and what of it is freed after use; fill `out` instead, if there is one."""
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
        handler = _FUNCTIONS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _OPERATIONS.get(func)
        if handler is None:
            raise NotImplementedError(
                f"FloatTensor does not implement {func}; dequantize() gives a plain tensor that does"
            )
        return handler(func, args, kwargs or {})


_FUNCTIONS: dict[Any, Callable[..., Any]] = {}
_OPERATIONS: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {}


def _function(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _FUNCTIONS.update(dict.fromkeys(functions, handler))
        return handler
    return register


def _operation(*operations: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        _OPERATIONS.update(dict.fromkeys(operations, handler))
        return handler
    return register


# Products.


@_function(torch.nn.functional.linear)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, FloatTensor):
        raise NotImplementedError("a FloatTensor is a weight; as an activation, use its dequantize()")
    if weight.transposed or len(weight.stored_shape) != 2:
        raise NotImplementedError(
            f"linear takes a weight [N, K], not {list(weight.shape)}; dequantize() gives a plain tensor"
        )
    n, k = weight.stored_shape
    if x.shape[-1] != k:
        raise RuntimeError(
            f"an activation {list(x.shape)} does not multiply a weight [{n}, {k}]: its last dimension is not {k}"
        )
    return torch.ops.fpxbench.linear(
        x,
        weight.packed,
        weight.scales,
        weight.tensor_scale,
        bias,
        weight.scheme,
        weight.code_layout,
        weight.implementation,
        n,
        k,
    )


@_function(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(weight, FloatTensor) and weight.transposed and len(weight.stored_shape) == 2:
        return _linear(x, weight.t())
    raise NotImplementedError("a FloatTensor [N, K] is multiplied as x @ weight.t(); dequantize() gives a plain tensor")


_aten = torch.ops.aten


@_operation(_aten.mm.default)
def _mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _matmul(*args)


@_operation(_aten.addmm.default)
def _addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    bias, x, weight = args
    if kwargs or not (isinstance(weight, FloatTensor) and weight.transposed):
        raise NotImplementedError(
            "addmm takes a bias, x and weight.t() without factors; dequantize() gives a plain tensor"
        )
    return _linear(x, weight.t(), bias)


@_operation(_aten._grouped_mm.default)
def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Multiply rows ``[T, K]``, in runs that end at `offs`, by one expert each: [E, K, N] as a transposed
    FloatTensor.
    """
    x, weight, *more = args
    offsets = more[0] if more else kwargs.get("offs")
    if not (isinstance(weight, FloatTensor) and weight.transposed and len(weight.stored_shape) == 3 and x.dim() == 2):
        raise NotImplementedError(
            "grouped_mm takes rows [T, K] and experts [E, N, K].transpose(1, 2); dequantize() gives a plain tensor"
        )
    ends = [0, *offsets.tolist()]
    out = x.new_empty(len(x), weight.stored_shape[1])
    for expert, (first, last) in enumerate(pairwise(ends)):
        if last > first:
            out[first:last] = _linear(x[first:last], weight._expert(expert).t())
    return out


# Copies and views of all of it.


@_operation(_aten.detach.default, _aten.alias.default)
def _alias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    return return_and_correct_aliasing(func, args, kwargs, args[0]._with(func))


@_operation(_aten.clone.default)
def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    return args[0]._with(torch.clone)


@_operation(_aten._to_copy.default)
def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor, dtype, device = args[0], kwargs.get("dtype") or args[0].dtype, kwargs.get("device")
    if dtype not in (torch.bfloat16, torch.float16):
        # fp32 and wider: what holds the numbers themselves.
        return tensor.dequantize(dtype).to(device)
    return tensor._with(
        lambda part: part.to(device, copy=True, non_blocking=kwargs.get("non_blocking", False)), dtype=dtype
    )


@_operation(_aten.copy_.default)
def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    target, source = args[:2]
    if not isinstance(target, FloatTensor):
        return target.copy_(source.dequantize(target.dtype))
    if target.shape != source.shape:
        raise RuntimeError(f"a FloatTensor {list(target.shape)} cannot be filled from {list(source.shape)}")
    if not isinstance(source, FloatTensor):
        values = source.transpose(-1, -2) if target.transposed else source
        source = FloatTensor.from_float(values.to(target.device), target.scheme, target.implementation)
    if source.scheme != target.scheme:
        raise RuntimeError(
            f"a {target.scheme} tensor cannot hold the codes of a {source.scheme} one; copy its dequantize()"
        )
    if source.code_layout != target.code_layout:
        source = FloatTensor.from_weight(
            source.weight.relayout(target.code_layout), source.dtype, source.implementation
        )
    for part, values in source._parts().items():
        getattr(target, part).copy_(values)
    return target


@_operation(_aten.t.default, _aten.transpose.int)
def _transpose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    tensor, *dimensions = args
    count = tensor.dim()
    chosen = {dimension % count for dimension in dimensions} or {0, 1}
    if chosen != {count - 1, count - 2}:
        raise NotImplementedError(
            f"transpose swaps the last two of {count} dimensions, not {dimensions}; dequantize() gives a plain tensor"
        )
    return return_and_correct_aliasing(
        func, args, kwargs, tensor._with(lambda part: part, transposed=not tensor.transposed)
    )


@_operation(_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    tensor, shape = args
    if list(shape) == [-1] or list(shape) == [tensor.numel()]:
        return return_and_correct_aliasing(func, args, kwargs, tensor._with(lambda part: part, flat=True))
    if tensor.flat:
        tensor = tensor._with(lambda part: part, flat=False)
    known = [tensor.numel() // max(1, -prod(shape)) if size == -1 else size for size in shape]
    if known != list(tensor.shape):
        raise NotImplementedError(
            f"a FloatTensor {list(tensor.shape)} cannot be viewed as {list(shape)}: its codes are packed by rows; "
            "dequantize() gives a plain tensor"
        )
    return return_and_correct_aliasing(func, args, kwargs, tensor._with(lambda part: part))


# Parts of it.


@_operation(_aten.select.int)
def _select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor, dimension, index = args
    if len(tensor.stored_shape) == 3 and dimension % 3 == 0:
        return return_and_correct_aliasing(func, args, kwargs, tensor._expert(index))
    return tensor.dequantize().select(dimension, index)


@_operation(_aten.slice.Tensor)
def _slice(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    tensor, dimension, start, stop, step = (*args, *(0, None, None, 1)[len(args) - 1:])
    if step != 1:
        raise NotImplementedError("a FloatTensor is sliced without steps; dequantize() gives a plain tensor")
    dimension %= tensor.dim()
    first, last, _ = slice(start, stop).indices(tensor.shape[dimension])
    if tensor.transposed and dimension >= tensor.dim() - 2:
        dimension = 2 * tensor.dim() - 3 - dimension
    return return_and_correct_aliasing(func, args, kwargs, sliced(tensor, dimension, first, max(first, last)))


def sliced(tensor: FloatTensor, dimension: int, first: int, last: int) -> FloatTensor:
    """Return rows, columns or experts `first` to `last`, sharing memory. `dimension` is of the stored shape.

    Raises NotImplementedError where the cut would go through a byte or through a block that shares a scale.
    """
    count, shape, scaling = len(tensor.stored_shape), list(tensor.stored_shape), scheme_named(tensor.scheme).scaling
    shape[dimension] = last - first
    if count == 3 and dimension == 0:
        return tensor._with(lambda part: part[first:last], shape=tuple(shape))
    rows, columns = scaling.block_shape(*tensor.stored_shape[-2:])
    along_k = dimension == count - 1
    block, size = (columns, tensor.stored_shape[-1]) if along_k else (rows, tensor.stored_shape[-2])
    whole = first == 0 and last == size
    shared = scaling.block is None if along_k else scaling.block_rows is None      # one scale for the whole dimension
    if not whole and not shared and (first % block or (last % block and last != size)):
        raise NotImplementedError(
            f"a cut at {first}:{last} goes through blocks of {block} that share a scale; cut at multiples of {block}"
        )
    if along_k and not whole:
        codes_per_byte = _SLICED_ALONG_K.get(tensor.code_layout)
        if codes_per_byte is None:
            raise NotImplementedError(
                f"columns of layout {tensor.code_layout!r} share bytes; store it as 'bytes' or nibbles to cut along K"
            )
        if first % codes_per_byte or (last % codes_per_byte and last != size):
            raise NotImplementedError(
                f"a cut at {first}:{last} goes through a byte, which holds {codes_per_byte} codes"
            )
        packed = tensor.packed[..., first // codes_per_byte:-(-last // codes_per_byte)]
    else:
        packed = tensor.packed if along_k else tensor.packed[..., first:last, :]
    scales = tensor.scales
    if not whole and not shared:
        cut = slice(first // block, -(-last // block))
        scales = scales[..., cut] if along_k else scales[..., cut, :]
    return FloatTensor(
        packed,
        scales,
        tensor.tensor_scale,
        tensor.scheme,
        tensor.code_layout,
        shape,
        tensor.dtype,
        tensor.implementation,
        tensor.transposed,
    )


@_operation(_aten.split.Tensor, _aten.split_with_sizes.default)
def _split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FloatTensor]:
    tensor, sizes, dimension = (*args, *(0,)[len(args) - 2:])
    length = tensor.shape[dimension]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
    ends = [sum(sizes[:at]) for at in range(len(sizes) + 1)]
    return [
        _slice(_aten.slice.Tensor, (tensor, dimension, first, last), {})
        for first, last in zip(ends, ends[1:], strict=False)
    ]


@_operation(_aten.cat.default)
def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    tensors, dimension = (*args, *(0,)[len(args) - 1:])
    first = tensors[0]
    if not all(isinstance(tensor, FloatTensor) for tensor in tensors) or dimension != 0 or first.transposed:
        raise NotImplementedError(
            "FloatTensors are joined with each other along N (dimension 0); dequantize() gives plain tensors"
        )
    alike = [(tensor.scheme, tensor.code_layout, tensor.dtype, tensor.stored_shape[1:]) for tensor in tensors]
    if len(set(alike)) > 1:
        raise NotImplementedError(
            f"tensors of one scheme, layout, dtype and K are joined, not {sorted(map(str, set(alike)))}"
        )
    scaling = scheme_named(first.scheme).scaling
    for tensor in tensors[1:]:
        if tensor.tensor_scale is not None and not torch.equal(tensor.tensor_scale, first.tensor_scale):
            raise NotImplementedError(
                f"{first.scheme} weights under different tensor scales have no common one; quantize them "
                "with shared_amax, or join their dequantize()"
            )
        if scaling.block_rows is None and not torch.equal(tensor.scales, first.scales):
            raise NotImplementedError(
                f"{first.scheme} weights under different scales have no common one; join their dequantize()"
            )
    if scaling.block_rows not in (1, None) and any(
        tensor.stored_shape[0] % scaling.block_rows for tensor in tensors[:-1]
    ):
        raise NotImplementedError(
            f"a weight that ends inside a block of {scaling.block_rows} rows can only be the last"
        )
    scales = first.scales if scaling.block_rows is None else torch.cat([tensor.scales for tensor in tensors])
    shape = (sum(tensor.stored_shape[0] for tensor in tensors), *first.stored_shape[1:])
    return FloatTensor(
        torch.cat([tensor.packed for tensor in tensors]),
        scales,
        first.tensor_scale,
        first.scheme,
        first.code_layout,
        shape,
        first.dtype,
        first.implementation,
    )


@_operation(_aten.equal.default)
def _equal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    one, other = args
    if not (isinstance(one, FloatTensor) and isinstance(other, FloatTensor)):
        plain = [tensor.dequantize() if isinstance(tensor, FloatTensor) else tensor for tensor in args]
        return torch.equal(*plain)
    if one._context()[:3] != other._context()[:3] or one.transposed != other.transposed:
        return False
    return all(torch.equal(part, getattr(other, name)) for name, part in one._parts().items())


@_operation(_aten.empty_like.default, _aten.zeros_like.default, _aten.new_empty.default, _aten.new_zeros.default)
def _made_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    """Return what FSDP2 and checkpoint loaders fill afterwards. Codes and scales of zero are zeros."""
    tensor = args[0]
    shape = tuple(args[1]) if len(args) > 1 else tensor.stored_shape
    if len(shape) != len(tensor.stored_shape) or shape[-1] != tensor.stored_shape[-1]:
        raise NotImplementedError(f"a FloatTensor like {list(tensor.shape)} has its K; asked for {list(shape)}")
    rows, columns = scheme_named(tensor.scheme).scaling.grid_shape(*shape[-2:])
    lead = shape[:-2]
    device = kwargs.get("device") or tensor.device
    packed = torch.zeros(*lead, shape[-2], tensor.packed.shape[-1], dtype=torch.uint8, device=device)
    scales = torch.zeros(*lead, rows, columns, dtype=tensor.scales.dtype, device=device)
    tensor_scale = None if tensor.tensor_scale is None else torch.zeros(*lead, 1, device=device)
    return FloatTensor(
        packed,
        scales,
        tensor_scale,
        tensor.scheme,
        tensor.code_layout,
        shape,
        kwargs.get("dtype") or tensor.dtype,
        tensor.implementation,
    )


@_operation(_aten.as_strided.default)
def _as_strided(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    """Return the view by which FSDP2 restores the parameter's shape of its flat shard."""
    tensor, size, stride = args[:3]
    if tuple(size) != tensor.stored_shape or list(stride) != [tensor.stored_shape[-1], 1]:
        raise NotImplementedError(
            f"as_strided gives a FloatTensor {list(tensor.stored_shape)} back in its own shape, not "
            f"{list(size)}; dequantize() gives a plain tensor"
        )
    return return_and_correct_aliasing(func, args, kwargs, tensor._with(lambda part: part, flat=False))


@_operation(torch.ops.c10d.broadcast_.default, torch.ops.c10d.scatter_.default)
def _communicate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Send the parts one after the other: what DTensor does when it distributes a tensor from rank 0."""
    first = next(tensor for tensor in tree_leaves(args) if isinstance(tensor, FloatTensor))
    result = None
    for part in first._parts():
        result = func(
            *tree_map(lambda each, part=part: getattr(each, part) if isinstance(each, FloatTensor) else each, args),
            **kwargs,
        )
        result[-1].wait()
    return args[0], result[-1]


@_operation(_aten.is_pinned.default)
def _is_pinned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return args[0].packed.is_pinned()


@_operation(_aten._pin_memory.default)
def _pin_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    return args[0]._with(lambda part: part.pin_memory())


torch.serialization.add_safe_globals([FloatTensor])

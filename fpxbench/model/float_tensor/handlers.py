"""Products, copies and views of a FloatTensor, and the operations of distributed training and checkpoint loaders."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from fpxbench.model.float_tensor.subclass import FloatTensor, function, operation
from fpxbench.numbers.scheme import scheme_named

_aten = torch.ops.aten

# Products.


# The parameters' names are PyTorch's, as callers may pass them by name.
@function(torch.nn.functional.linear)
def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, FloatTensor):
        raise NotImplementedError("a FloatTensor is a weight; as an activation, use its dequantize()")
    if weight.transposed or len(weight.stored_shape) != 2:
        raise NotImplementedError(
            f"linear takes a weight [N, K], not {list(weight.shape)}; dequantize() gives a plain tensor"
        )
    n, k = weight.stored_shape
    if input.shape[-1] != k:
        raise RuntimeError(
            f"an activation {list(input.shape)} does not multiply a weight [{n}, {k}]: its last dimension is not {k}"
        )
    return torch.ops.fpxbench.linear(input, weight.packed, weight.scales, weight.tensor_scale, bias, weight.scheme,
                                     weight.code_layout, weight.implementation, n, k)


@function(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if isinstance(other, FloatTensor) and other.transposed and len(other.stored_shape) == 2:
        return _linear(input, other.t())
    raise NotImplementedError("a FloatTensor [N, K] is multiplied as x @ weight.t(); dequantize() gives a plain tensor")


@function(torch.mm, Tensor.mm)
def _matrix_product(input: Tensor, mat2: Tensor) -> Tensor:
    return _matmul(input, mat2)


@operation(_aten.mm.default)
def _mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _matmul(*args)


@operation(_aten.addmm.default)
def _addmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    bias, x, weight = args
    if kwargs or not (isinstance(weight, FloatTensor) and weight.transposed):
        raise NotImplementedError(
            "addmm takes a bias, x and weight.t() without factors; dequantize() gives a plain tensor"
        )
    return _linear(x, weight.t(), bias)


@function(*{getattr(torch.nn.functional, "grouped_mm", torch._grouped_mm), torch._grouped_mm})
def _grouped(x: Tensor, weight: Tensor, *, offs: Tensor | None = None, bias: Tensor | None = None,
             out_dtype: torch.dtype | None = None) -> Tensor:
    """Multiply rows [T, K], grouped by expert with group ends `offs`, by a transposed FloatTensor [E, K, N]."""
    if (not (isinstance(weight, FloatTensor) and weight.transposed and len(weight.stored_shape) == 3 and x.dim() == 2)
            or offs is None or bias is not None or out_dtype not in (None, x.dtype)):
        raise NotImplementedError(
            "grouped_mm takes rows [T, K], experts [E, N, K].transpose(1, 2), and offs;"
            " dequantize() gives a plain tensor"
        )
    _, n, k = weight.stored_shape
    return torch.ops.fpxbench.grouped_linear(
        x, weight.packed, weight.scales, weight.tensor_scale, offs, weight.scheme, weight.code_layout,
        weight.implementation, n, k)


@operation(_aten._grouped_mm.default)
def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = dict(zip(("offs", "bias", "out_dtype"), args[2:], strict=False))
    return _grouped(*args[:2], **named, **kwargs)


# Copies and views of a whole tensor.


@operation(_aten.detach.default, _aten.alias.default)
def _alias(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    return return_and_correct_aliasing(func, args, kwargs, args[0]._with(func))


@operation(_aten.clone.default)
def _clone(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    return args[0]._with(torch.clone, is_copy=False)


@operation(_aten._to_copy.default)
def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor, dtype, device = args[0], kwargs.get("dtype") or args[0].dtype, kwargs.get("device")
    if dtype not in (torch.bfloat16, torch.float16):
        # fp32 and wider asks for the numbers themselves.
        return tensor.dequantize(dtype).to(device)
    moved = tensor._with(lambda part: part.to(device, copy=True, non_blocking=kwargs.get("non_blocking", False)),
                         dtype=dtype, is_copy=False)
    elsewhere = moved.device.type != tensor.device.type and not (moved.flat or moved.transposed)
    return moved.laid_out() if elsewhere and _has_values(tensor.packed) and _has_values(moved.packed) else moved


def _has_values(part: Tensor) -> bool:
    """Return whether codes can be read: not on the meta device, and not a compiler's tracing tensor."""
    return type(part) is Tensor and not part.is_meta and not torch._is_functional_tensor(part)


@operation(_aten.copy_.default)
def _copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    target, source = args[:2]
    if not isinstance(target, FloatTensor):
        return target.copy_(source.dequantize(target.dtype))
    if target.shape != source.shape:
        raise RuntimeError(f"a FloatTensor {list(target.shape)} cannot be filled from {list(source.shape)}")
    if target.is_copy:
        raise NotImplementedError(
            "these rows are a copy, since the tensor that they were cut from interleaves rows: writes to them would be"
            " lost; cut at other rows, or write into slices of the tensor's portable()"
        )
    if not isinstance(source, FloatTensor):
        values = source.transpose(-1, -2) if target.transposed else source
        source = FloatTensor.from_float(values.to(target.device), target.scheme, target.implementation)
    elif source.transposed != target.transposed:
        raise RuntimeError(
            f"a FloatTensor stored as {list(target.stored_shape)} cannot hold the codes of one stored as"
            f" {list(source.stored_shape)}: one of them is transposed; copy its dequantize()"
        )
    if source.scheme != target.scheme:
        raise RuntimeError(
            f"a {target.scheme} tensor cannot hold the codes of a {source.scheme} one; copy its dequantize()"
        )
    if source.code_layout != target.code_layout:
        source = source.relayout(target.code_layout)
    for part, values in source._parts().items():
        getattr(target, part).copy_(values)
    return target


@operation(_aten.t.default, _aten.transpose.int)
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


@operation(_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
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


# Comparison, allocation, communication, memory.


@operation(_aten.equal.default)
def _equal(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    one, other = args
    if not (isinstance(one, FloatTensor) and isinstance(other, FloatTensor)):
        plain = [tensor.dequantize() if isinstance(tensor, FloatTensor) else tensor for tensor in args]
        return torch.equal(*plain)
    if (one.scheme, one.stored_shape, one.transposed) != (other.scheme, other.stored_shape, other.transposed):
        return False
    other = other.relayout(one.code_layout)
    return all(torch.equal(part, getattr(other, name)) for name, part in one._parts().items())


@operation(_aten.empty_like.default, _aten.zeros_like.default, _aten.new_empty.default, _aten.new_zeros.default)
def _made_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    """Return a tensor of zeros for FSDP2 and checkpoint loaders to fill: code 0 with scale 0 decodes to 0."""
    tensor = args[0]
    shape = tensor.stored_shape
    if len(args) > 1:
        shape = tuple(args[1])
        shape = (*shape[:-2], shape[-1], shape[-2]) if tensor.transposed and len(shape) > 1 else shape
    if len(shape) != len(tensor.stored_shape) or shape[-1] != tensor.stored_shape[-1]:
        raise NotImplementedError(f"a FloatTensor like {list(tensor.shape)} must have its K; asked for {list(args[1])}")
    if tensor.row_tile is None or shape[-2] % tensor.row_tile:
        tensor = tensor.portable()
    rows, columns = scheme_named(tensor.scheme).scaling.grid_shape(*shape[-2:])
    lead = shape[:-2]
    device = kwargs.get("device") or tensor.device
    packed = torch.zeros(*lead, shape[-2], tensor.packed.shape[-1], dtype=torch.uint8, device=device)
    scales = torch.zeros(*lead, rows, columns, dtype=tensor.scales.dtype, device=device)
    tensor_scale = None if tensor.tensor_scale is None else torch.zeros(*lead, 1, device=device)
    return tensor._holding(packed, scales, tensor_scale, shape=shape, dtype=kwargs.get("dtype") or tensor.dtype,
                           flat=False, is_copy=False)


@operation(_aten.as_strided.default)
def _as_strided(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    """Return the view with which FSDP2 restores a parameter's shape from its flat shard."""
    tensor, size, stride = args[:3]
    if tuple(size) != tensor.stored_shape or list(stride) != [tensor.stored_shape[-1], 1]:
        raise NotImplementedError(
            f"as_strided takes a FloatTensor's own shape {list(tensor.stored_shape)}, not "
            f"{list(size)}; dequantize() gives a plain tensor"
        )
    return return_and_correct_aliasing(func, args, kwargs, tensor._with(lambda part: part, flat=False))


@operation(torch.ops.c10d.broadcast_.default, torch.ops.c10d.scatter_.default)
def _communicate(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Send the parts one after the other, as DTensor distributes a tensor from rank 0."""
    first = next(tensor for tensor in tree_leaves(args) if isinstance(tensor, FloatTensor))
    result = None
    for part in first._parts():
        result = func(
            *tree_map(lambda each, part=part: getattr(each, part) if isinstance(each, FloatTensor) else each, args),
            **kwargs,
        )
        result[-1].wait()
    return args[0], result[-1]


@function(Tensor.share_memory_)
def _share_memory(tensor: FloatTensor) -> FloatTensor:
    """Move the parts to shared memory. PyTorch would crash on the wrapper itself, which has no storage."""
    for part in tensor._parts().values():
        part.share_memory_()
    return tensor


@function(Tensor.is_shared)
def _is_shared(tensor: FloatTensor) -> bool:
    return all(part.is_shared() for part in tensor._parts().values())


@function(Tensor.numpy, Tensor.tolist)
def _no_memory_of_numbers(tensor: FloatTensor, *args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("a FloatTensor stores codes, not numbers; dequantize() gives a plain tensor")


@operation(_aten.is_pinned.default)
def _is_pinned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return args[0].packed.is_pinned()


@operation(_aten._pin_memory.default)
def _pin_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    return args[0]._with(lambda part: part.pin_memory())

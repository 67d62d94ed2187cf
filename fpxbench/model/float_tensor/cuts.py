"""Slice and concatenate FloatTensors by rows, columns and experts, never through a byte or a block."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from fpxbench.model.float_tensor.subclass import FloatTensor, operation
from fpxbench.numbers.scheme import scheme_named

_aten = torch.ops.aten
_SLICED_ALONG_K = {"bytes": 1, "nibbles_low_first": 2, "nibbles_high_first": 2}
"""Layouts whose columns can be sliced without moving a bit -> codes per byte."""


@operation(_aten.select.int)
def _select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensor, dimension, index = args
    if len(tensor.stored_shape) == 3 and dimension % 3 == 0:
        return return_and_correct_aliasing(func, args, kwargs, tensor._expert(index))
    return tensor.dequantize().select(dimension, index)


@operation(_aten.slice.Tensor)
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
    """Return rows, columns or experts `first` to `last` (exclusive). `dimension` indexes the stored shape.

    The result shares memory with `tensor`, unless the cut separates rows that the layout interleaves: then it is a copy
    in planar rows, with `FloatTensor.is_copy`. Raise NotImplementedError for a cut through a byte or through a block
    that shares a scale.
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
                f"columns of layout {tensor.code_layout!r} share bytes; to cut along K, convert it with"
                " relayout('bytes') or, for 4-bit codes, relayout('nibbles_low_first')"
            )
        if first % codes_per_byte or (last % codes_per_byte and last != size):
            raise NotImplementedError(
                f"a cut at {first}:{last} goes through a byte, which holds {codes_per_byte} codes"
            )
        packed = tensor.packed[..., first // codes_per_byte:-(-last // codes_per_byte)]
    else:
        if not (whole or along_k) and (tensor.row_tile is None or first % tensor.row_tile or last % tensor.row_tile):
            tensor = tensor.portable()._with(lambda part: part, is_copy=True)
        packed = tensor.packed if along_k else tensor.packed[..., first:last, :]
    scales = tensor.scales
    if not whole and not shared:
        cut = slice(first // block, -(-last // block))
        scales = scales[..., cut] if along_k else scales[..., cut, :]
    return tensor._holding(packed, scales, tensor.tensor_scale, shape=tuple(shape), flat=False)


@operation(_aten.split.Tensor, _aten.split_with_sizes.default)
def _split(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[FloatTensor]:
    tensor, sizes, dimension = (*args, *(0,)[len(args) - 2:])
    length = tensor.shape[dimension]
    if isinstance(sizes, int):
        sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
    return [
        _slice(_aten.slice.Tensor, (tensor, dimension, first, last), {})
        for first, last in pairwise(accumulate(sizes, initial=0))
    ]


@operation(_aten.cat.default)
def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> FloatTensor:
    tensors, dimension = (*args, *(0,)[len(args) - 1:])
    if len({tensor.code_layout for tensor in tensors if isinstance(tensor, FloatTensor)}) > 1:
        tensors = [tensor.portable() if isinstance(tensor, FloatTensor) else tensor for tensor in tensors]
    first = tensors[0]
    if not all(isinstance(tensor, FloatTensor) for tensor in tensors) or dimension != 0 or first.transposed:
        raise NotImplementedError(
            "cat joins FloatTensors with each other, along N (dimension 0); dequantize() gives plain tensors"
        )
    alike = [(tensor.scheme, tensor.code_layout, tensor.dtype, tensor.stored_shape[1:]) for tensor in tensors]
    if len(set(alike)) > 1:
        raise NotImplementedError(
            f"cat joins tensors of one scheme, layout, dtype and K, not {sorted(map(str, set(alike)))}"
        )
    scaling = scheme_named(first.scheme).scaling
    for tensor in tensors[1:]:
        if tensor.tensor_scale is not None and not torch.equal(tensor.tensor_scale, first.tensor_scale):
            raise NotImplementedError(
                f"{first.scheme} weights have different tensor scales; quantize them "
                "with shared_amax, or join their dequantize()"
            )
        if scaling.block_rows is None and not torch.equal(tensor.scales, first.scales):
            raise NotImplementedError(
                f"{first.scheme} weights have different scales; join their dequantize()"
            )
    if scaling.block_rows not in (1, None) and any(
        tensor.stored_shape[0] % scaling.block_rows for tensor in tensors[:-1]
    ):
        raise NotImplementedError(
            f"a weight that ends inside a block of {scaling.block_rows} rows can only be the last"
        )
    scales = first.scales if scaling.block_rows is None else torch.cat([tensor.scales for tensor in tensors])
    shape = (sum(tensor.stored_shape[0] for tensor in tensors), *first.stored_shape[1:])
    return first._holding(torch.cat([tensor.packed for tensor in tensors]), scales, first.tensor_scale, shape=shape,
                          flat=False, is_copy=False)

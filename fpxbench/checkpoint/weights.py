"""Read a checkpoint's layer as the weight that implementations take: its own codes and scales, unchanged."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fpxbench.checkpoint.gguf_header import BLOCK_TYPES
from fpxbench.checkpoint.layers import QuantizedLayer
from fpxbench.checkpoint.tensor_entry import CheckpointError, TensorEntry
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.weight import QuantizedWeight

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_weight(layer: QuantizedLayer, expert: int = 0, rows: slice = slice(None)) -> QuantizedWeight:
    """Return `layer`'s weight [N, K] (of one expert, and of `rows` only) with the file's codes and scales.

    Raises CheckpointError where the layer has no scheme, no such expert, or a part that is missing.
    """
    if layer.scheme is None or layer.problems:
        raise CheckpointError("; ".join(layer.problems) or f"{layer.name}: its scheme is not known")
    if not 0 <= expert < layer.experts:
        raise CheckpointError(f"{layer.name} has {layer.experts} experts; {expert} is not one of them")
    scheme = scheme_named(layer.scheme)
    if layer.dialect.interleaved:
        return _of_gguf(layer, scheme, expert, rows)
    size = layer.codes.nbytes // layer.experts
    packed = _tensor(layer.codes, expert * size, size).reshape(layer.n, -1)
    stored = _scales(layer, scheme, expert)
    tensor_scale = _global_scale(layer, scheme, expert)
    _check_values(layer, scheme)
    _check_zero_points(layer)
    weight = QuantizedWeight(scheme, (layer.n, layer.k), layer.element.layout, packed, stored, tensor_scale)
    return weight if rows == slice(None) else rows_of(weight, rows)


def _check_values(layer: QuantizedLayer, scheme: Scheme) -> None:
    """Raise CheckpointError if the file's own table of numbers is not the format's."""
    if "values" not in layer.described_by:
        return
    entry, fmt = layer.described_by["values"], scheme.format
    held = read_plain(entry).reshape(-1)
    due = torch.tensor([fmt.value(code) for code in range(1 << fmt.bits)])
    if held.shape != due.shape:
        raise CheckpointError(f"{layer.name}: its table holds {len(held)} numbers, but {fmt.name} has {len(due)}")
    wrong = (held != due).nonzero().reshape(-1).tolist()
    if wrong:
        raise CheckpointError(f"{layer.name}: its table holds {held[wrong[0]].item():.8g} for code {wrong[0]}, but"
                              f" {fmt.name} has {due[wrong[0]].item():.8g} ({len(wrong)} codes differ)")


def _check_zero_points(layer: QuantizedLayer) -> None:
    """Raise CheckpointError if a zero point is not 0."""
    entry = layer.described_by.get("zero points")
    if entry is not None and entry.raw().any():
        raise CheckpointError(f"{layer.name}: {entry.name} is not zero everywhere: its codes have an offset, which no"
                              " scheme has")


def read_numbers(layer: QuantizedLayer, expert: int = 0) -> Tensor:
    """Return a layer's decoded numbers, fp32 [N, K].

    GGUF's Q4_1, a number and an offset for each block, is decoded too, although it has no scheme. Raises
    CheckpointError as `read_weight` does.
    """
    if layer.decodes_without_scheme:
        blocks = _gguf_blocks(layer, expert)
        scale, offset = blocks[..., :4].contiguous().view(torch.float16).float().split(1, dim=-1)
        return (_halves(blocks[..., 4:]) * scale + offset).reshape(layer.n, layer.k)
    return read_weight(layer, expert).dequantize()


def rows_of(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    """Return the weight's `rows`; the first must begin a block of the scales.

    Raises CheckpointError for a first row inside a block.
    """
    first, last, _ = rows.indices(weight.shape[0])
    block = weight.scheme.scaling.block_rows
    scales = weight.scales
    if block is not None:
        if first % block:
            raise CheckpointError(f"row {first} lies inside a block of {block} rows that share a scale")
        scales = scales[first // block:-(-last // block)]
    return QuantizedWeight(weight.scheme, (last - first, weight.shape[1]), weight.layout, weight.packed[first:last],
                           scales, weight.tensor_scale)


def read_plain(entry: TensorEntry) -> Tensor:
    """Return an unquantized tensor as fp32. Raises CheckpointError if it does not hold floating-point numbers."""
    if entry.dtype not in ("F64", "F32", "F16", "BF16"):
        raise CheckpointError(f"{entry.name} holds {entry.dtype}, not floating-point numbers")
    return torch.from_numpy(np.array(entry.numbers(), dtype=np.float32))


def _tensor(entry: TensorEntry, first: int, count: int) -> Tensor:
    return torch.from_numpy(np.array(entry.raw(first, count)))     # a copy: the file may be read-only, or change


def _scales(layer: QuantizedLayer, scheme: Scheme, expert: int) -> Tensor:
    entry = layer.scales
    size = entry.nbytes // layer.experts
    if entry.elements in (1, layer.experts) and scheme.scaling.grid_shape(layer.n, layer.k) == (1, 1):
        size = entry.nbytes // entry.elements
        expert = min(expert, entry.elements - 1)
    raw = _tensor(entry, expert * size, size)
    if layer.state is not None and layer.state.nested_block:
        return _nested_scales(layer, raw).reshape(scheme.scaling.grid_shape(layer.n, layer.k))
    stored = raw.view(_STORED[entry.dtype]) if entry.dtype in _STORED else raw
    if layer.dialect.scale_divisor != 1:
        stored = stored / layer.dialect.scale_divisor
    return stored.reshape(scheme.scaling.grid_shape(layer.n, layer.k))


def _nested_scales(layer: QuantizedLayer, codes: Tensor) -> Tensor:
    """Return scales that are stored as codes: each code's number, times the scale of its block, plus the offset."""
    state = layer.state
    values = read_plain(layer.described_by["nested_values"]).reshape(-1)
    scales = read_plain(layer.described_by["nested_scales"]).reshape(-1)
    blocks = -(-len(codes) // state.nested_block)
    if len(values) != 256 or len(scales) != blocks:
        raise CheckpointError(f"{layer.name}: {len(values)} numbers for the codes of scales and {len(scales)} blocks of"
                              f" them, where 256 and {blocks} are expected")
    return values[codes.long()] * scales.repeat_interleave(state.nested_block)[:len(codes)] + state.nested_offset


def _global_scale(layer: QuantizedLayer, scheme: Scheme, expert: int) -> Tensor | None:
    if not scheme.scaling.has_tensor_scale:
        return None
    if layer.global_scale is None:
        return torch.ones(1)
    numbers = read_plain(layer.global_scale).reshape(-1)
    if numbers.numel() not in (1, layer.experts):
        raise CheckpointError(
            f"{layer.global_scale.name} holds {numbers.numel()} numbers; expected 1 for each weight"
        )
    return numbers[[min(expert, numbers.numel() - 1)]]


def _of_gguf(layer: QuantizedLayer, scheme: Scheme, expert: int, rows: slice) -> QuantizedWeight:
    """Split blocks into codes in order and scales. Two's complement and E2M1 codes are kept unchanged."""
    kind, blocks = layer.codes.dtype, _gguf_blocks(layer, expert)
    if kind == "Q8_0":
        scales, codes = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1), blocks[..., 2:]
    elif kind == "Q4_0":        # 0 to 15 stand for -8 to 7
        scales, codes = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1), _halves(blocks[..., 2:]) ^ 8
    elif kind == "MXFP4":
        scales, codes = blocks[..., 0], _halves(blocks[..., 1:])
    else:                       # NVFP4: four blocks of 16, each with its halves
        scales, codes = blocks[..., :4].flatten(1), _halves(blocks[..., 4:].unflatten(-1, (4, 8)))
    weight = QuantizedWeight.from_codes(
        codes.reshape(layer.n, layer.k).contiguous(),
        Scales(scales.contiguous(), torch.ones(1) if scheme.scaling.has_tensor_scale else None), scheme, layout="bytes")
    return weight if rows == slice(None) else rows_of(weight, rows)


def _gguf_blocks(layer: QuantizedLayer, expert: int) -> Tensor:
    """Return the blocks of one expert, uint8 [N, G, bytes of a block]."""
    _, elements, nbytes = next(entry for entry in BLOCK_TYPES.values() if entry[0] == layer.codes.dtype)
    size = layer.codes.nbytes // layer.experts
    return _tensor(layer.codes, expert * size, size).reshape(layer.n, layer.k // elements, nbytes)


def _halves(packed: Tensor) -> Tensor:
    """Return nibbles in order where a block's first half lies in the low ones and its second half in the high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)

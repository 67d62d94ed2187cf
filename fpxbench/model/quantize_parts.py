"""Quantize a weight some rows at a time, so that working memory does not grow with its size."""

from __future__ import annotations

from math import lcm
from typing import Any

import torch
from torch import Tensor

from fpxbench.numbers.packing import layout_named, pack
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scheme import Scheme, checked_weight
from fpxbench.numbers.tensor_codec import encode
from fpxbench.numbers.weight import QuantizedWeight

PART = 1 << 22
"""Weights per part. The oracle's codec works in fp32 and makes several copies: about 17 bytes per weight."""
PART_ON_GPU = 1 << 24
"""Larger on a GPU: a part takes some hundred kernels whatever its size, and a layer of a 7B model has 200 M weights."""


def quantize_in_parts(values: Tensor, scheme: Scheme, layout: str) -> QuantizedWeight:
    """Return what `fpxbench.numbers.quantize.quantize` returns for float `values` [N, K] and a quantized scheme.

    A weight with a single scale, or in a layout without separate rows, is quantized at once. Raise as `quantize` does.
    """
    scaling, fmt, row_tile = scheme.scaling, scheme.format, layout_named(layout).row_tile
    if scaling is None or fmt is None or scaling.block_rows is None or values.dim() != 2 or row_tile is None:
        return quantize(values, scheme, layout)
    n, k = values.shape
    layout_named(layout).check(fmt.bits, n, k)
    together = lcm(scaling.block_rows, row_tile)
    at_once = PART if values.device.type == "cpu" else PART_ON_GPU
    rows = max(1, at_once // max(1, k * together)) * together
    if n <= rows:
        return quantize(values, scheme, layout)
    shared = {"shared_amax": torch.stack(torch.aminmax(values)).abs().amax()} if scaling.has_tensor_scale else {}
    row_bytes = layout_named(layout).row_bytes(k, fmt.bits)
    packed = torch.empty(n, row_bytes, dtype=torch.uint8, device=values.device)
    scales: list[Tensor] = []
    tensor_scale: Any = None
    for start in range(0, n, rows):
        weight = checked_weight(values[start:start + rows])
        chosen = scaling.choose(weight, fmt, **shared)
        codes = encode(scaling.divide(weight, chosen), fmt)
        packed[start:start + rows] = pack(codes, fmt.bits, layout)
        scales.append(chosen.stored)
        tensor_scale = chosen.tensor_scale
    return QuantizedWeight(scheme, (n, k), layout, packed, torch.cat(scales), tensor_scale)

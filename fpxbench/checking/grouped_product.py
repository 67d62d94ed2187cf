"""Multiply by unquantized 16-bit experts, with PyTorch's grouped product if it is available."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpxbench.numbers.experts import rows_of_experts

ALIGNMENT = 8
"""16-bit elements that K must be a multiple of: `grouped_mm` requires strides of 16 bytes."""


def operator() -> Any:
    """Return `torch.nn.functional.grouped_mm`, or the private operator before it; None if neither exists."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@cache
def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Return why PyTorch's grouped product does not support `device` and `dtype`, in one sentence; None if it does."""
    grouped_mm = operator()
    if grouped_mm is None:
        return f"PyTorch {torch.__version__} has no grouped_mm (from 2.8 on)"
    x, weight = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((16, 16), (2, 16, 16)))
    offsets = torch.tensor([0, 16], dtype=torch.int32, device=device)
    try:
        with torch.no_grad():
            grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    except (RuntimeError, NotImplementedError) as error:
        return f"grouped_mm refuses {dtype} on {device}: {next(iter(str(error).splitlines()), '')[:120]}"
    return None


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Return each row of x [T, K] times its expert's weight in [E, N, K], [T, N] in x's dtype.

    If PyTorch's grouped product does not support the operands, experts are multiplied one by one.
    """
    if weight.shape[2] % ALIGNMENT == 0 and len(x) and why_not(x.device.type, x.dtype) is None:
        return operator()(x, weight.transpose(1, 2), offs=offsets)
    out = x.new_empty(len(x), weight.shape[1])
    for expert, first, last in rows_of_experts(offsets):
        out[first:last] = F.linear(x[first:last], weight[expert])
    return out

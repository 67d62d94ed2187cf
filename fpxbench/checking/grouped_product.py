"""The grouped product of unquantized 16-bit weights, by PyTorch's own kernel where it runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpxbench.numbers.experts import rows_of_experts

ALIGNMENT = 8
"""Elements of 16 bits: K is a multiple of 16 bytes, as `grouped_mm` demands of strides."""


def operator() -> Any:
    """Return `torch.nn.functional.grouped_mm`, or the private operator that came before it; None where neither is."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@cache
def why_not(device: str, dtype: torch.dtype) -> str | None:
    """Return why PyTorch's grouped product cannot be used on `device` in `dtype`, in one sentence; None if it can."""
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
    """Return each row of x [T, K] times its expert's row of weight [E, N, K].T, [T, N] in x's dtype.

    Where PyTorch's grouped product does not take the operands, experts are multiplied one after another.
    """
    if weight.shape[2] % ALIGNMENT == 0 and len(x) and why_not(x.device.type, x.dtype) is None:
        return operator()(x, weight.transpose(1, 2), offs=offsets)
    out = x.new_empty(len(x), weight.shape[1])
    for expert, first, last in rows_of_experts(offsets):
        out[first:last] = F.linear(x[first:last], weight[expert])
    return out

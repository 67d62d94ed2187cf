"""The conversion as a Triton kernel, compiled or interpreted as TRITON_INTERPRET says when this is imported."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fpxbench.casts.conversion import DTYPES, CastOperation, Conversion, DType, Engine
from fpxbench.casts.engines import to_bits, to_tensor

_BLOCK, _INTERPRETED_BLOCK = 1024, 1 << 15


@triton.jit
def convert_kernel(source, target, count, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < count)
    tl.store(target + at, x.to(target.dtype.element_ty, fp_downcast_rounding=ROUNDING), mask=at < count)


def convert(conversion: Conversion, bits: np.ndarray) -> np.ndarray:
    """Return codes of the target for `bits` of the source."""
    source, target = DTYPES[conversion.source], DTYPES[conversion.target]
    x = to_tensor(bits, source, conversion.device)
    y = to_tensor(np.zeros(bits.size, dtype=f"u{target.bits // 8}"), target, conversion.device)
    block = _INTERPRETED_BLOCK if conversion.engine is Engine.TRITON_INTERPRETER else _BLOCK
    rounding = "rtz" if conversion.operation is CastOperation.CAST_RTZ else None
    grid = (triton.cdiv(bits.size, block),)
    convert_kernel[grid](_of_triton_dtype(x, source), _of_triton_dtype(y, target), bits.size, rounding, block)
    return to_bits(y, target)


def _of_triton_dtype(tensor: torch.Tensor, dtype: DType) -> object:
    return tensor if dtype.torch is not None else triton.reinterpret(tensor, getattr(tl, dtype.triton))

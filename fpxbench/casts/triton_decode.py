"""Kernels that decode codes of one byte each, and do nothing else: Triton's cast, and shifts and one multiplication."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpxbench.numbers.formats import Format

_BLOCK = 4096


@triton.jit
def cast_kernel(source, target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < count)
    tl.store(target + at, x.to(target.dtype.element_ty), mask=at < count)


@triton.jit
def shift_kernel(
    source, target, count, BITS: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr, SPECIALS: tl.constexpr,
    FIRST_SPECIAL: tl.constexpr, BLOCK: tl.constexpr,
):
    """Move a code's bits to an fp32's exponent and mantissa and multiply by a power of two for the bias: exact,
    subnormals included."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    code = tl.load(source + at, mask=at < count, other=0).to(tl.uint32)
    magnitude = code & ((1 << (BITS - 1)) - 1)
    bits = (magnitude << (23 - MANTISSA)) | ((code >> (BITS - 1)) << 31)
    value = bits.to(tl.float32, bitcast=True) * FACTOR
    if SPECIALS == "fnuz":
        value = tl.where(code == FIRST_SPECIAL, float("nan"), value)
    elif SPECIALS == "fn":
        value = tl.where(magnitude == FIRST_SPECIAL, float("nan"), value)
    elif SPECIALS == "ieee":
        sign = tl.where(code >> (BITS - 1) != 0, -1.0, 1.0)
        value = tl.where(magnitude == FIRST_SPECIAL, sign * float("inf"), value)
        value = tl.where(magnitude > FIRST_SPECIAL, float("nan"), value)
    tl.store(target + at, value.to(target.dtype.element_ty), mask=at < count)


def cast(codes: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Return `codes`, uint8 of Triton's dtype `name`, by Triton's cast."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    source = triton.reinterpret(codes, getattr(tl, name))
    cast_kernel[(triton.cdiv(codes.numel(), _BLOCK),)](source, out, codes.numel(), BLOCK=_BLOCK)
    return out


def decode(codes: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """Return uint8 `codes` of a signed float format, a byte each, by shifts."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    first = {"fnuz": fmt.nan_code, "fn": fmt.nan_code, "ieee": fmt.infinity_code}.get(fmt.specials)
    shift_kernel[(triton.cdiv(codes.numel(), _BLOCK),)](
        codes, out, codes.numel(), BITS=fmt.bits, MANTISSA=fmt.mantissa_bits, FACTOR=2.0 ** (127 - fmt.bias),
        SPECIALS=fmt.specials, FIRST_SPECIAL=first or 0, BLOCK=_BLOCK,
    )
    return out

"""The operations on torch tensors, and the inputs of each."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fpxbench.casts import probe_values as inputs
from fpxbench.casts.conversion import DTYPES, CastOperation, Conversion, DType

SCALARS = {CastOperation.SHIFT_LEFT_SCALAR: 4, CastOperation.SHIFT_RIGHT_SCALAR: 4, CastOperation.AND_SCALAR: 15}
"""The Python int on the right, as unpacking nibbles uses it."""

_BINARY: dict[CastOperation, Callable] = {
    CastOperation.SHIFT_LEFT: operator.lshift, CastOperation.SHIFT_RIGHT: operator.rshift,
    CastOperation.AND: operator.and_, CastOperation.OR: operator.or_, CastOperation.XOR: operator.xor,
    CastOperation.SHIFT_LEFT_SCALAR: operator.lshift, CastOperation.SHIFT_RIGHT_SCALAR: operator.rshift,
    CastOperation.AND_SCALAR: operator.and_,
}
_SIGNED = {8: np.uint8, 16: np.int16, 32: np.int32, 64: np.int64}      # every version of torch takes these from numpy


@dataclass(frozen=True)
class Inputs:
    """Operands of a conversion as bits, the first one's dtype being the source.

    operands : numpy arrays of unsigned integers, of one length
    """

    operands: tuple[np.ndarray, ...]
    digest: str

    @property
    def count(self) -> int:
        return self.operands[0].size


def inputs_of(conversion: Conversion) -> Inputs:
    """Return the inputs of a conversion."""
    source, target, operation = DTYPES[conversion.source], DTYPES[conversion.target], conversion.operation
    operands: tuple[np.ndarray, ...]
    if operation is CastOperation.SCALE_THEN_CAST:
        operands = inputs.product_inputs(source)
    elif operation.on_bits:
        first, second, counts = inputs.bit_inputs(source)
        shifts = operation in (CastOperation.SHIFT_LEFT, CastOperation.SHIFT_RIGHT)
        operands = (
            (first,)
            if operation is CastOperation.NOT or operation in SCALARS
            else (first, counts if shifts else second)
        )
    else:
        operands = (inputs.cast_inputs(source, target),)
    return Inputs(operands, inputs.digest(*operands))


def torch_function(conversion: Conversion) -> Callable[..., Tensor]:
    """Return the operation as a function of torch tensors."""
    operation = conversion.operation
    target = getattr(torch, DTYPES[conversion.target].torch)
    if operation is CastOperation.CAST:
        return lambda x: x.to(target)
    if operation is CastOperation.SCALE_THEN_CAST:
        return lambda x, scale: (x * scale).to(target)
    if operation is CastOperation.NOT:
        return lambda x: ~x
    apply = _BINARY[operation]
    if operation in SCALARS:
        scalar = SCALARS[operation]
        return lambda x: apply(x, scalar)
    return lambda x, other: apply(x, other)


def right_bits(conversion: Conversion, operands: tuple[np.ndarray, ...]) -> np.ndarray:
    """Return the correct result of a bit operation, computed by numpy."""
    operation, first = conversion.operation, operands[0]
    if operation is CastOperation.NOT:
        return ~first
    second = first.dtype.type(SCALARS[operation]) if operation in SCALARS else operands[1]
    return _BINARY[operation](first, second)


def to_tensor(bits: np.ndarray, dtype: DType, device: str) -> Tensor:
    """Return `bits` as a torch tensor of `dtype` (uint8 where torch has no such dtype), reinterpreted, not converted.
    """
    signed = torch.from_numpy(np.array(bits.view(_SIGNED[dtype.bits])))
    return signed.view(_torch_dtype(dtype)).to(device)


def to_bits(result: Tensor, dtype: DType) -> np.ndarray:
    """Return the codes of a result. Raise TypeError if it is not of `dtype`."""
    if result.dtype is not _torch_dtype(dtype):
        raise TypeError(f"the result is {result.dtype}, not {_torch_dtype(dtype)}")
    integer = {8: torch.uint8, 16: torch.int16, 32: torch.int32, 64: torch.int64}[dtype.bits]
    return result.cpu().contiguous().view(integer).numpy().view(f"u{dtype.bits // 8}")


def codes_of(result: object, dtype: DType, count: int) -> np.ndarray:
    """Return the codes, uint8 [count], of the result of a user's cast: a tensor of PyTorch's dtype, of uint8, or of two
    4-bit codes per byte, low bits first. Raise TypeError for anything else."""
    bits = dtype.format.bits if dtype.format is not None else dtype.bits
    packed = getattr(torch, "float4_e2m1fn_x2", None) if bits == 4 else None
    taken = [one for one in dict.fromkeys((_torch_dtype(dtype), torch.uint8, packed)) if one is not None]
    if not isinstance(result, Tensor) or result.dtype not in taken:
        kind = result.dtype if isinstance(result, Tensor) else type(result).__name__
        raise TypeError(f"the function returned {kind}, not a tensor of {' or '.join(map(str, taken))}")
    codes = result.detach().cpu().contiguous().view(torch.uint8).reshape(-1).numpy()
    if bits == 4 and codes.size * 2 == count:
        codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
    if codes.size != count or int(codes.max(initial=0)) >> bits:
        raise TypeError(f"{count} inputs gave {codes.size} codes, the largest {int(codes.max(initial=0)):#04x}:"
                        f" {dtype.name} has {bits} bits")
    return codes


def _torch_dtype(dtype: DType) -> torch.dtype:
    return torch.uint8 if dtype.torch is None else getattr(torch, dtype.torch)

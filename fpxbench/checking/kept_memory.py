"""Measure the memory that an implementation holds between calls, beyond its stored weight."""

from __future__ import annotations

import ctypes
import gc

import torch

from fpxbench.checking import device_wait
from fpxbench.checking.operands import Operands
from fpxbench.implementation import Implementation

KEPT_SHARE = 0.25
"""Memory above this share of the 16-bit weight counts as a copy of it."""
_SMALLEST = 1 << 20
"""Smaller amounts may be caches of the C library or torch."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def allocated_bytes(device: str) -> int:
    """Return the bytes currently allocated: by the C library on a CPU (0 if unknown), by torch on a GPU."""
    if device != "cpu":
        device_wait.synchronize()
        return torch.cuda.memory_allocated()
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:       # not glibc, or older than 2.33
        return 0
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def live_storages() -> dict[int, int]:
    """Return address -> bytes of every storage that a tensor of this process refers to."""
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout is torch.strided \
                and item.device.type != "meta":
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def kept_bytes(implementation: Implementation, operands: Operands, before: dict[int, int]) -> int:
    """Return the bytes held between calls beyond the stored weight; 0 if they are too few to be a copy of the weight.

    This is the memory that multiplying by another copy of the weight allocates permanently; or else the size of the
    tensors that have appeared since `before`, the `live_storages` before quantizing (a copy that serves one weight at a
    time).
    """
    case = operands.case
    if case.m == 0:
        return 0
    ours = [operands.original, operands.decoded, *operands.weight.tensors().values()]
    known = before.keys() | {tensor.untyped_storage().data_ptr() for tensor in ours}
    enough = max(_SMALLEST, KEPT_SHARE * 2 * operands.weights_read)
    gc.collect()
    alive = sum(nbytes for address, nbytes in live_storages().items() if address not in known)
    for_a_copy = _kept_for_a_copy(implementation, operands)
    return next((kept for kept in (for_a_copy, alive) if kept >= enough), 0)


def _kept_for_a_copy(implementation: Implementation, operands: Operands) -> int:
    x = operands.activation("kept memory")
    with torch.no_grad():
        implementation.matmul(x, operands.weight)       # warm-up for this activation
        copy = operands.weight.clone()
        start = allocated_bytes(operands.device)
        implementation.matmul(x, copy)
        return max(0, allocated_bytes(operands.device) - start)

"""Measure the memory that an implementation holds between calls, beyond the weight that it stored."""

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
"""Below this, the C library's and torch's own caches could be meant."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def allocated_bytes(device: str) -> int:
    """Return the bytes that are allocated now: by the C library on a CPU (0 if it does not tell), by torch on a GPU."""
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
    """Return the bytes of every storage that a tensor of this process refers to, by address."""
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if (
            type(item) in (torch.Tensor, torch.nn.Parameter)
            and item.layout is torch.strided
            and item.device.type != "meta"
        ):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def kept_bytes(implementation: Implementation, operands: Operands, before: dict[int, int]) -> int:
    """Return the bytes held between calls beyond what was stored; 0 where they are too few to be a copy of the weight.

    `before` is what `live_storages` gave before the weight was quantized. Measured is what one more copy of the weight
    adds to allocated memory when it is multiplied by; where that is nothing, tensors that are alive and were not then
    (a copy that serves one weight at a time).
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
        implementation.matmul(x, operands.weight)       # warm for this very activation
        copy = operands.weight.clone()
        start = allocated_bytes(operands.device)
        implementation.matmul(x, copy)
        return max(0, allocated_bytes(operands.device) - start)

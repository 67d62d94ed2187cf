"""Call an implementation and check its contract: the output's shape and dtype, unchanged inputs, poisoned memory first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fpxbench.checking import inputs
from fpxbench.checking.operands import Operands
from fpxbench.checking.poison import poisoned_memory
from fpxbench.implementation import Implementation
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

Matmul = Callable[[Tensor, QuantizedWeight], Tensor]


class ContractViolation(Exception):
    """A call that is wrong whatever its numbers; `verdict` says how."""

    def __init__(self, kind: Kind, summary: str, status: Status = Status.WRONG) -> None:
        super().__init__(summary)
        self.verdict = Verdict(status=status, kind=kind, summary=summary)


def checked_matmul(implementation: Implementation, x: Tensor, weight: QuantizedWeight, device: str,
                   matmul: Matmul | None = None) -> Tensor:
    """Return one product [..., N] of x [..., K], checked as `poisoned_matmul` does and for changes to its inputs.

    `matmul` replaces ``implementation.matmul`` (one configuration of it, say). Raises ContractViolation.
    """
    x_before = x.clone()
    with weight_unchanged(weight):
        y = poisoned_matmul(implementation, x, weight, device, matmul)
        if not same_bits(x, x_before):
            raise ContractViolation(Kind.INPUT_MODIFIED, "matmul changed its activation in place")
    return y


@contextmanager
def weight_unchanged(weight: QuantizedWeight) -> Iterator[None]:
    """Raise ContractViolation on exit if a stored tensor was changed meanwhile."""
    stored_before = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    yield
    for name, before in stored_before.items():
        if not same_bits(weight.tensors()[name], before):
            raise ContractViolation(Kind.INPUT_MODIFIED, f"matmul changed the stored weight ({name}) in place")


def poisoned_matmul(implementation: Implementation, x: Tensor, weight: QuantizedWeight, device: str,
                    matmul: Matmul | None = None) -> Tensor:
    """Return one product [..., N] of x [..., K], computed in poisoned memory.

    Raises ContractViolation for an output of another shape or dtype.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    with poisoned_memory(device, shape, x.dtype), torch.no_grad():
        y = (matmul or implementation.matmul)(x, weight)
        if device != "cpu":
            torch.cuda.synchronize()
    if not isinstance(y, Tensor) or tuple(y.shape) != shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ContractViolation(Kind.WRONG_SHAPE,
                                f"x {list(x.shape)} times a weight {list(weight.shape)} gave {got}, not {list(shape)}")
    if y.dtype != x.dtype:
        raise ContractViolation(Kind.WRONG_DTYPE, f"an activation in {x.dtype} gave an output in {y.dtype}")
    return y


def one_hot_columns(implementation: Implementation, operands: Operands, columns: Sequence[int], *,
                    at_least: int = 0, seconds: float = math.inf) -> Iterator[tuple[list[int], Tensor]]:
    """Yield columns of the effective weight, read by one-hot activations: their numbers, and their weights [N, C].

    Each call reads as many columns as the case has rows; weights are in the activation's dtype. Stops early once
    `at_least` columns were read and the next call would exceed `seconds`.
    """
    case, weight = operands.case, operands.weight
    dtype = inputs.ACTIVATION_DTYPES[case.activation]
    started = time.monotonic()
    with weight_unchanged(weight):
        for first in range(0, len(columns), case.m):
            elapsed = time.monotonic() - started
            if first >= at_least and first and elapsed * (1 + case.m / first) > seconds:
                break
            batch = list(columns[first:first + case.m])
            x = inputs.one_hot(batch, case.m, case.k, dtype, operands.device)
            yield batch, poisoned_matmul(implementation, x, weight, operands.device)[:len(batch)].T


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits (NaN equals the same NaN, 0 differs from -0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*as_bytes)

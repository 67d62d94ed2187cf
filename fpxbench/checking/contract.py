"""Call an implementation and check its contract: a plain tensor of the right shape and dtype, inputs unchanged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fpxbench.checking import device_wait, inputs, poison
from fpxbench.checking.operands import Operands
from fpxbench.implementation import Implementation
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

Matmul = Callable[[Tensor, QuantizedWeight], Tensor]


class ContractViolation(Exception):
    """A call that is wrong whatever its numbers, as described in `verdict`."""

    def __init__(self, kind: Kind, summary: str, status: Status = Status.WRONG) -> None:
        super().__init__(summary)
        self.verdict = Verdict(status=status, kind=kind, summary=summary)


@dataclass(frozen=True)
class Output:
    """The output of one call.

    seen : a copy made on the current stream as soon as the call returned, before any synchronization
    returned : the tensor itself
    """

    seen: Tensor
    returned: Tensor

    def check_unchanged(self) -> None:
        """Raise ContractViolation if the returned tensor has changed since the call returned."""
        if not same_bits(self.seen, self.returned):
            raise ContractViolation(Kind.OUTPUT_CHANGED,
                                    "the output changed after matmul had returned: it was computed later (another"
                                    " stream, another thread), or its memory is used again")


def checked_matmul(implementation: Implementation, x: Tensor, weight: QuantizedWeight, device: str,
                   matmul: Matmul | None = None, pattern: int = poison.NAN) -> Tensor:
    """Return one product [..., N] of x [..., K], with the checks of `call`, and for changed inputs.

    `matmul` replaces ``implementation.matmul``, for example by one of its configurations. Raise ContractViolation.
    """
    return watched_matmul(implementation, x, weight, device, matmul, pattern).seen


def watched_matmul(implementation: Implementation, x: Tensor, weight: QuantizedWeight, device: str,
                   matmul: Matmul | None = None, pattern: int = poison.NAN) -> Output:
    """Check a product as `checked_matmul` does, and return its `Output`."""
    x_before = x.clone()
    with weight_unchanged(weight):
        output = call(matmul or implementation.matmul, x, weight, device, pattern)
        if not same_bits(x, x_before):
            raise ContractViolation(Kind.INPUT_MODIFIED, "matmul changed its activation in place")
    return output


@contextmanager
def weight_unchanged(weight: QuantizedWeight) -> Iterator[None]:
    """Raise ContractViolation on exit if a stored tensor has changed."""
    stored_before = {name: tensor.clone() for name, tensor in weight.tensors().items()}
    yield
    for name, before in stored_before.items():
        if not same_bits(weight.tensors()[name], before):
            raise ContractViolation(Kind.INPUT_MODIFIED, f"matmul changed the stored weight ({name}) in place")


def call(matmul: Matmul, x: Tensor, weight: QuantizedWeight, device: str, pattern: int = poison.NAN) -> Output:
    """Return one product [..., N] of x [..., K], computed in memory filled with `pattern`.

    On a GPU, free memory is overwritten before the output is read again. Raise ContractViolation for an output that is
    not a plain tensor, or has the wrong shape, dtype or device.
    """
    shape = (*x.shape[:-1], weight.shape[0])
    nbytes = math.prod(shape) * x.dtype.itemsize
    with poison.poisoned_memory(device, nbytes, pattern), torch.no_grad():
        y = matmul(x, weight)
        _check_output(y, x, weight, shape)
        output = Output(y.clone(), y)
        if device != "cpu":
            poison.fill_free_blocks(device, nbytes, pattern)
            device_wait.synchronize()
            output.check_unchanged()
    return output


def _check_output(y: object, x: Tensor, weight: QuantizedWeight, shape: tuple[int, ...]) -> None:
    if not isinstance(y, Tensor) or tuple(y.shape) != shape:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ContractViolation(Kind.WRONG_SHAPE,
                                f"x {list(x.shape)} times a weight {list(weight.shape)} gave {got}, not {list(shape)}")
    if type(y) is not Tensor:
        raise ContractViolation(
            Kind.LAZY_OUTPUT,
            f"gave a {type(y).__name__}, not a plain torch.Tensor: what it computes when it is read is not timed")
    if y.dtype != x.dtype:
        raise ContractViolation(Kind.WRONG_DTYPE, f"an activation in {x.dtype} gave an output in {y.dtype}")
    if y.device != x.device:
        raise ContractViolation(Kind.WRONG_DTYPE, f"an activation on {x.device} gave an output on {y.device}")


def one_hot_columns(implementation: Implementation, operands: Operands, columns: Sequence[int], *,
                    at_least: int = 0, seconds: float = math.inf) -> Iterator[tuple[list[int], Tensor]]:
    """Yield columns of the effective weight, read with one-hot activations: their indices, and the weights [N, C].

    Each call reads as many columns as the case has rows; weights have the activation's dtype. Ends early if `at_least`
    columns were read and the next call would exceed `seconds`.
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
            yield batch, call(implementation.matmul, x, weight, operands.device).seen[:len(batch)].T


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and bits (NaN equals the same NaN, 0 differs from -0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # A tensor of one element is contiguous with any stride, but cannot be viewed as bytes with every stride.
    flat = (tensor.contiguous().as_strided((tensor.numel(),), (1,)) for tensor in (a, b))
    return torch.equal(*(tensor.view(torch.uint8) for tensor in flat))

"""Check a quantized tensor class, operation by operation: `fpxbench tensor-check`."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from fpxbench.model.tensor_operations import OPERATIONS, K, N
from fpxbench.model.tensor_record import OperationOutcome, OperationResult


class OperationRequest(BaseModel):
    """An operation to check on a class: a name of `CLASSES`, or ``package.module:factory``."""

    tensor: str
    operation: str


def _float_tensor(scheme: str) -> Callable[[Tensor], Tensor]:
    def make(values: Tensor) -> Tensor:
        from fpxbench.model.float_tensor import FloatTensor

        return FloatTensor.from_float(values, scheme)
    return make


def _torchao(module: str, config: str, **fields: Any) -> Callable[[Tensor], Tensor]:
    def make(values: Tensor) -> Tensor:
        from torchao.quantization import quantize_

        made = getattr(importlib.import_module(module), config)(**fields)
        linear = torch.nn.Linear(K, N, bias=False, dtype=values.dtype)
        linear.weight = torch.nn.Parameter(values, requires_grad=False)
        quantize_(linear, made)
        return linear.weight.data
    return make


def _torchao_mx(values: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    return MXTensor.to_mx(values, torch.float8_e4m3fn, 32)


def _bitsandbytes(kind: str) -> Callable[[Tensor], Tensor]:
    def make(values: Tensor) -> Tensor:
        from bitsandbytes.nn import Params4bit

        return Params4bit(values, requires_grad=False, quant_type=kind)._quantize("cpu")
    return make


CLASSES: dict[str, Callable[[Tensor], Tensor]] = {
    "FloatTensor e4m3fn-row": _float_tensor("e4m3fn-row"),
    "FloatTensor e3m2-g128": _float_tensor("e3m2-g128"),
    "FloatTensor mxfp4": _float_tensor("mxfp4"),
    "FloatTensor nvfp4": _float_tensor("nvfp4"),
    "torchao Float8Tensor": _torchao("torchao.quantization", "Float8WeightOnlyConfig"),
    "torchao Int8Tensor": _torchao("torchao.quantization", "Int8WeightOnlyConfig"),
    "torchao NVFP4Tensor": _torchao("torchao.prototype.mx_formats", "NVFP4WeightOnlyConfig"),
    "torchao MXTensor": _torchao_mx,
    "bitsandbytes Params4bit nf4": _bitsandbytes("nf4"),
    "bitsandbytes Params4bit fp4": _bitsandbytes("fp4"),
}
"""Class name -> a function that makes its tensor from bf16 values [N, K]."""


_REFUSAL = re.compile(r"not (?:yet |currently )?(?:implemented|supported)|unsupported|requires", re.I)
"""Matches the message of an error that means "unsupported", whatever its class."""


def factory_of(tensor: str) -> Callable[[Tensor], Tensor]:
    """Return the function that makes the tensor. Raise ValueError for neither a class's name nor ``module:factory``."""
    if tensor in CLASSES:
        return CLASSES[tensor]
    module, colon, name = tensor.partition(":")
    if not colon:
        raise ValueError(f"no tensor class {tensor!r}: one of {', '.join(CLASSES)}, or package.module:factory")
    try:
        made = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"{tensor}: {module} cannot be imported ({error}); put its folder on PYTHONPATH") from None
    if not callable(made):
        raise ValueError(f"{module} has no {name} that can be called")
    return made


def library_of(tensor: str) -> str | None:
    """Return a class's library and its version; None for fpxbench itself, and if the library is not installed."""
    package = (tensor.partition(":")[0] if ":" in tensor else tensor.partition(" ")[0]).partition(".")[0]
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def plain_of(tensor: Tensor) -> Tensor:
    """Return the decoded numbers of a quantized tensor, or a plain tensor's own, in fp32."""
    if type(tensor) in (Tensor, torch.nn.Parameter):
        return tensor.detach().float()
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(tensor.data, state).float()
    return tensor.dequantize().float()


def check(request: OperationRequest) -> OperationResult:
    """Check one operation. Raise ValueError for an unknown class or operation."""
    if request.operation not in OPERATIONS:
        raise ValueError(f"no operation {request.operation!r}: one of {', '.join(OPERATIONS)}")
    chosen = OPERATIONS[request.operation]
    common = {"tensor": request.tensor, "operation": chosen.name, "needed_by": chosen.needed_by,
              "library": library_of(request.tensor)}
    make = factory_of(request.tensor)
    try:
        # Each row and column has its own magnitude, so that a misplaced part shows.
        generator = torch.Generator().manual_seed(0)
        sizes = torch.exp(torch.randn(N, 1, generator=generator)) * torch.exp(
            0.3 * torch.randn(1, K, generator=generator)
        )
        tensor = make((torch.randn(N, K, generator=generator) * sizes).to(torch.bfloat16))
        plain = plain_of(tensor)
    except ImportError as error:
        return OperationResult(**common, outcome=OperationOutcome.MISSING, message=str(error)[:300])
    if tuple(tensor.shape) != (N, K):
        # Such a class works only through its own module, so none of the operations applies.
        return OperationResult(**common, outcome=OperationOutcome.REFUSED,
                               message=f"a weight [{N}, {K}] has the shape of its bytes, {list(tensor.shape)}")
    try:
        got, expected = chosen.run(tensor, plain.to(torch.bfloat16))
    except Exception as error:
        refused = isinstance(error, NotImplementedError) or _REFUSAL.search(str(error))
        message = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        outcome = OperationOutcome.REFUSED if refused else OperationOutcome.ERROR
        return OperationResult(**common, outcome=outcome, message=message[:400])
    difference = _difference(got, expected)
    if difference:
        return OperationResult(**common, outcome=OperationOutcome.WRONG, message=difference)
    lost = chosen.stays_quantized and type(got) in (Tensor, torch.nn.Parameter) and type(tensor) is not Tensor
    return OperationResult(**common, outcome=OperationOutcome.PLAIN if lost else OperationOutcome.OK)


def _difference(got: Any, expected: Any) -> str:
    """Return how `got` differs from `expected`; "" if they agree up to bf16 rounding."""
    if isinstance(expected, (list, tuple)) and expected and isinstance(expected[0], Tensor):
        return next((text for text in map(_difference, got, expected) if text), "")
    if not isinstance(expected, Tensor):
        return "" if got == expected else f"gave {got!r}, not {expected!r}"
    numbers, due = plain_of(got), plain_of(expected)
    if numbers.shape != due.shape:
        return f"has shape {list(numbers.shape)}, not {list(due.shape)}"
    # Allows two roundings to bf16 and sums in another order.
    tolerance = 2.0**-6 * due.abs().amax().clamp(min=1e-30)
    worst = (numbers - due).abs().amax()
    return "" if worst <= tolerance else f"differs by up to {worst:.3g}, where numbers go up to {due.abs().amax():.3g}"


def names() -> tuple[list[str], list[str]]:
    """Return the names of the classes and of the operations."""
    return list(CLASSES), list(OPERATIONS)

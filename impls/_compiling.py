"""torch.compile for code that many cases share."""

from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor


def compiled(function, **options):
    """Return a module-level `function` compiled as one graph for static shapes, independent of its other compiled
    copies.

    Dynamo counts recompilations per code object and refuses the ninth (`torch._dynamo.config.recompile_limit`): a
    process that measures one case after another would reach that limit, and one case's shapes would make the next one's
    dynamic. The copy has a code object of its own.
    """
    copy = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(copy, fullgraph=True, dynamic=False, **options)


class PerShape:
    """A module-level function of tensors, compiled anew for each combination of their shapes and dtypes: with
    max-autotune on GPUs, and without CUDA graphs, which would return the same output buffer from every call."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._compiled: dict[object, Callable[..., Tensor]] = {}

    def __call__(self, *tensors: Tensor) -> Tensor:
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in self._compiled:
            mode = "max-autotune-no-cudagraphs" if tensors[0].is_cuda else None
            self._compiled[key] = compiled(self.function, mode=mode)
        return self._compiled[key](*tensors)

"""A module that replaces a `torch.nn.Linear`, as an implementation whose weight is visible only through `forward`."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.weight import QuantizedWeight

Factory = Callable[[nn.Linear], nn.Module | None]


class Wrapped(Implementation):
    """A module that a factory makes from a `torch.nn.Linear` without bias, its weight in the activation's dtype."""

    name = "module"
    casts_weight = True
    """The module receives its weight in the activation's dtype."""

    def __init__(self, factory: Factory, dtype: torch.dtype) -> None:
        self.factory, self.dtype = factory, dtype

    def supports(self, scheme: Scheme, device: str) -> Support:
        return Support.yes()

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        n, k = weight.shape
        linear = nn.Linear(k, n, bias=False, device=weight.device, dtype=self.dtype).eval()
        with torch.no_grad():
            linear.weight.copy_(weight)
        module = self.factory(linear)
        if module is None:      # the factory changed the module in place
            module = linear
        if not isinstance(module, nn.Module):
            raise ValueError(f"the factory returned {type(module).__name__}, not a torch.nn.Module")
        return QuantizedWeight.holding(module, scheme, (n, k))

    def matmul(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        return weight.held(x)


def factory_named(name: str) -> Factory:
    """Return the factory that ``package.module:factory`` names; see `function_named`."""
    factory = function_named(name, "takes a torch.nn.Linear and returns a module")
    _check_takes_a_linear(name, factory)
    return factory


def function_named(name: str, what: str) -> Callable:
    """Return the function that ``package.module:function`` names, with the current folder on the path. Raise ValueError
    if the module or the function is missing; `what` says what the function does."""
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ValueError(f"{name!r}: there is no module {error.name!r} here or among the installed packages"
                             ) from None
        raise
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{name!r}: {module_name} has no function {attribute!r} that {what}")
    return function


def _check_takes_a_linear(name: str, factory: Factory) -> None:
    """Raise ValueError if the factory's signature, if it has one, does not accept a single module."""
    try:
        signature = inspect.signature(factory)
    except ValueError:      # some built-in functions have none
        return
    try:
        signature.bind(nn.Linear)
    except TypeError as error:
        raise ValueError(f"{name!r} must accept a single torch.nn.Linear, but takes {signature}: {error}") from None

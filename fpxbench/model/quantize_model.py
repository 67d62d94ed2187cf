"""Quantize a model's weights in place, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.held_linear import HeldLinear, HeldWeight, is_opaque
from fpxbench.model.operator import AUTO, resolve
from fpxbench.numbers.scheme import scheme_named

LEFT = ("*embed*", "*wte*", "*wpe*", "*lm_head*", "*router*", "*gate", "*gate.weight")
"""Names that are left unquantized unless selected: embeddings, heads, and the routers of experts."""


@dataclass(frozen=True)
class Replaced:
    """A weight that was quantized."""

    name: str
    scheme: str
    implementation: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    k: int
    """The length of the dimension that is summed over, which may be either of `shape`."""


@dataclass
class Quantization:
    """The outcome of quantizing a model.

    replaced : the weights that were quantized
    left : name -> reason, for the other weights of two dimensions or more
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def short_blocks(self) -> list[Replaced]:
        """The weights whose last block along K is shorter than the others: the block does not divide K."""
        return [each for each in self.replaced if (block := scheme_named(each.scheme).scaling.block) is not None
                and each.k % block]

    @property
    def bytes_before(self) -> int:
        return sum(each.bytes_before for each in self.replaced)

    @property
    def bytes_after(self) -> int:
        return sum(each.bytes_after for each in self.replaced)

    def __str__(self) -> str:
        return (
            f"{len(self.replaced)} weights quantized, {self.bytes_before / 1e6:.4g} MB before and "
            f"{self.bytes_after / 1e6:.4g} MB after; {len(self.left)} left"
            + (f"; the last block of {len(self.short_blocks)} is short" if self.short_blocks else "")
        )


def quantize_(model: nn.Module, scheme: str | Mapping[str, str], implementation: str = AUTO,
              select: Callable[[str, nn.Module], bool] | None = None) -> Quantization:
    """Replace the weights of `model` by `FloatTensor`s, and return what was replaced and what was left.

    Applies to `nn.Linear`, transformers' `Conv1D`, and expert parameters ``[E, N, K]``. Each layer's 16-bit weight is
    freed before the next is quantized, so that memory never holds two copies of the model.

    Parameters
    ----------
    scheme : one for all, or glob over names -> scheme (the first match counts; a weight without a match is left)
    implementation : the one that multiplies; ``auto`` takes the fastest right one, see `fpxbench.model.operator`. One
        that is named and keeps weights in a form of its own gets `HeldLinear`s in the place of `nn.Linear`s
    select : whether to take a module, by its name and itself; None: all except embeddings, heads and routers

    Raise ValueError for an unknown scheme, or if no weight of the model was quantized.
    """
    schemes = {"*": scheme} if isinstance(scheme, str) else dict(scheme)
    for name in schemes.values():
        scheme_named(name)
    done = Quantization()
    shared = _shared_parameters(model)
    for name, module, attribute in list(_weights(model)):
        parameter = getattr(module, attribute)
        full = f"{name}.{attribute}" if name else attribute
        chosen = next(
            (value for glob, value in schemes.items() if fnmatchcase(name, glob) or fnmatchcase(full, glob)), None
        )
        reason = _reason_to_leave(name, module, parameter, chosen, select, shared)
        if reason:
            done.left[full] = reason
            continue
        before = parameter.nbytes
        name_of, cls = resolve(implementation, scheme_named(chosen), parameter.device.type, opaque=True)
        if is_opaque(cls):
            if not isinstance(module, nn.Linear) or not name:
                done.left[full] = f"{name_of} keeps weights in a form of its own, which only an nn.Linear can hold"
                continue
            with _named(full):
                held_weight = HeldWeight(parameter.detach(), scheme_named(chosen), cls())
            done.replaced.append(Replaced(full, chosen, name_of, tuple(parameter.shape), before,
                                          held_weight.nbytes_stored, parameter.shape[-1]))
            model.set_submodule(name, HeldLinear(held_weight, module.bias))
            module._parameters.clear()      # frees the weight: the list iterated over still holds the module
            del parameter
            continue
        # Conv1D and some experts hold the weight as [K, N].
        transposed = _is_transposed(module)
        values = parameter.detach().transpose(-1, -2) if transposed else parameter.detach()
        with _named(full):
            quantized = FloatTensor.from_float(values, chosen, implementation)
        done.replaced.append(
            Replaced(full, chosen, quantized.implementation, tuple(parameter.shape), before, quantized.nbytes_stored,
                     values.shape[-1])
        )
        held: Any = nn.Parameter(quantized.transpose(-1, -2) if transposed else quantized, requires_grad=False)
        setattr(module, attribute, held)
        held.prepare()
        del parameter, values
    if not done.replaced:
        raise ValueError(
            f"no weight of {type(model).__name__} was quantized: "
            + (
                "; ".join(f"{name}: {reason}" for name, reason in list(done.left.items())[:5])
                or "it has no linear layer"
            )
        )
    return done


@contextmanager
def _named(weight: str) -> Iterator[None]:
    """Name the weight in a ValueError about its values."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{weight}: {error}") from error


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return module name -> weight [N, K] of the linear layers that are quantized by default.

    Raise ValueError if the model has none.
    """
    found = {name: module.weight for name, module in model.named_modules()
             if isinstance(module, nn.Linear) and not is_left(name)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize")
    return found


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every module that holds a weight, with the parameter's name."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            yield name, module, "weight"
        else:
            for attribute, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and attribute.endswith("proj"):
                    yield name, module, attribute


def is_left(name: str) -> bool:
    """Return whether a module of this name is left unquantized unless it is selected."""
    return any(fnmatchcase(name, glob) for glob in LEFT)


def _is_transposed(module: nn.Module) -> bool:
    """Return whether a module holds its weight as [K, N]: `Conv1D`, and experts that say so (gpt-oss)."""
    return type(module).__name__ == "Conv1D" or bool(
        getattr(module, "is_transposed", type(module).__name__ == "GptOssExperts")
    )


def _reason_to_leave(name: str, module: nn.Module, parameter: Tensor, scheme: str | None,
                     select: Callable[[str, nn.Module], bool] | None, shared: dict[int, list[str]]) -> str:
    """Return why a weight is left unquantized; "" if it is not."""
    if scheme is None:
        return "no glob of the schemes matches its name"
    if isinstance(parameter.data, FloatTensor):
        return "quantized already"
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        return f"holds {parameter.dtype}"
    if select is not None:
        if not select(name, module):
            return "not selected"
    elif is_left(name):
        return "an embedding, a head or a router; select it to take it"
    own = f"{name}." if name else ""
    tied = [other for other in shared.get(id(parameter), []) if not other.startswith(own)]
    if tied:
        return f"tied to {tied[0]}, which would keep the 16-bit weight"
    return ""


def _shared_parameters(model: nn.Module) -> dict[int, list[str]]:
    """Return parameter id -> its names in the model."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names

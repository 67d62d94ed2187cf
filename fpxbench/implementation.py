"""The interface of every implementation in `impls/`, and how implementations are found.

A new implementation is one file::

    from fpxbench.implementation import Implementation, Support, implementation

    @implementation("my_kernel")
    class MyKernel(Implementation):
        \"\"\"One sentence: how it multiplies.\"\"\"

        def supports(self, scheme, device):
            return Support.yes() if scheme.name == "e4m3fn-row" else Support.no("supports e4m3fn-row only")

        def matmul(self, x, weight):
            return my_kernel(x, weight.packed, weight.scales)

Files in `impls/` are discovered, and so are files given by ``--impls PATH`` and modules named by an entry point of the
group ``fpxbench.implementations``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fpxbench.did_you_mean import did_you_mean
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.experts import QuantizedExperts, rows_of_experts
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scheme import Scheme
from fpxbench.numbers.weight import QuantizedWeight

ENTRY_POINT_GROUP = "fpxbench.implementations"


@dataclass(frozen=True)
class Support:
    """Whether an implementation supports a scheme on a device, and if not, why, in one sentence."""

    supported: bool
    reason: str = ""
    missing: bool = False
    """The reason is a missing dependency or device, which the user could install."""

    @classmethod
    def yes(cls) -> Self:
        return cls(True)

    @classmethod
    def no(cls, reason: str, *, missing: bool = False) -> Self:
        if not reason:
            raise ValueError("Support.no needs a reason, in one sentence")
        return cls(False, reason, missing)


@dataclass(frozen=True)
class Accumulator:
    """The accumulator of products: `bits` of significand, for at most `block` products before a sum in fp32 (None:
    all)."""

    bits: int = 24
    block: int | None = None

    @property
    def unit(self) -> float:
        """Relative error of one truncated addition: matrix units do not round sums to nearest."""
        return 2.0 ** (1 - self.bits)

    def length(self, k: int) -> int:
        """Return how many of the additions of K products use it."""
        return k if self.block is None else min(k, self.block)


FP32 = Accumulator()


class Implementation:
    """One way to store a quantized weight and to multiply by it.

    An instance serves one case: what it compiles or caches ends with the case.
    """

    name: ClassVar[str]
    baseline: ClassVar[bool] = False
    layout: ClassVar[str] = "planar"
    """The layout, of `fpxbench.numbers.packing`, in which the default `quantize` stores the oracle's codes."""
    own_layouts: ClassVar[Mapping[str, str]] = {}
    """Scheme -> the layout in which `quantize` stores its own codes, for a library that has a quantizer. Weights in a
    model are then quantized by the library instead of by the oracle."""
    any_layout: ClassVar[bool] = False
    """Whether `matmul` accepts codes in every layout of `fpxbench.numbers.packing`, not only in that of `stored`."""
    activation_format: ClassVar[str | None] = None
    """The format to which `matmul` rounds the activation, if it does. The rule of its scales is then determined by a
    probe: per row, per tensor, blocks as the weight's, MX, NVFP4 or groups of 128, computed from the activation."""
    activation_rule: ClassVar[ActivationRule | None] = None
    """The complete rule: format, granularity, rounding, and the scale if fixed. Results are checked against it."""
    quantizes_activations: ClassVar[bool] = False
    """Whether `matmul` quantizes its activation as defined by a scheme with a ``+`` (``e4m3fn-row+e4m3fn-row``). Other
    implementations refuse such schemes."""
    scale_rule: ClassVar[str | None] = None
    """The rule by which `quantize` chooses scales, if it is not the scheme's: a modifier of its scaling (``rceil``,
    ``div``, ``bf16``), or ``shared`` for a tensor scale of several weights. Stored weights are checked against it."""
    accumulator: ClassVar[Accumulator] = FP32
    """The accumulator, if it is narrower than fp32. Results are checked against it."""
    experts_only: ClassVar[bool] = False
    """Whether only `grouped_matmul` is implemented, so that only cases of experts are planned."""
    supports_bias: ClassVar[bool] = False
    """Whether `matmul` accepts a third argument, a bias [N] in x's dtype, which is added to each row."""

    opaque: ClassVar[bool] = False
    """Whether `quantize` returns a weight that only this class can read, such as a library's object. Not needed if
    `dequantize` is overridden."""

    def supports(self, scheme: Scheme, device: str) -> Support:
        """Return whether weights of `scheme` are supported on `device`: ``cpu``, or ``cuda``, which includes ROCm."""
        raise NotImplementedError(f"{type(self).__name__} needs a method supports(scheme, device)")

    def activation_format_under(self, scheme: Scheme) -> str | None:
        """Return the name of the format that activations are rounded to: the scheme's, or this class's own."""
        rule = scheme.activation.format if scheme.activation is not None else None
        return rule.name if rule is not None else self.activation_format

    def support(self, scheme: Scheme, device: str) -> Support:
        """Return `supports`' answer, or the refusal of a scheme that quantizes activations where `matmul` does not."""
        if scheme.activation is not None and not self.quantizes_activations:
            weight_only = scheme.name.partition("+")[0]
            return Support.no(f"supports 16-bit activations only: {weight_only}, not {scheme.name}")
        return self.supports(scheme, device)

    def layout_for(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str:
        """Return the layout in which a weight [N, K] of `scheme` is stored on `device`: by default the class's."""
        return self.own_layouts.get(scheme.name, self.layout)

    def stored(self, weight: QuantizedWeight) -> QuantizedWeight:
        """Return the same codes and scales in the layout in which they are multiplied; `weight` itself if unchanged.

        Weights of a model are stored like this. Override it if the layout depends on the codes or scales too.
        """
        layout = self.layout_for(weight.scheme, weight.shape, weight.device)
        return weight if weight.layout == layout else weight.relayout(layout)

    def prepare(self, weight: QuantizedWeight) -> None:
        """Compute now what `matmul` would otherwise derive from a stored weight at the first call, and cache it.

        Called for a model's weights, so that nothing has to be computed while a CUDA graph is captured.
        """

    def quantize(self, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        """Return `weight` [N, K] as stored: by default, the oracle's codes and scales in this class's layout."""
        return quantize(weight, scheme, self.layout)

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        """Return the stored weight's values, fp32 [N, K]. Override it only if the codes are in a layout of your own."""
        return weight.dequantize()

    def matmul(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        """Return ``x @ weight.T``: ``[..., N]`` in x's dtype, from x ``[..., K]`` in bf16 or fp16."""
        raise NotImplementedError(f"{type(self).__name__} needs a method matmul(x, weight)")

    def grouped_matmul(self, x: Tensor, weight: QuantizedExperts, offsets: Tensor) -> Tensor:
        """Return each row of x ``[T, K]`` times its expert's weight: ``[T, N]`` in x's dtype.

        Rows are sorted by expert. Those of expert e end before row ``offsets[e]`` and begin where those of the expert
        before it end, expert 0's at row 0, as in `torch.nn.functional.grouped_mm`. `offsets` is int32 ``[E]`` on x's
        device, never decreasing, and its last element is T. An expert may have no rows.

        By default `matmul` is called for each expert that has rows. To know them, it waits for the device.
        """
        out = x.new_empty(x.shape[0], weight.shape[0])
        for expert, first, last in rows_of_experts(offsets):
            out[first:last] = self.matmul(x[first:last], weight.experts[expert])
        return out

    def configs(self, x: Tensor, weight: QuantizedWeight) -> Sequence[Any]:
        """Return every configuration that `matmul` may pick for such operands (autotuning). Each is checked."""
        return ()

    def matmul_with(self, x: Tensor, weight: QuantizedWeight, config: Any) -> Tensor:
        """Return `matmul` with this configuration, whatever the autotuner would pick."""
        raise NotImplementedError(
            f"{type(self).__name__} lists configs, so it needs a method matmul_with(x, weight, config)"
        )

    def no_timing(self, device: str) -> str | None:
        """Return why timing on `device` is meaningless (an interpreter), in one sentence; None if it is not."""
        return None

    def max_elements(self, device: str) -> int | None:
        """Return the maximum of M*N*K of a case on `device`, for interpreters; None for no limit."""
        return None

    def library(self) -> str | None:
        """Return the library that multiplies, with its version (``torchao 0.18.0``), for the record; None if it is this
        file's own code."""
        return None

    def slow(self, device: str) -> bool:
        """Return whether there is a `max_elements`, so that checks make fewer calls."""
        return self.max_elements(device) is not None


_registry: dict[str, type[Implementation]] = {}
_loaded_paths: set[Path] = set()
_sources: dict[str, str] = {}


def implementation(name: str, *, baseline: bool = False) -> Callable[[type[Implementation]], type[Implementation]]:
    """Register a class under `name`, which users type. Raise ValueError if another file has registered the name."""

    def register(cls: type[Implementation]) -> type[Implementation]:
        known = _registry.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"two implementations are named {name!r}: {known.__module__} and {cls.__module__}; rename one"
            )
        if not name.isidentifier():
            raise ValueError(f"implementation name {name!r} must be letters, digits and underscores")
        cls.name, cls.baseline = name, baseline
        _registry[name] = cls
        return cls

    return register


@dataclass(frozen=True)
class LoadFailure:
    """A file of implementations that could not be imported, and why."""

    path: str
    error: str

    def __str__(self) -> str:
        return f"{self.path} could not be loaded: {self.error}"


def shipped_folder() -> Path:
    """Return the folder of the implementations that come with fpxbench."""
    return Path(__file__).parent / "impls"


def discover(paths: Iterable[str | Path] = ()) -> tuple[dict[str, type[Implementation]], list[LoadFailure]]:
    """Return all implementations by name: the shipped ones, those of entry points, and those in `paths` (files or
    folders).

    A file that fails to import is a `LoadFailure`, not an exception: the others still run. Files whose name begins
    with an underscore are skipped. Raises FileNotFoundError for a missing path and for one without a Python file.
    """
    failures: list[LoadFailure] = []
    for file in _python_files(shipped_folder()):
        _load(file, f"fpxbench.impls.{file.stem}", failures)
    for file in _python_files(shipped_folder() / "peers"):
        _load(file, f"fpxbench.impls.peers.{file.stem}", failures)
    for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            entry.load()
        except (Exception, SystemExit) as error:  # a third party's import can fail in any way
            failures.append(LoadFailure(f"entry point {entry.name}", f"{type(error).__name__}: {error}"))
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"--impls {path}: no such file or folder")
        files = _python_files(path)
        if not files:
            raise FileNotFoundError(f"--impls {path}: not a Python file, nor a folder that holds one")
        for file in files:
            digest = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
            _load(file, f"fpxbench_impls_{digest}.{file.stem}", failures)
    return dict(_registry), failures


def find(
    name: str, known: dict[str, type[Implementation]], failures: Iterable[LoadFailure] = ()
) -> type[Implementation]:
    """Return the implementation of that name. Raise ValueError, see `no_implementation`."""
    if name in known:
        return known[name]
    raise no_implementation(name, known, failures)


def no_implementation(name: str, known: Iterable[str], failures: Iterable[LoadFailure] = ()) -> ValueError:
    """Return the error for an unknown name, with the nearest ones and the files that failed to load."""
    hint = did_you_mean(name, known, f"there are {', '.join(sorted(known))}")
    why = "; ".join(map(str, failures)) or "--impls PATH adds others"
    return ValueError(f"no implementation {name!r}; {hint} ({why})")


def summary(cls: type[Implementation]) -> str:
    """Return the first paragraph of the class's docstring on one line, for reports."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def listed(paths: list[Path]) -> list[dict[str, str]]:
    """Return a row of text for each implementation that `discover` finds, and for each file that could not be loaded.
    """
    known, failures = discover(paths)
    rows = [
        {"implementation": name, "baseline": "yes" if cls.baseline else "", "about": summary(cls)}
        for name, cls in sorted(known.items())
    ]
    return rows + [
        {"implementation": failure.path, "baseline": "", "about": f"not loaded: {failure.error}"}
        for failure in failures
    ]


def source_digest(name: str) -> str:
    """Return twelve hex digits of a hash over the implementation's file and the private files (``_*``) beside it; ""
    for entry points.

    A record carries it, so that an edited kernel is measured again.
    """
    return _sources.get(name, "")


def _folder_digest(file: Path) -> str:
    digest = hashlib.sha256(file.read_bytes())
    for private in sorted(file.parent.glob("_*.*")):     # tables of data among them
        digest.update(private.read_bytes())
    return digest.hexdigest()[:12]


def _python_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".py" else []
    return sorted(file for file in path.glob("*.py") if not file.name.startswith("_"))


def _load(file: Path, module_name: str, failures: list[LoadFailure]) -> None:
    resolved = file.resolve()
    if resolved in _loaded_paths:
        return
    parent = module_name.rpartition(".")[0]
    if parent not in sys.modules:   # lets a file import the private ones (_name.py) beside it
        package = ModuleType(parent)
        package.__path__ = [str(resolved.parent)]
        sys.modules[parent] = package
    spec = importlib.util.spec_from_file_location(module_name, resolved)
    assert spec is not None and spec.loader is not None     # a file whose name ends with .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    before = set(_registry)
    try:
        spec.loader.exec_module(module)
        _loaded_paths.add(resolved)
        digest = _folder_digest(resolved)
        _sources.update({name: digest for name in set(_registry) - before})
    except (Exception, SystemExit) as error:  # a broken file, or a script that exits, must not stop the others
        del sys.modules[module_name]
        for name in set(_registry) - before:
            del _registry[name]
        failures.append(LoadFailure(str(file), f"{type(error).__name__}: {error}"))


class _CallableModule(ModuleType):
    """This module, which can also be used as the decorator: once it is imported, Python binds it to
    ``fpxbench.implementation``."""

    def __call__(self, name: str, *, baseline: bool = False) -> Callable[[type[Implementation]], type[Implementation]]:
        return implementation(name, baseline=baseline)


sys.modules[__name__].__class__ = _CallableModule

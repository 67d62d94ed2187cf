"""Probes of the suite's own `triton_fused` kernels: every scheme, matrix-vector and matrix-instruction kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.settings import default_memory_limit
from fpxbench.targets.architectures import ARCHITECTURES, Architecture
from fpxbench.targets.operations import ProbeSpec, Request

_TIMEOUT_S = 300.0


def probes() -> Iterator[ProbeSpec]:
    """Yield both kernels for every scheme with codes; the activation's dtype alternates.

    Raises ModuleNotFoundError without PyTorch.
    """
    _requests()
    yield from _probes()


def request(spec: ProbeSpec, architecture: Architecture) -> Request:
    """Return the request for K = 4096, M = 1 or 16, and one of the configurations that are tried on a GPU."""
    return dict(_requests()[spec.id][architecture.name])


def _probes() -> Iterator[ProbeSpec]:
    for at, name in enumerate(name for name in SCHEMES if scheme_named(name).quantized):
        x, other = ("bf16", "fp16") if at % 2 else ("fp16", "bf16")
        yield ProbeSpec("triton_fused", name, f"matvec-{x}", {"kernel": "matvec", "x": x})
        yield ProbeSpec("triton_fused", name, f"dot-{other}", {"kernel": "dot", "x": other})


@cache
def _requests() -> dict[str, dict[str, dict[str, Any]]]:
    """Return all requests, from a child: the kernels' module imports PyTorch and Triton, which this process does not.
    """
    with Isolation(default_memory_limit()) as isolation:
        outcome = isolation.call("fpxbench.targets.suite_requests:requests", list(_probes()),
                                 list(ARCHITECTURES.values()), timeout_s=_TIMEOUT_S)
    if outcome.value is not None:
        return outcome.read(dict[str, dict[str, dict[str, Any]]])
    if outcome.missing_module:
        raise ModuleNotFoundError(f"no module named {outcome.missing_module!r}", name=outcome.missing_module)
    raise RuntimeError(f"the kernels of triton_fused could not be prepared: {outcome.failure.summary}\n"
                       f"{outcome.log_tail}")

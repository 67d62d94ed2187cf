"""Observe the effects of one call: the kernels that it launches and the memory that it holds."""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fpxbench.checking import device_wait

HEAVY_KERNEL = 0.05
"""Least share of a call's time of a heavy kernel."""


_PYTHON_US = 300.0
"""Overhead of calling some fifty operators under the profiler."""
_WHOLE_CALL = "fpxbench: the call"


class KernelLaunch(NamedTuple):
    """One kernel launch in a profile."""

    name: str
    us: float


@dataclass(frozen=True)
class Effects:
    """The effects of one call: its kernels in order, and its peak memory beyond its operands, output included."""

    kernels: list[KernelLaunch]
    peak_bytes: int
    outside_us: float = 0.0
    """Time of a call on a CPU outside PyTorch's operators: in Python, and in libraries called directly."""

    @property
    def times_us(self) -> list[float]:
        """Time of each kernel. Code outside PyTorch counts as one if it takes longer than every other kernel plus
        Python's overhead."""
        own = [kernel.us for kernel in self.kernels]
        return [*own, self.outside_us] if self.outside_us > max(own, default=0.0) + _PYTHON_US else own

    @property
    def heavy_kernels(self) -> int:
        """Number of kernels with a considerable share of the call's time, unlike a copy of one activation row."""
        times = self.times_us
        return sum(us >= HEAVY_KERNEL * sum(times) for us in times)


# Operators (``aten::mm``) and Inductor's loops (``graph_0_cpp_fused_…``); the rest of a trace is bookkeeping.
_IS_KERNEL = re.compile(r"\w+::|graph_\d+_cpp_")


# Operators that make views, allocate, or query: they move no data.
_NO_KERNEL = frozenset("aten::" + name for name in """
    empty empty_strided empty_like new_empty view view_as reshape _reshape_alias t as_strided transpose expand
    expand_as permute  select slice narrow squeeze unsqueeze detach alias _unsafe_view resize_ result_type
    lift_fresh numpy_T broadcast_to split chunk  unbind movedim unfold to set_ is_nonzero item
    _local_scalar_dense resolve_conj resolve_neg flatten unflatten
""".split())  # noqa: SIM905


@functools.cache
def _does_work_itself(name: str) -> bool:
    """Return whether an operator has its own CPU kernel, even if it calls others (a mixed-dtype `mul` converts first).
    """
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    if packet is None:
        return False
    schemas = (getattr(packet, overload)._schema for overload in packet.overloads())
    qualified = (f"{schema.name}.{schema.overload_name}".rstrip(".") for schema in schemas)
    # TorchScript's own overloads are not registered.
    registered = (full for full in qualified if torch._C._dispatch_has_kernel(full))
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU") for full in registered)


def trace_events(profiler: torch.profiler.profile | torch.autograd.profiler.profile) -> list[dict[str, Any]]:
    """Return a profiler's recording as events of a Chrome trace; times are in microseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def observe(call: Callable[[], object], device: str) -> Effects:
    """Run `call` once under the profiler, and return its effects: kernels on a GPU; on a CPU the operators that do
    work, including Inductor's fused loops (`fpxbench.sweep.preload` makes them visible)."""
    profiler: torch.profiler.profile | torch.autograd.profiler.profile
    if device == "cpu":
        # `torch.profiler.profile`, its wrapper, first imports the compiler, which takes as long as importing PyTorch.
        profiler = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
    else:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        profiler = torch.profiler.profile(activities=activities)
        device_wait.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held_before = torch.cuda.memory_allocated()
    with torch.no_grad(), profiler, torch.profiler.record_function(_WHOLE_CALL):
        started = time.thread_time()
        call()
        worked_us = (time.thread_time() - started) * 1e6
        if device != "cpu":
            device_wait.synchronize()
    events = trace_events(profiler)
    if device != "cpu":
        return Effects(_gpu_kernels(events), torch.cuda.max_memory_allocated() - held_before)
    return Effects(_cpu_kernels(events), _cpu_peak(events), _outside_operators(events, worked_us))


def _gpu_kernels(events: list[dict]) -> list[KernelLaunch]:
    """Return the kernels and copies on a GPU, in order. A kernel that was launched before the one before it on its
    stream ended, and waited for that, counts from its end."""
    found, ends = [], defaultdict[Any, float](float)
    for event in sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")),
                        key=lambda e: e["ts"]):
        stream, end = event.get("args", {}).get("stream"), event["ts"] + event["dur"]
        found.append(KernelLaunch(event["name"], max(0.0, end - max(event["ts"], ends[stream]))))
        ends[stream] = max(ends[stream], end)
    return found


def _cpu_kernels(events: list[dict]) -> list[KernelLaunch]:
    """Return the operators that do work, in order: those with their own CPU kernel, and the innermost of the others."""
    operators = sorted(
        (e for e in events if e.get("cat") == "cpu_op" and e["name"] not in _NO_KERNEL and _IS_KERNEL.match(e["name"])),
        key=lambda e: (e["tid"], e["ts"], -e["dur"]),
    )
    found: list[tuple[float, KernelLaunch]] = []
    for index, this in enumerate(operators):
        inside = list(itertools.takewhile(
            lambda e, this=this: e["tid"] == this["tid"] and e["ts"] < this["ts"] + this["dur"], operators[index + 1:]))
        wraps_itself = any(e["name"] == this["name"] for e in inside)      # mm.out calls mm
        if not inside or (_does_work_itself(this["name"]) and not wraps_itself):
            found.append((this["ts"], KernelLaunch(this["name"], this["dur"] - sum(e["dur"] for e in inside))))
    return [kernel for _, kernel in sorted(found, key=lambda pair: pair[0])]


def _outside_operators(events: list[dict], worked_us: float) -> float:
    """Return a lower bound, in µs, of the processor time that the call's thread spent outside PyTorch's operators.

    worked_us : the thread's processor time: on a busy machine, wall-clock time includes waiting
    """
    call, = (e for e in events if e.get("name") == _WHOLE_CALL and e.get("ph") == "X")
    end = call["ts"] + call["dur"]
    outside, at = 0.0, call["ts"]
    for event in sorted((e for e in events if e.get("cat") == "cpu_op" and e["tid"] == call["tid"]
                         and call["ts"] <= e["ts"] <= end), key=lambda e: e["ts"]):
        outside += max(0.0, event["ts"] - at)
        at = max(at, event["ts"] + event["dur"])
    outside += max(0.0, end - at)
    return max(0.0, min(outside, worked_us - (call["dur"] - outside)))


def _cpu_peak(events: list[dict]) -> int:
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak

"""How fast, and by what effect: times, kernels launched, memory taken, roofline.

Nothing here is asked of a case that is not right.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

from fpxbench.checking import check
from fpxbench.checking.correctness import Operands
from fpxbench.implementation import Implementation
from fpxbench.records.record import Flag, Timing, Traffic

Call = Callable[[], object]

MIN_SAMPLES, MAX_SAMPLES = 6, 60
"""Six is the least from which order statistics give a 95% interval of the median (2 / 2**6 = 3% outside)."""
SAMPLE_SECONDS_CPU = 2e-3
"""A CPU sample runs the call often enough to last this long, so that the clock's own cost stays below 0.1%."""

MAX_COPIES, MAX_COPY_BYTES = 64, 1 << 30
CACHE_MULTIPLE = 2
"""Weight copies are rotated until they exceed this many times the last-level cache."""

NOISY_HALF_WIDTH = 0.05
OVER_ROOFLINE = 1.1
"""A read figure may exceed the measured bandwidth by this before it is called impossible: bandwidth is measured too."""
UNFUSED_BYTES = 0.25
"""Scratch memory above this share of the 16-bit weight means that decoded weights were written out."""
HEAVY_KERNEL = 0.05
"""A kernel with less than this share of a call's time is not held against it."""


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, sample by sample, for the implementation and, in turn with it, for the dense baseline."""

    call: list[float]
    baseline: list[float]
    beyond_cache: bool
    """The rotated copies exceed the cache, so memory was really read."""


def median_ci95(samples: list[float]) -> tuple[float, float, float]:
    """Median and its 95% interval from order statistics (no assumption on the distribution)."""
    ordered = np.sort(np.asarray(samples))
    count = len(ordered)
    low = int(stats.binom.ppf(0.025, count, 0.5))
    return float(np.median(ordered)), float(ordered[max(low - 1, 0)]), float(ordered[min(count - low, count - 1)])


def ratio_ci95(numerator: list[float], denominator: list[float], seed: int) -> tuple[float, float]:
    """95% interval of the ratio of medians, by bootstrap."""
    ratio = stats.bootstrap(
        (np.asarray(numerator), np.asarray(denominator)), lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        n_resamples=400, method="percentile", rng=np.random.default_rng(seed), vectorized=True,
    )
    return float(ratio.confidence_interval.low), float(ratio.confidence_interval.high)


def rotation(nbytes: int, cache_bytes: int) -> int:
    """How many copies of a weight of `nbytes` are to be used in turn, so that each call finds its own outside the cache."""
    wanted = CACHE_MULTIPLE * cache_bytes // nbytes + 2
    return int(max(1, min(wanted, MAX_COPIES, MAX_COPY_BYTES // nbytes)))


def time_case(implementation: Implementation, operands: Operands, *, cache_bytes: int, budget_s: float) -> Samples:
    """Time one call against ``F.linear`` on a 16-bit weight of the same shape, in turn, over rotating weight copies."""
    case, device, weight = operands.case, operands.device, operands.weight
    copies = [weight.clone() for _ in range(rotation(weight.nbytes, cache_bytes))]
    dense = operands.original.to(check.ACTIVATION_DTYPES[case.activation])
    dense_copies = [dense.clone() for _ in range(rotation(dense.nbytes, cache_bytes))]
    x = operands.activation(check_call_number(0))
    calls = [lambda w=w: implementation.matmul(x, w) for w in copies]
    baseline_calls = [lambda w=w: F.linear(x, w) for w in dense_copies]
    with torch.no_grad():
        sample = _graph_sampler(calls) if device != "cpu" else _cpu_sampler(calls)
        sample_baseline = _graph_sampler(baseline_calls) if device != "cpu" else _cpu_sampler(baseline_calls)
        times, baseline_times = [], []
        deadline = time.perf_counter() + budget_s
        while len(times) < MIN_SAMPLES or (time.perf_counter() < deadline and len(times) < MAX_SAMPLES):
            times.append(sample())
            baseline_times.append(sample_baseline())
    beyond = len(copies) * weight.nbytes > cache_bytes
    return Samples(times, baseline_times, beyond)


def check_call_number(offset: int) -> int:
    """Numbers of the calls made after the timing, apart from those checked before it."""
    return 1000 + offset


def _cpu_sampler(calls: list[Call]) -> Callable[[], float]:
    """One sample = the mean of enough calls to last `SAMPLE_SECONDS_CPU`; threads as the process has them."""
    # Not at the top: its import asks CUDA for devices, after which no child forked from that process can use them.
    from torch.utils.benchmark import Timer

    turn = itertools.cycle(calls)
    timer = Timer("next(turn)()", globals={"turn": turn}, num_threads=torch.get_num_threads())
    # Timer runs the statement once before it times it, so this is warm.
    once = timer.timeit(1).median
    number = max(1, round(SAMPLE_SECONDS_CPU / max(once, 1e-7)))
    if number > 1:
        return lambda: timer.timeit(number).median

    def single() -> float:
        # Timer.timeit would run the statement twice more to warm up, each time; a call this long is warm from the one before.
        start = time.perf_counter()
        next(turn)()
        return time.perf_counter() - start

    return single


def captured(calls: list[Call]) -> tuple[Call, int]:
    """A captured graph that runs every call once (and again until it lasts), as one launch; and how many calls it makes.

    What cannot be captured (it synchronises, or allocates outside the pool) is launched call by call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, calls[0]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    repeats = max(1, 16 // len(calls))
    sequence = calls * repeats
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in sequence:
                call()
        launch = graph.replay
    except RuntimeError:
        torch.cuda.synchronize()

        def launch() -> None:
            for call in sequence:
                call()
    launch()
    torch.cuda.synchronize()
    return launch, len(sequence)


def _graph_sampler(calls: list[Call]) -> Callable[[], float]:
    """One sample = the mean of `captured` calls, by events."""
    launch, count = captured(calls)

    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / count

    return sample


class Kernel(NamedTuple):
    """A kernel as the profiler saw it."""

    name: str
    us: float


@dataclass(frozen=True)
class Effects:
    """What one call did: kernels by name in order, and the most memory it held beyond its operands, output included."""

    kernels: list[Kernel]
    peak_bytes: int

    @property
    def heavy_kernels(self) -> int:
        """Kernels that take a share of the call worth speaking of: a copy of one activation row does not."""
        whole = sum(kernel.us for kernel in self.kernels)
        return sum(kernel.us >= HEAVY_KERNEL * whole for kernel in self.kernels)


# Operators (``aten::mm``) and Inductor's loops (``graph_0_cpp_fused_…``); the rest of a trace is bookkeeping.
_IS_KERNEL = re.compile(r"\w+::|graph_\d+_cpp_")


# Operators that make views or bare memory, or only ask: they move nothing.
_NO_KERNEL = frozenset("aten::" + name for name in (
    "empty empty_strided empty_like new_empty view view_as reshape _reshape_alias t as_strided transpose expand expand_as permute "
    "select slice narrow squeeze unsqueeze detach alias _unsafe_view resize_ result_type lift_fresh numpy_T broadcast_to split chunk "
    "unbind movedim unfold to set_ is_nonzero item _local_scalar_dense resolve_conj resolve_neg flatten unflatten"
).split())


@functools.cache
def _does_work_itself(name: str) -> bool:
    """Whether an operator has a CPU kernel of its own, whatever it calls besides (a mixed-dtype `mul` converts first)."""
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None) if name.startswith("aten::") else None
    if packet is None:
        return False
    schemas = (getattr(packet, overload)._schema for overload in packet.overloads())
    qualified = (f"{schema.name}.{schema.overload_name}".rstrip(".") for schema in schemas)
    registered = (full for full in qualified if torch._C._dispatch_has_kernel(full))    # TorchScript's own overloads are not
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(full, "CPU") for full in registered)


def observe(call: Call, device: str) -> Effects:
    """Run `call` once under the profiler: device kernels on a GPU; on a CPU the operators that do work, Inductor's
    fused loops among them (`fpxbench.sweep.worker` makes those show)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held_before = torch.cuda.memory_allocated()
    with torch.no_grad(), torch.profiler.profile(activities=activities, profile_memory=device == "cpu") as profiler:
        call()
        if device != "cpu":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    if device != "cpu":
        kernels = sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")), key=lambda e: e["ts"])
        return Effects([Kernel(e["name"], e["dur"]) for e in kernels], torch.cuda.max_memory_allocated() - held_before)
    return Effects(_cpu_kernels(events), _cpu_peak(events))


def _cpu_kernels(events: list[dict]) -> list[Kernel]:
    """Operators that do work, in order: those with a CPU kernel of their own, and the innermost of the others."""
    operators = sorted(
        (e for e in events if e.get("cat") == "cpu_op" and e["name"] not in _NO_KERNEL and _IS_KERNEL.match(e["name"])),
        key=lambda e: (e["tid"], e["ts"], -e["dur"]),
    )
    found: list[tuple[float, Kernel]] = []
    for index, this in enumerate(operators):
        inside = list(itertools.takewhile(
            lambda e, this=this: e["tid"] == this["tid"] and e["ts"] < this["ts"] + this["dur"], operators[index + 1:]
        ))
        wraps_itself = any(e["name"] == this["name"] for e in inside)      # mm.out calls mm
        if not inside or (_does_work_itself(this["name"]) and not wraps_itself):
            found.append((this["ts"], Kernel(this["name"], this["dur"] - sum(e["dur"] for e in inside))))
    return [kernel for _, kernel in sorted(found, key=lambda pair: pair[0])]


def _cpu_peak(events: list[dict]) -> int:
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def traffic(operands: Operands, effects: Effects, median_s: float | None, read_gb_per_s: float | None) -> Traffic:
    """Bytes and kernels of a case, and the useful bandwidth if it was timed."""
    case = operands.case
    element = 2
    bytes_min = operands.weight.nbytes + (case.m * case.k + case.m * case.n) * element
    gb_per_s = bytes_min / median_s / 1e9 if median_s else None
    return Traffic(
        packed_bytes=operands.weight.nbytes, bytes_min=bytes_min, gb_per_s=gb_per_s,
        roofline_fraction=gb_per_s / read_gb_per_s if gb_per_s and read_gb_per_s else None,
        kernels_launched=len(effects.kernels), heavy_kernels=effects.heavy_kernels,
        kernels=[kernel.name[:200] for kernel in effects.kernels[:40]], peak_bytes=effects.peak_bytes,
    )


def timing(samples: Samples, seed: int) -> Timing:
    median, low, high = median_ci95(samples.call)
    baseline, _, _ = median_ci95(samples.baseline)
    return Timing(
        samples_us=[round(s * 1e6, 4) for s in samples.call], median_us=median * 1e6, ci95_us=(low * 1e6, high * 1e6),
        baseline_us=baseline * 1e6, speedup=baseline / median, speedup_ci95=ratio_ci95(samples.baseline, samples.call, seed),
    )


def wrote_decoded_weight(operands: Operands, peak_bytes: int) -> bool:
    """Whether one call held a good part of the weight in decoded form, beyond its output."""
    case = operands.case
    return peak_bytes - 2 * case.m * case.n > UNFUSED_BYTES * 2 * case.n * case.k


def flags(operands: Operands, times: Timing, moved: Traffic, beyond_cache: bool) -> list[Flag]:
    found = []
    if operands.weight.scheme.quantized and (moved.heavy_kernels > 1 or wrote_decoded_weight(operands, moved.peak_bytes)):
        found.append(Flag.UNFUSED)
    if beyond_cache and moved.roofline_fraction and moved.roofline_fraction > OVER_ROOFLINE:
        found.append(Flag.OVER_ROOFLINE)
    low, high = times.ci95_us
    if (high - low) / 2 > NOISY_HALF_WIDTH * times.median_us:
        found.append(Flag.NOISY)
    return found


def _percent(share: float) -> str:
    return "under 1%" if share < 0.01 else f"{share:.0%}"


def bottleneck(operands: Operands, times: Timing, moved: Traffic, read_gb_per_s: float | None) -> str:
    """What holds a case back, in one sentence, from what was measured of it."""
    case = operands.case
    parts = []
    if wrote_decoded_weight(operands, moved.peak_bytes):
        parts.append(f"writes the decoded weight to memory and reads it back ({moved.peak_bytes / 1e6:.0f} MB of scratch)")
    if operands.weight.scheme.quantized and moved.heavy_kernels > 1:
        parts.append(f"spends its time in {moved.heavy_kernels} kernels where one would do")
    floor_us = moved.bytes_min / (read_gb_per_s * 1e3) if read_gb_per_s else None
    if floor_us and not parts:
        share = floor_us / times.median_us
        if share > 0.7:
            parts.append(f"memory: it moves {moved.gb_per_s:.0f} GB/s of the {read_gb_per_s:.0f} GB/s that this machine reads")
        elif case.m > 64:
            flops = 2 * case.m * case.n * case.k / times.median_us / 1e6
            parts.append(f"arithmetic: {flops:.2g} TFLOP/s at M = {case.m}, where memory would take {share:.0%} of the time")
        else:
            parts.append(f"not memory: reading its bytes would take {_percent(share)} of the time; decoding and launching take the rest")
    elif floor_us:
        parts.append(f"reading the packed bytes once would take {_percent(floor_us / times.median_us)} of the time")
    return "; ".join(parts)

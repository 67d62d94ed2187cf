"""How fast, and by what effect: times, kernels launched, memory taken, roofline.

Nothing here is asked of a case that is not right.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torch.utils.benchmark import Timer

from fpxbench import check
from fpxbench.conduct import Operands
from fpxbench.implementation import Implementation
from fpxbench.record import Flag, Timing, Traffic

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
    with torch.inference_mode():
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
    turn = itertools.cycle(calls)
    timer = Timer("next(turn)()", globals={"turn": turn}, num_threads=torch.get_num_threads())
    # Timer runs the statement once before it times it, so this is warm.
    once = timer.timeit(1).median
    number = max(1, round(SAMPLE_SECONDS_CPU / max(once, 1e-7)))
    return lambda: timer.timeit(number).median


def _graph_sampler(calls: list[Call]) -> Callable[[], float]:
    """One sample = the mean of a captured graph that runs every copy once (and again until it lasts), by events.

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

    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(sequence)

    return sample


@dataclass(frozen=True)
class Effects:
    """What one call did: kernels by name in order, and the most memory it held beyond its operands, output included."""

    kernels: list[str]
    peak_bytes: int


# Operators that make views or bare memory: they launch nothing and move nothing.
_NO_KERNEL = frozenset({
    "aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::view", "aten::reshape", "aten::t", "aten::as_strided",
    "aten::transpose", "aten::expand", "aten::permute", "aten::select", "aten::slice", "aten::squeeze", "aten::unsqueeze",
    "aten::detach", "aten::alias", "aten::_unsafe_view", "aten::resize_", "aten::result_type", "aten::lift_fresh", "aten::narrow",
    "aten::numpy_T", "aten::broadcast_to", "aten::split", "aten::chunk", "aten::unbind", "aten::movedim", "aten::to", "aten::view_as",
    "aten::_reshape_alias", "aten::unfold", "aten::set_", "aten::is_nonzero", "aten::item", "aten::_local_scalar_dense", "aten::expand_as",
})


def observe(call: Call, device: str) -> Effects:
    """Run `call` once under the profiler: device kernels on a GPU; on a CPU the leaf operators that do work, and
    Inductor's fused loops (which show as operators once `cpp.enable_kernel_profile` is on)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held_before = torch.cuda.memory_allocated()
    with torch.inference_mode(), torch.profiler.profile(activities=activities, profile_memory=device == "cpu") as profiler:
        call()
        if device != "cpu":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    if device != "cpu":
        kernels = sorted((e for e in events if e.get("cat") in ("kernel", "gpu_memset", "gpu_memcpy")), key=lambda e: e["ts"])
        return Effects([e["name"] for e in kernels], torch.cuda.max_memory_allocated() - held_before)
    return Effects(_cpu_leaves(events), _cpu_peak(events))


def _cpu_leaves(events: list[dict]) -> list[str]:
    """Operators that no other operator of the same thread runs inside of, in order, without those that only make views."""
    operators = sorted(
        (e for e in events if e.get("cat") == "cpu_op" and e["name"] not in _NO_KERNEL), key=lambda e: (e["tid"], e["ts"], -e["dur"])
    )
    leaves = []
    for this, following in itertools.zip_longest(operators, operators[1:]):
        inside = following is not None and following["tid"] == this["tid"] and following["ts"] < this["ts"] + this["dur"]
        if not inside:
            leaves.append(this)
    return [e["name"] for e in sorted(leaves, key=lambda e: e["ts"])]


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
        kernels_launched=len(effects.kernels), kernels=[name[:200] for name in effects.kernels[:40]], peak_bytes=effects.peak_bytes,
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
    if operands.weight.scheme.quantized and (moved.kernels_launched > 1 or wrote_decoded_weight(operands, moved.peak_bytes)):
        found.append(Flag.UNFUSED)
    if beyond_cache and moved.roofline_fraction and moved.roofline_fraction > OVER_ROOFLINE:
        found.append(Flag.OVER_ROOFLINE)
    low, high = times.ci95_us
    if (high - low) / 2 > NOISY_HALF_WIDTH * times.median_us:
        found.append(Flag.NOISY)
    return found


def bottleneck(operands: Operands, times: Timing, moved: Traffic, read_gb_per_s: float | None) -> str:
    """What holds a case back, in one sentence, from what was measured of it."""
    case = operands.case
    parts = []
    if wrote_decoded_weight(operands, moved.peak_bytes):
        parts.append(f"writes the decoded weight to memory and reads it back ({moved.peak_bytes / 1e6:.0f} MB of scratch)")
    if operands.weight.scheme.quantized and moved.kernels_launched > 1:
        parts.append(f"takes {moved.kernels_launched} kernels where one would do")
    floor_us = moved.bytes_min / (read_gb_per_s * 1e3) if read_gb_per_s else None
    if floor_us and not parts:
        share = floor_us / times.median_us
        if share > 0.7:
            parts.append(f"memory: it moves {moved.gb_per_s:.0f} GB/s of the {read_gb_per_s:.0f} GB/s that this machine reads")
        elif case.m > 64:
            flops = 2 * case.m * case.n * case.k / times.median_us / 1e6
            parts.append(f"arithmetic: {flops:.2g} TFLOP/s at M = {case.m}, where memory would take {share:.0%} of the time")
        else:
            parts.append(f"not memory: reading its bytes would take {share:.0%} of the time; decoding and launching take the rest")
    elif floor_us:
        parts.append(f"reading the packed bytes once would take {floor_us / times.median_us:.0%} of the time")
    return "; ".join(parts)

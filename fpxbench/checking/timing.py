"""Time a case that is right, interleaved with the dense 16-bit product of the same shape."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fpxbench.checking import inputs
from fpxbench.checking.device_lock import device_lock
from fpxbench.checking.operands import Operands
from fpxbench.implementation import Implementation
from fpxbench.records.record import Timing
from fpxbench.stats import median_interval, median_ratio_interval

Call = Callable[[], object]

MIN_SAMPLES, MAX_SAMPLES = 6, 60
"""Six is the least from which order statistics give a 95% interval of the median (2 / 2**6 = 3% outside)."""
SAMPLE_SECONDS_CPU = 2e-3
"""A CPU sample runs the call often enough to last this long, so that the clock's own cost stays below 0.1%."""

MAX_COPIES, MAX_COPY_BYTES = 64, 1 << 30
CACHE_MULTIPLE = 2
"""Weight copies are rotated until they exceed this many times the last-level cache."""


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, sample by sample, for the implementation and, in turn with it, for the dense baseline."""

    call: list[float]
    baseline: list[float]
    beyond_cache: bool
    """The rotated copies exceed the cache, so memory was really read."""


def rotation(nbytes: int, cache_bytes: int) -> int:
    """How many copies of a weight of `nbytes` are to be used in turn, so that each call finds its own outside the cache."""
    wanted = CACHE_MULTIPLE * cache_bytes // nbytes + 2
    return int(max(1, min(wanted, MAX_COPIES, MAX_COPY_BYTES // nbytes)))


def time_case(implementation: Implementation, operands: Operands, *, cache_bytes: int, budget_s: float) -> Samples:
    """Time one call against ``F.linear`` on a 16-bit weight of the same shape, in turn, over rotating weight copies."""
    case, device, weight = operands.case, operands.device, operands.weight
    copies = [weight.clone() for _ in range(rotation(weight.nbytes, cache_bytes))]
    dense = operands.original.to(inputs.ACTIVATION_DTYPES[case.activation])
    dense_copies = [dense.clone() for _ in range(rotation(dense.nbytes, cache_bytes))]
    x = operands.activation("timing")
    calls = [lambda w=w: implementation.matmul(x, w) for w in copies]
    baseline_calls = [lambda w=w: F.linear(x, w) for w in dense_copies]
    with torch.no_grad(), device_lock(device, case.id):
        sample = _graph_sampler(calls) if device != "cpu" else _cpu_sampler(calls)
        sample_baseline = _graph_sampler(baseline_calls) if device != "cpu" else _cpu_sampler(baseline_calls)
        times, baseline_times = [], []
        deadline = time.perf_counter() + budget_s
        while len(times) < MIN_SAMPLES or (time.perf_counter() < deadline and len(times) < MAX_SAMPLES):
            times.append(sample())
            baseline_times.append(sample_baseline())
    beyond = len(copies) * weight.nbytes > cache_bytes
    return Samples(times, baseline_times, beyond)


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


def summarized(samples: Samples, seed: int) -> Timing:
    """Return the record's times: median, intervals, and the speedup over the baseline."""
    median, low, high = median_interval(samples.call)
    baseline, _, _ = median_interval(samples.baseline)
    return Timing(
        samples_us=[round(s * 1e6, 4) for s in samples.call], median_us=median * 1e6, ci95_us=(low * 1e6, high * 1e6),
        baseline_us=baseline * 1e6, speedup=baseline / median, speedup_ci95=median_ratio_interval(samples.baseline, samples.call, seed=seed),
    )

"""Time a case that was found right with pytest-benchmark's fixture, in the process that runs pytest."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch

from fpxbench.checking import correctness, effects, timing, traffic
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.device_lock import device_lock
from fpxbench.checking.timing import Call, Samples
from fpxbench.implementation import Implementation, discover
from fpxbench.records.record import Timing
from fpxbench.records.verdict import Status, Verdict, classify_exception
from fpxbench.stats import median_interval
from fpxbench.sweep.messages import TrialRequest, TrialResult
from fpxbench.sweep.preload import preload
from fpxbench.sweep.trial import forget, prepare

ROUND_SECONDS = 2e-3
"""A round calls often enough to last this long, so that reading the clock is below 1% of it, a GPU's too."""


def time_case(benchmark, request: TrialRequest, baseline_samples: list[float]) -> TrialResult:
    """Time rounds of calls over rotating weight copies into `benchmark` (pytest-benchmark's fixture).

    `baseline_samples` are the dense product's seconds per call, empty if it has none. What the implementation raises,
    or does wrong after so many calls, becomes the verdict, and `benchmark` then holds no time.
    """
    preload()
    result = TrialResult(verdict=Verdict(status=Status.OK))
    implementation = discover(request.impls)[0][request.case.implementation]()
    result.no_timing = implementation.no_timing(request.device)
    if result.no_timing:
        return result
    try:
        _time(benchmark, implementation, request, baseline_samples, result)
    except ContractViolation as violation:
        result.verdict = violation.verdict
    except Exception as error:  # whatever an implementation raises is a finding about it
        result.verdict = classify_exception(type(error).__name__, str(error), "")
    finally:
        forget()
    if result.verdict.status is not Status.OK:
        _withdraw(benchmark)
    return result


def _time(
    benchmark, implementation: Implementation, request: TrialRequest, baseline_samples: list[float], result: TrialResult
) -> None:
    operands = prepare(implementation, request)
    _, verdict = correctness.check_calls(implementation, operands, calls=1)    # compiles and tunes on the way
    if verdict is not None:
        result.verdict = verdict
        return
    x = operands.activation(0)
    seen = effects.observe(lambda: implementation.matmul(x, operands.weight), request.device)
    timed = timing.TimedCase(implementation, operands, request.cache_bytes)
    with torch.no_grad(), device_lock(request.device, request.case.id):
        _run_rounds(benchmark, timed)
        timed.time_repeated_activation()
        samples = Samples(list(benchmark.stats.stats.data), baseline_samples, timed.beyond_cache)
    timed.check(samples)
    _, verdict = correctness.check_calls(implementation, operands, timed=True, calls=1)
    if verdict is not None:
        result.verdict = verdict
        return
    result.timing = _timing(samples, request.seed)
    result.traffic = traffic.traffic_of(operands, seen, result.timing.median_us / 1e6, request.read_gb_per_s)
    result.flags = traffic.flags(operands, result.timing, result.traffic, timed.beyond_cache, seen,
                                 request.read_gb_per_s)
    result.traffic = result.traffic.model_copy(
        update={"bottleneck": traffic.bottleneck(operands, result.timing, result.traffic, request.read_gb_per_s)}
    )


def _run_rounds(benchmark, timed: timing.TimedCase) -> None:
    """Run as many rounds as ``--benchmark-max-time`` has room for, ``--benchmark-min-rounds`` at least."""
    device = timed.operands.device
    target: Callable[[], object]
    if timed.launched is None:
        target, at_once = _interleaved(timed.calls), 1
    else:
        target = launched = _Launched(timed.launched.launch, timed.launched.calls)
        at_once = launched.count
    once = _seconds_of_one(target, at_once, device)
    iterations = at_once * max(1, round(ROUND_SECONDS / (once * at_once)))
    room = int(benchmark._max_time / (once * iterations))
    rounds = max(benchmark._min_rounds, timing.MIN_SAMPLES, min(room, timing.MAX_SAMPLES))
    benchmark.pedantic(target, rounds=rounds, iterations=iterations, warmup_rounds=1)


def _interleaved(calls: list[Call]) -> Call:
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


class _Launched:
    """One product a call, as pytest-benchmark counts them; the first of `count` calls launches them all at once.

    So a round is what the device takes, and not what Python takes to launch kernels of some microseconds.
    """

    def __init__(self, launch: Callable[[], None], count: int) -> None:
        self.count = count
        self._launch, self._due = launch, 0

    def __call__(self) -> None:
        if self._due == 0:
            self._launch()
            self._due = self.count
        self._due -= 1


def _seconds_of_one(target: Callable[[], object], at_once: int, device: str) -> float:
    """Return a first estimate, the faster of two: the first call may still warm something."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(at_once):
            target()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / at_once)
    return max(min(seconds), 1e-7)


def _timing(samples: Samples, seed: int) -> Timing:
    if samples.baseline:
        return timing.summarized(samples, seed)
    median, low, high = median_interval(samples.call)
    return Timing(samples_us=[s * 1e6 for s in samples.call], median_us=median * 1e6, ci95_us=(low * 1e6, high * 1e6))


def _withdraw(benchmark) -> None:
    """Take back what was timed: a case that is not right has no row in the table and none in the JSON."""
    benchmark.has_error = True
    if benchmark.stats is not None:
        benchmark.stats.stats.data.clear()

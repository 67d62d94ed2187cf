"""Time a right case, interleaved with the dense 16-bit product of the same shape.

The timed calls themselves are checked: the same calls, or the same captured graph, are run again with another
activation in the same buffer, and their outputs are compared with its reference.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter  # by name: an implementation may replace time.perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from fpxbench.checking import device_wait
from fpxbench.checking.contract import ContractViolation
from fpxbench.checking.device_lock import device_lock
from fpxbench.checking.energy import BATCH_S, StateMonitor
from fpxbench.checking.operands import Operands
from fpxbench.checking.reference import Reference, compare
from fpxbench.implementation import Implementation
from fpxbench.records.kinds import Kind
from fpxbench.records.record import DeviceState, Timing
from fpxbench.stats import median_interval, median_ratio_interval

Call = Callable[[], Tensor]

MIN_SAMPLES, MAX_SAMPLES = 6, 60
"""Six is the least number of samples whose order statistics give a 95% interval of the median (2 / 2**6 = 3%)."""
SAMPLE_SECONDS_CPU = 2e-3
"""Duration of a CPU sample, in as many calls as necessary, so that the clock's overhead stays below 0.1%."""

METHOD, LAUNCHED_METHOD = 1, 2
"""Numbers in the record: calls timed one after the other; launches timed behind others, which were not before 2."""
SHORT_LAUNCH_S = 4e-3
"""Duration below which the launch overhead of a graph, up to some 40 us, is 1% of it or more."""

MAX_COPIES, MAX_COPY_BYTES = 64, 1 << 30
CACHE_MULTIPLE = 2
"""Size of all rotated weight copies, in multiples of the last-level cache."""

CHECKED_OUTPUTS = 2
"""How many of the timed calls are compared with the reference."""
UNSEEN_SHARE, UNSEEN_SECONDS = 0.25, 1e-4
"""Work that ends later than the timed stream by more than both, a share of a call and a time, was not timed."""
REMEMBERED_FACTOR = 3.0
"""Results are remembered if a repeated activation is this many times faster than a new one."""
_REMEMBERED_CALLS = 5
_REMEMBERED_SLOWEST_S = 0.5


@dataclass(frozen=True)
class Samples:
    """Seconds per call, sample by sample, of the implementation and of the interleaved dense baseline."""

    call: list[float]
    baseline: list[float]
    beyond_cache: bool
    """Whether the rotated copies exceed the cache, so that memory was really read."""
    unseen: list[float] = field(default_factory=list)
    """Seconds per call that the device worked after the timed stream had ended, sample by sample."""
    device_state: DeviceState | None = None
    method: int = METHOD


def rotation(nbytes: int, cache_bytes: int) -> int:
    """Return how many copies of a weight of `nbytes` to rotate, so that each call's copy is not in the cache."""
    wanted = CACHE_MULTIPLE * cache_bytes // nbytes + 2
    return int(max(1, min(wanted, MAX_COPIES, MAX_COPY_BYTES // nbytes)))


class TimedCase:
    """The timed calls of one case: one activation, in one buffer, with rotating copies of the weight."""

    def __init__(self, implementation: Implementation, operands: Operands, cache_bytes: int) -> None:
        self.implementation, self.operands = implementation, operands
        weight = operands.weight
        self.x = operands.activation("timing")
        self.copies = [weight.clone() for _ in range(rotation(weight.nbytes, cache_bytes))]
        self.calls: list[Call] = [lambda w=w: implementation.matmul(self.x, w) for w in self.copies]
        self.beyond_cache = len(self.copies) * weight.nbytes > cache_bytes
        with torch.no_grad():
            self.launched = captured(self.calls) if operands.device != "cpu" else None
        self._fresh: list[float] = []
        self._repeated: list[float] = []

    def prepare_baseline(self, cache_bytes: int) -> None:
        """Prepare the calls of the dense baseline."""
        operands = self.operands
        dense = operands.dense()
        dense_copies = [dense, *(dense.clone() for _ in range(rotation(dense.nbytes, cache_bytes) - 1))]
        self.baseline_calls: list[Call] = [lambda w=w: operands.dense_product(self.x, w) for w in dense_copies]
        with torch.no_grad():
            self.launched_baseline = captured(self.baseline_calls) if operands.device != "cpu" else None

    def samples(self, budget_s: float) -> Samples:
        """Time calls, interleaved with the product with a 16-bit weight of the same shape; then time calls on repeated
        and on new activations."""
        times: list[float] = []
        baseline_times: list[float] = []
        unseen: list[float] = []
        monitor = StateMonitor(self.operands.device, shared=not device_wait.wait_until_idle(self.operands.device))
        with torch.no_grad():
            if self.launched is None or self.launched_baseline is None:
                sample, sample_baseline = _cpu_sampler(self.calls), _cpu_sampler(self.baseline_calls)
            else:
                sample = _launch_sampler(self.launched, unseen)
                sample_baseline = _launch_sampler(self.launched_baseline, [])
            deadline = perf_counter() + budget_s
            while len(times) < MIN_SAMPLES or (perf_counter() < deadline and len(times) < MAX_SAMPLES):
                times.append(sample())
                monitor.after_sample()
                baseline_times.append(sample_baseline())
            monitor.measure_energy(self._batch(min(times)), deadline, self.operands.weight.nbytes)
        self.time_repeated_activation()
        return Samples(times, baseline_times, self.beyond_cache, unseen, monitor.state(),
                       METHOD if self.launched is None else LAUNCHED_METHOD)

    def _batch(self, seconds: float) -> Callable[[], int]:
        """Return a function that makes calls for `energy.BATCH_S`, waits for them and returns their number; `seconds`
        is the time of one."""
        launched = self.launched
        if launched is not None:
            repeats = max(1, round(BATCH_S / (seconds * launched.calls)))

            def launch() -> int:
                for _ in range(repeats):
                    launched.launch()
                device_wait.synchronize()
                return repeats * launched.calls

            return launch
        turn, count = itertools.cycle(self.calls), max(1, round(BATCH_S / seconds))

        def call() -> int:
            for _ in range(count):
                next(turn)()
            return count

        return call

    def check(self, samples: Samples) -> None:
        """Check that the timed calls computed the whole product. Raise ContractViolation.

        The timed calls are run again with another activation in the same buffer; a repeated activation must not be much
        faster than a new one; no work may continue after the timed stream has ended. Times nothing, so the device need
        not be idle.
        """
        late = sorted(samples.unseen)[len(samples.unseen) // 2] if samples.unseen else 0.0
        if late > max(UNSEEN_SECONDS, UNSEEN_SHARE * median_interval(samples.call)[0]):
            raise ContractViolation(Kind.HIDDEN_WORK, f"the device works on for {late * 1e6:.0f} us a call after the"
                                                      " stream that is timed has ended: on another stream")
        before = self.operands.reference(self.operands.activation("timing"), self.implementation)
        self.x.copy_(self.operands.activation("timing, again"))
        expected = self.operands.reference(self.x, self.implementation)
        with torch.no_grad():
            if self.launched is not None:
                self.launched.launch()
                device_wait.synchronize()
                outputs = list(self.launched.outputs)
            else:
                outputs = [call() for call in self.calls[:CHECKED_OUTPUTS]]
        for y in outputs:
            self._check_timed_output(y, expected, before)
        self._check_repeated_activation()

    def _check_timed_output(self, y: Tensor, expected: Reference, before: Reference) -> None:
        comparison = compare(y, expected)
        if comparison.within:
            return
        if compare(y, before).within:
            raise ContractViolation(
                Kind.FROZEN_INPUT, "what was timed gives the product of the activation that its buffer held when it was"
                                   " captured or first called, not of the one that it holds now")
        raise ContractViolation(Kind.NOT_REPEATABLE,
                                f"right when checked, wrong as it is timed: {comparison.message()}")

    def time_repeated_activation(self) -> None:
        """Time calls on new activations and on the same ones again, for `check`."""
        for number in range(_REMEMBERED_CALLS):
            new = self.operands.activation(("remembered", number))
            # While the activation is made, threads fall asleep and the weight leaves the cache: warm up with a call.
            self._seconds()
            self.x.copy_(new)
            self._fresh.append(self._seconds())
            self._repeated.append(self._seconds())
            if self._fresh[-1] > _REMEMBERED_SLOWEST_S and number >= 1:
                break

    def _check_repeated_activation(self) -> None:
        """Raise ContractViolation if repeated activations took far less time than new ones."""
        fresh, repeated = min(self._fresh), max(self._repeated)
        if fresh > REMEMBERED_FACTOR * repeated and fresh > UNSEEN_SECONDS:
            raise ContractViolation(
                Kind.RESULT_REMEMBERED,
                f"takes {fresh * 1e6:.0f} us for an activation that it has not seen and {repeated * 1e6:.0f} us for"
                " one that it has: results are remembered, so a time would mean nothing")

    def _seconds(self) -> float:
        with torch.no_grad():
            if self.operands.device == "cpu":
                start = perf_counter()
                self.calls[0]()
                return perf_counter() - start
            device_wait.synchronize()
            start = perf_counter()
            self.calls[0]()
            device_wait.synchronize()
            return perf_counter() - start


def time_case(implementation: Implementation, operands: Operands, *, cache_bytes: int, budget_s: float) -> Samples:
    """Time a case, and check the timed calls. Raise ContractViolation."""
    timed = TimedCase(implementation, operands, cache_bytes)
    timed.prepare_baseline(cache_bytes)
    with device_lock(operands.device, operands.case.id):
        samples = timed.samples(budget_s)
    timed.check(samples)
    return samples


def _cpu_sampler(calls: list[Call]) -> Callable[[], float]:
    """Return a sampler: the mean of enough calls to last `SAMPLE_SECONDS_CPU`, with the process's number of threads."""
    # Imported here because it initializes CUDA, which children forked from that process could not use afterwards.
    from torch.utils.benchmark import Timer

    turn = itertools.cycle(calls)
    timer = Timer("next(turn)()", globals={"turn": turn}, num_threads=torch.get_num_threads())
    # Timer runs the statement once before timing it, so this is warm.
    once = timer.timeit(1).median
    number = max(1, round(SAMPLE_SECONDS_CPU / max(once, 1e-7)))
    if number > 1:
        return lambda: timer.timeit(number).median

    def single() -> float:
        # Timer.timeit would run the statement twice more; a call this long is still warm from the previous one.
        start = perf_counter()
        next(turn)()
        return perf_counter() - start

    return single


class Launched(NamedTuple):
    """Calls that are launched together.

    launch : runs all of them
    calls : their number
    outputs : the first ones' outputs, refilled by each launch
    """

    launch: Callable[[], None]
    calls: int
    outputs: list[Tensor]


def captured(calls: list[Call]) -> Launched:
    """Capture a CUDA graph of all calls, repeated to at least about 16.

    Calls that cannot be captured (they synchronize, or allocate outside the pool) are launched one by one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, calls[0]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    device_wait.synchronize()
    # A fixed number, since a call cannot be timed here, beside other cases. The device works on so many while the next
    # launch is enqueued.
    sequence = calls * max(1, 16 // len(calls))
    outputs: list[Tensor] = []
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number, call in enumerate(sequence):
                y = call()
                if number < CHECKED_OUTPUTS:
                    outputs.append(y)
                del y       # other outputs share memory, as in a model
        launch = graph.replay
    except RuntimeError:
        device_wait.synchronize()

        def launch() -> None:
            outputs[:] = [call() for call in sequence][:CHECKED_OUTPUTS]
    launch()
    device_wait.synchronize()
    return Launched(launch, len(sequence), outputs)


def _launch_sampler(launched: Launched, unseen: list[float]) -> Callable[[], float]:
    """Return a sampler: the mean time of launched calls, by events. Time of work after the last event is appended to
    `unseen`.

    An idle device begins a graph tens of microseconds after the event before it, and later if its kernels overlap. So
    short launches are timed behind one that the device is still working on while they are enqueued.
    """
    behind_another = False

    def sample() -> float:
        nonlocal behind_another
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if behind_another:
            launched.launch()
        start.record()
        launched.launch()
        end.record()
        end.synchronize()
        ended = perf_counter()
        device_wait.synchronize()
        unseen.append((perf_counter() - ended) / launched.calls)
        seconds = start.elapsed_time(end) / 1e3
        behind_another = seconds < SHORT_LAUNCH_S
        return seconds / launched.calls

    sample()        # warms clocks and caches after waiting
    unseen.clear()
    return sample


def summarized(samples: Samples, seed: int) -> Timing:
    """Return the times for the record: median, intervals, and the speedup over the baseline."""
    median, low, high = median_interval(samples.call)
    baseline, _, _ = median_interval(samples.baseline)
    return Timing(
        samples_us=[round(s * 1e6, 4) for s in samples.call], median_us=median * 1e6, ci95_us=(low * 1e6, high * 1e6),
        baseline_us=baseline * 1e6, speedup=baseline / median,
        speedup_ci95=median_ratio_interval(samples.baseline, samples.call, seed=seed), method=samples.method,
    )

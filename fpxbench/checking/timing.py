"""Time a case that is right, interleaved with the dense 16-bit product of the same shape.

What is timed is what is checked: the very calls, or the very captured graph, are run again with another activation in
the same buffer, and their outputs compared with its reference.
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
"""Six is the least from which order statistics give a 95% interval of the median (2 / 2**6 = 3% outside)."""
SAMPLE_SECONDS_CPU = 2e-3
"""A CPU sample runs the call often enough to last this long, so that the clock's own cost stays below 0.1%."""

MAX_COPIES, MAX_COPY_BYTES = 64, 1 << 30
CACHE_MULTIPLE = 2
"""Weight copies are rotated until they exceed this many times the last-level cache."""

CHECKED_OUTPUTS = 2
"""Of the timed calls, so many are compared with the reference."""
UNSEEN_SHARE, UNSEEN_SECONDS = 0.25, 1e-4
"""Work that ends this much later than the timed stream, by share of a sample and at least, was not timed."""
REMEMBERED_FACTOR = 3.0
"""A call on an activation already seen may not be so many times faster than on a new one."""
_REMEMBERED_CALLS = 5
_REMEMBERED_SLOWEST_S = 0.5


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, sample by sample, for the implementation and, interleaved with it, for the dense
    baseline."""

    call: list[float]
    baseline: list[float]
    beyond_cache: bool
    """The rotated copies exceed the cache, so memory was really read."""
    unseen: list[float] = field(default_factory=list)
    """Seconds that the device worked on after the timed stream had ended, sample by sample."""
    device_state: DeviceState | None = None


def rotation(nbytes: int, cache_bytes: int) -> int:
    """Return how many copies of a weight of `nbytes` to rotate, so that each call finds its own outside the cache."""
    wanted = CACHE_MULTIPLE * cache_bytes // nbytes + 2
    return int(max(1, min(wanted, MAX_COPIES, MAX_COPY_BYTES // nbytes)))


class TimedCase:
    """The calls of one case that are timed: one activation, in one buffer, over rotating copies of the weight."""

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
        """Make ready the calls that `samples` compares with."""
        operands = self.operands
        dense = operands.dense()
        dense_copies = [dense, *(dense.clone() for _ in range(rotation(dense.nbytes, cache_bytes) - 1))]
        self.baseline_calls: list[Call] = [lambda w=w: operands.dense_product(self.x, w) for w in dense_copies]
        with torch.no_grad():
            self.launched_baseline = captured(self.baseline_calls) if operands.device != "cpu" else None

    def samples(self, budget_s: float) -> Samples:
        """Time one call against the product with a 16-bit weight of the same shape, interleaved; then calls on
        activations that were seen before against calls on new ones."""
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
                for launched in (self.launched, self.launched_baseline):    # clocks and caches are cold from waiting
                    launched.launch()
            deadline = perf_counter() + budget_s
            while len(times) < MIN_SAMPLES or (perf_counter() < deadline and len(times) < MAX_SAMPLES):
                times.append(sample())
                monitor.after_sample()
                baseline_times.append(sample_baseline())
            monitor.measure_energy(self._batch(min(times)), deadline, self.operands.weight.nbytes)
        self.time_repeated_activation()
        return Samples(times, baseline_times, self.beyond_cache, unseen, monitor.state())

    def _batch(self, seconds: float) -> Callable[[], int]:
        """Return a function that makes calls for `energy.BATCH_S`, waits for them and returns how many; `seconds` is
        the time of one."""
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
        """Check that what was timed is the product, and all of it. Raises ContractViolation.

        The timed calls are run again with another activation in the same buffer; a call on an activation that was seen
        before may not have been much faster than on a new one; nothing may have gone on after the timed stream had
        ended. Nothing is timed here, so that the device need not be idle.
        """
        late = sorted(samples.unseen)[len(samples.unseen) // 2] if samples.unseen else 0.0
        if late > max(UNSEEN_SECONDS, UNSEEN_SHARE * median_interval(samples.call)[0]):
            raise ContractViolation(
                Kind.HIDDEN_WORK,
                f"the device works on for {late * 1e6:.0f} us a call after the stream"
                " that is timed has ended: on another stream",
            )
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
                Kind.FROZEN_INPUT,
                "what was timed gives the product of the activation that its buffer held"
                " when it was captured or first called, not of the one that it holds now",
            )
        raise ContractViolation(
            Kind.NOT_REPEATABLE, f"right when checked, wrong as it is timed: {comparison.message()}"
        )

    def time_repeated_activation(self) -> None:
        """Time calls on activations that were seen before against calls on new ones, for `check`."""
        for number in range(_REMEMBERED_CALLS):
            new = self.operands.activation(("remembered", number))
            # Making it takes time, in which threads fall asleep and the weight leaves the cache: a call wakes them.
            self._seconds()
            self.x.copy_(new)
            self._fresh.append(self._seconds())
            self._repeated.append(self._seconds())
            if self._fresh[-1] > _REMEMBERED_SLOWEST_S and number >= 1:
                break

    def _check_repeated_activation(self) -> None:
        """Raise ContractViolation if a second call on the same activation took far less time than the first."""
        fresh, repeated = min(self._fresh), max(self._repeated)
        if fresh > REMEMBERED_FACTOR * repeated and fresh > UNSEEN_SECONDS:
            raise ContractViolation(
                Kind.RESULT_REMEMBERED,
                f"takes {fresh * 1e6:.0f} us for an activation that it has not seen and {repeated * 1e6:.0f} us for"
                " one that it has: results are remembered, so a time would mean nothing",
            )

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
    """Time a case, and check that what was timed is its product. Raises ContractViolation."""
    timed = TimedCase(implementation, operands, cache_bytes)
    timed.prepare_baseline(cache_bytes)
    with device_lock(operands.device, operands.case.id):
        samples = timed.samples(budget_s)
    timed.check(samples)
    return samples


def _cpu_sampler(calls: list[Call]) -> Callable[[], float]:
    """Return a sampler: the mean of enough calls to last `SAMPLE_SECONDS_CPU`; threads as the process has them."""
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
        # Timer.timeit would run the statement twice more to warm up; a call this long is warm from the one before.
        start = perf_counter()
        next(turn)()
        return perf_counter() - start

    return single


class Launched(NamedTuple):
    """Calls that are launched at once.

    launch : run all of them; calls : how many they are; outputs : what the first ones return, refilled by each launch
    """

    launch: Callable[[], None]
    calls: int
    outputs: list[Tensor]


def captured(calls: list[Call]) -> Launched:
    """Capture a graph that runs every call once, and again until it lasts.

    What cannot be captured (it synchronizes, or allocates outside the pool) is launched call by call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (*calls, calls[0]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    device_wait.synchronize()
    # Always so many: how long a call takes cannot be measured here, beside other cases, and in fewer calls the launch
    # of the graph shows (dense took 17 us for 13).
    sequence = calls * max(1, 16 // len(calls))
    outputs: list[Tensor] = []
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for number, call in enumerate(sequence):
                y = call()
                if number < CHECKED_OUTPUTS:
                    outputs.append(y)
                del y       # the others share memory, as they would in a model
        launch = graph.replay
    except RuntimeError:
        device_wait.synchronize()

        def launch() -> None:
            outputs[:] = [call() for call in sequence][:CHECKED_OUTPUTS]
    launch()
    device_wait.synchronize()
    return Launched(launch, len(sequence), outputs)


def _launch_sampler(launched: Launched, unseen: list[float]) -> Callable[[], float]:
    """Return a sampler: the mean of launched calls, by events. What goes on after the last event is added to
    `unseen`."""

    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launched.launch()
        end.record()
        end.synchronize()
        ended = perf_counter()
        device_wait.synchronize()
        unseen.append((perf_counter() - ended) / launched.calls)
        return start.elapsed_time(end) / 1e3 / launched.calls

    return sample


def summarized(samples: Samples, seed: int) -> Timing:
    """Return the record's times: median, intervals, and the speedup over the baseline."""
    median, low, high = median_interval(samples.call)
    baseline, _, _ = median_interval(samples.baseline)
    return Timing(
        samples_us=[round(s * 1e6, 4) for s in samples.call], median_us=median * 1e6, ci95_us=(low * 1e6, high * 1e6),
        baseline_us=baseline * 1e6, speedup=baseline / median,
        speedup_ci95=median_ratio_interval(samples.baseline, samples.call, seed=seed),
    )

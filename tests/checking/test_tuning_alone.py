"""Autotuners choose by times that nothing else disturbs: their benchmarking functions take the device's lock."""

import os
import sys
from types import ModuleType

import pytest

from fpxbench.checking import device_lock as locks
from fpxbench.checking.device_lock import device_lock, lock_file
from fpxbench.checking.tuning_alone import PURPOSE, tune_alone

INDUCTOR = "torch._inductor.runtime.benchmarking"


@pytest.fixture
def events(monkeypatch):
    """Return the list of what the device's lock tells."""
    told = []
    monkeypatch.setattr(locks, "listener", lambda event, message: told.append((event, message)))
    yield told
    lock_file("cpu").unlink(missing_ok=True)


@pytest.fixture
def triton(monkeypatch):
    """Return a module in the place of Triton's, beside a compiler that has no benchmarks."""
    monkeypatch.setitem(sys.modules, INDUCTOR, ModuleType(INDUCTOR))
    module = ModuleType("triton.testing")
    module.do_bench = lambda call, warmup=25: call() + warmup
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    monkeypatch.setitem(sys.modules, "triton.testing", module)
    return module


def test_a_benchmark_of_tritons_runs_within_the_lock(events, triton):
    tune_alone("cpu")
    assert triton.do_bench(lambda: events.append("runs") or 1, warmup=2) == 3
    assert events == [("timing", PURPOSE), "runs", ("timed", "")]


def test_wrapping_twice_locks_once(events, triton):
    tune_alone("cpu")
    once = triton.do_bench
    tune_alone("cpu")
    assert triton.do_bench is once


def test_a_benchmark_of_the_compilers_runs_within_the_lock(events, triton, monkeypatch):
    class Benchmarker:
        def benchmark_gpu(self, call):
            return call()

    monkeypatch.setattr(sys.modules[INDUCTOR], "Benchmarker", Benchmarker, raising=False)
    tune_alone("cpu")
    assert Benchmarker().benchmark_gpu(lambda: events.append("runs") or 7) == 7
    assert events == [("timing", PURPOSE), "runs", ("timed", "")]


def test_all_candidates_of_a_product_are_timed_within_one_lock(events, triton, monkeypatch):
    class Cache:
        @classmethod
        def benchmark_choices(cls, choices):
            return {choice: triton.do_bench(lambda choice=choice: events.append(choice) or 1) for choice in choices}

    compiler = ModuleType("torch._inductor.select_algorithm")
    compiler.AlgorithmSelectorCache = Cache
    monkeypatch.setitem(sys.modules, compiler.__name__, compiler)
    tune_alone("cpu")
    assert Cache.benchmark_choices(["a", "b"]) == {"a": 26, "b": 26}
    assert events == [("timing", PURPOSE), "a", "b", ("timed", "")]


def test_what_is_not_timed_tunes_beside_others_and_the_next_case_alone_again(events, triton):
    tune_alone("cpu", timed=False)
    assert triton.do_bench(lambda: events.append("runs") or 1, warmup=2) == 3
    assert events == ["runs"]
    tune_alone("cpu", timed=True)
    triton.do_bench(lambda: 1)
    assert events[1:] == [("timing", PURPOSE), ("timed", "")]


def test_a_process_that_has_the_lock_goes_on_within_it(events):
    with device_lock("cpu", "a case"), device_lock("cpu", "its tiles"):
        assert events == [("timing", "a case")]
        assert str(os.getpid()) in lock_file("cpu").read_text()
    assert events == [("timing", "a case"), ("timed", "")]
    with device_lock("cpu", "the next"):
        pass
    assert events[2:] == [("timing", "the next"), ("timed", "")]

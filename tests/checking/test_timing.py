"""Times, kernels and bytes: what the metrics are, and that impossible ones are flagged."""

import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st

from fpxbench.checking import effects, timing, traffic
from fpxbench.checking.effects import Effects, KernelLaunch
from fpxbench.checking.inputs import make_weight
from fpxbench.checking.operands import Operands
from fpxbench.checking.timing import Samples
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.record import Flag

pytestmark = pytest.mark.usefixtures("one_thread")

MIB = 1 << 20


def operands(scheme="e4m3fn-row", m=1, n=512, k=1024):
    case = Case(implementation="i", scheme=scheme, workload="x", m=m, n=n, k=k)
    original = make_weight(case, 0)
    weight = Implementation().quantize(original, scheme_named(scheme))
    return Operands(case, "cpu", 0, original, weight, weight.dequantize())


class Upcast(Implementation):
    """Decodes the whole weight to memory, then multiplies."""

    def matmul(self, x, weight):
        return F.linear(x, weight.dequantize().to(x.dtype))


@given(st.integers(1, 1 << 34), st.integers(1 << 15, 1 << 29))
def test_rotated_copies_exceed_the_cache_twice_or_reach_the_limits(nbytes, cache):
    copies = timing.rotation(nbytes, cache)
    assert 1 <= copies <= timing.MAX_COPIES
    # Of two visits to one copy, all others lie between: those alone exceed twice the cache.
    enough = (copies - 1) * nbytes > timing.CACHE_MULTIPLE * cache
    assert enough or copies == timing.MAX_COPIES or (copies + 1) * nbytes > timing.MAX_COPY_BYTES


def test_a_plain_linear_is_one_kernel():
    x, w = torch.randn(4, 256).bfloat16(), torch.randn(128, 256).bfloat16()
    seen = effects.observe(lambda: F.linear(x, w), "cpu")
    assert len(seen.kernels) == 1 and seen.heavy_kernels == 1
    assert seen.peak_bytes < w.nbytes


def test_observing_a_call_on_a_cpu_imports_no_compiler(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch._inductor", raising=False)
    monkeypatch.delitem(vars(torch), "_inductor", raising=False)
    effects.observe(lambda: torch.ones(4).sum(), "cpu")
    assert "torch._inductor" not in sys.modules


def test_views_move_nothing_and_are_no_kernels():
    x = torch.randn(4, 256)
    seen = effects.observe(lambda: x.t().reshape(2, 128, 4).permute(2, 0, 1)[0], "cpu")
    assert seen.kernels == [] and seen.peak_bytes == 0


def test_each_pass_over_memory_counts():
    x = torch.randn(1 << 16)
    seen = effects.observe(lambda: (x * x).sin().add(x).exp(), "cpu")
    assert [kernel.name for kernel in seen.kernels] == ["aten::mul", "aten::sin", "aten::add", "aten::exp"]
    assert seen.peak_bytes >= x.nbytes


def test_a_library_that_is_called_without_an_operator_is_a_kernel():
    """As cpu_fused calls its compiled C++, between operators that copy an activation."""
    small = torch.randn(64)

    def library():
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass

    seen = effects.observe(lambda: (small.clone(), library(), small.clone()), "cpu")
    assert len(seen.kernels) == 2 and seen.times_us[2:] == [seen.outside_us]
    waits = effects.observe(lambda: (small.clone(), time.sleep(0.05)), "cpu")
    assert len(waits.times_us) == 1, "a thread that waits does no work"

    copy = KernelLaunch("aten::copy_", 20.0)
    assert Effects([copy, copy], 0, outside_us=9000.0).heavy_kernels == 1, "the library's"
    assert Effects([copy], 0, outside_us=200.0).times_us == [20.0], "Python's share is no kernel"


def test_a_weight_that_a_library_decodes_before_the_product_is_unfused():
    held = operands()
    decode_us = 2 * 512 * 1024 / 20e3 / 2
    copies = [KernelLaunch("aten::copy_", 1.0)] * 3
    assert not traffic.decoded_apart(held, Effects(copies, 0, outside_us=20 * decode_us), 20.0)
    product = KernelLaunch("aten::mm", 2 * decode_us)
    assert traffic.decoded_apart(held, Effects([*copies, product], 0, outside_us=20 * decode_us), 20.0)


def test_a_decoded_weight_in_scratch_memory_is_seen():
    held = operands()
    x = held.activation(0)
    seen = effects.observe(lambda: Upcast().matmul(x, held.weight), "cpu")
    assert traffic.wrote_decoded_weight(held, seen.peak_bytes)
    assert len(seen.kernels) > 1      # their shares of the time depend on what else this machine does


def test_a_product_that_decodes_nothing_to_memory_is_not_taken_for_one_that_does():
    held = operands("bf16", m=16)
    x = held.activation(0)
    seen = effects.observe(lambda: F.linear(x, held.weight.packed), "cpu")
    assert not traffic.wrote_decoded_weight(held, seen.peak_bytes)


@pytest.mark.timeout(240)
def test_a_loop_that_inductor_fused_is_seen_as_one_kernel():
    from torch._inductor import config

    x = torch.randn(1 << 16)

    def chain(x):
        return ((x * 2).sin() + 1).exp()

    compiled = torch.compile(chain, fullgraph=True, dynamic=False)
    # Not monkeypatch: its undo deletes the setting for every later test of the process.
    with config.patch("cpp.enable_kernel_profile", True):
        with torch.no_grad():   # as it is observed: else it would be compiled again then
            torch.testing.assert_close(compiled(x), chain(x))
        kernels = effects.observe(lambda: compiled(x), "cpu").kernels
    assert len(kernels) == 1 and "cpp_fused" in kernels[0].name
    torch._dynamo.reset()


def metrics_of(held, us, *, read_gb_per_s=20.0, kernels=1, peak_bytes=0, spread=0.0, beyond_cache=True):
    """Return times, traffic and flags of a case that took `us`."""
    samples = Samples([us * (1 + spread * (i % 3 - 1)) / 1e6 for i in range(12)], [100e-6] * 12, beyond_cache)
    times = timing.summarized(samples, seed=0)
    seen = Effects([KernelLaunch("aten::mm", us / kernels)] * kernels, peak_bytes)
    moved = traffic.traffic_of(held, seen, times.median_us / 1e6, read_gb_per_s)
    return times, moved, traffic.flags(held, times, moved, beyond_cache, seen, read_gb_per_s)


def test_bytes_are_those_of_the_packed_weight_and_not_of_sixteen_bit_ones():
    held = operands("e3m2-row")
    _, moved, _ = metrics_of(held, 100)
    assert moved.packed_bytes == 512 * 1024 * 6 // 8 + 512 * 4
    assert moved.bytes_min == moved.packed_bytes + 2 * (1024 + 512)
    assert moved.gb_per_s == pytest.approx(moved.bytes_min / 100e-6 / 1e9)
    assert moved.roofline_fraction == pytest.approx(moved.gb_per_s / 20)


def test_a_figure_above_the_roofline_is_called_impossible():
    held = operands()
    least_us = metrics_of(held, 100)[1].bytes_min / 20e3     # at exactly the bandwidth that the machine has
    assert Flag.OVER_ROOFLINE in metrics_of(held, least_us / 1.5)[2]
    assert Flag.OVER_ROOFLINE not in metrics_of(held, least_us * 1.01)[2]


def test_what_fits_the_cache_may_be_faster_than_memory():
    held = operands()
    assert Flag.OVER_ROOFLINE not in metrics_of(held, 1, beyond_cache=False)[2]


def test_small_kernels_beside_the_products_of_several_experts_are_no_decoding_apart():
    """Four experts' decoded weights would take four times as long to write."""
    case = Case(implementation="i", scheme="mxfp4", workload="x", m=1, n=5760, k=2880)
    experts = SimpleNamespace(case=case, products=4, weights_read=4 * 5760 * 2880)
    seen = Effects([KernelLaunch("product", 8.0)] * 4 + [KernelLaunch("order", 1.5)] * 4, 0)
    assert traffic.decoded_apart(experts, seen, 4000.0) is False
    decodes = Effects([KernelLaunch("product", 8.0)] * 4 + [KernelLaunch("decode", 6.0)] * 4, 0)
    assert traffic.decoded_apart(experts, decodes, 4000.0) is True


@pytest.mark.parametrize(("device", "m", "us", "slow"), [
    ("cuda", 4096, 40, True),       # dense took 100 us
    ("cuda", 4096, 95, False),
    ("cuda", 16, 40, False),        # fewer bytes explain it
    ("cpu", 4096, 40, False),
])
def test_a_dense_product_slower_than_its_arithmetic_is_flagged(device, m, us, slow):
    held = replace(operands(m=m), device=device)
    dense_us = 2 * (512 * 1024 + m * (1024 + 512)) / 1e3
    read_gb_per_s = dense_us / (0.4 * 40 if m > 16 else 0.9 * 40)
    assert (Flag.SLOW_BASELINE in metrics_of(held, us, read_gb_per_s=read_gb_per_s)[2]) is slow


@pytest.mark.parametrize(("what", "unfused"), [
    ({}, False), ({"kernels": 3}, True), ({"peak_bytes": 2 * 512 * 1024}, True), ({"peak_bytes": 2 * 512}, False),
])
def test_unfused_is_told_by_kernels_and_bytes(what, unfused):
    assert (Flag.UNFUSED in metrics_of(operands(), 100, **what)[2]) == unfused


def test_kernels_that_order_the_activation_or_add_partial_sums_are_part_of_a_fused_product():
    """As in a kernel for several tokens: an ordered copy of x, the product, a sum over splits of K."""
    held = operands(m=16)
    decode_us = 2 * 512 * 1024 / 20e3 / 2

    def flagged(*us, peak_bytes=0, read_gb_per_s=20.0):
        seen = Effects([KernelLaunch(f"kernel_{number}", each) for number, each in enumerate(us)], peak_bytes)
        return traffic.decoded_apart(held, seen, read_gb_per_s)

    assert not flagged(0.2 * decode_us, 3 * decode_us, 0.3 * decode_us)
    assert flagged(0.2 * decode_us, 3 * decode_us, 1.1 * decode_us)
    assert flagged(0.2 * decode_us, 3 * decode_us, 0.3 * decode_us, read_gb_per_s=None), "5% of the call counts"
    copy_of_x = 2 * held.case.rows * held.case.k
    assert not traffic.wrote_decoded_weight(held, held.output_bytes + copy_of_x + 1000)
    assert traffic.wrote_decoded_weight(held, held.output_bytes + copy_of_x + 2 * 512 * 1024)


def test_a_kernel_that_waited_for_the_one_before_counts_from_its_end():
    """The third one is on another stream, where it may be what decodes the weight."""
    trace = [("add_parts", 11.0, 95.0, 7), ("product", 10.0, 90.0, 7), ("decode", 12.0, 40.0, 13),
             ("next", 110.0, 5.0, 7)]
    events = [{"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}
              for name, ts, dur, stream in trace]
    assert effects._gpu_kernels(events) == [("product", 90.0), ("add_parts", 6.0), ("decode", 40.0), ("next", 5.0)]


def test_where_preparing_the_activation_takes_as_long_as_decoding_the_record_says_not_asked():
    """A decoded part of the weight at a time, for as many tokens as the weight has rows."""
    few, many = operands(m=16), operands(m=512)
    decode_us = 3 * 512 * 1024 / 20e3       # an FP8 weight read, a 16-bit one written
    seen = Effects([KernelLaunch("decode", decode_us), KernelLaunch("product", 10 * decode_us)], 0)
    for held, told in ((few, {}), (many, {Flag.UNFUSED})):
        moved = traffic.traffic_of(held, seen, 1e-3, 20.0)
        assert traffic.not_asked(held, moved, seen, 20.0).keys() == set(told)
    assert traffic.decoded_apart(few, seen, 20.0) is True
    scratch = replace(seen, peak_bytes=many.output_bytes + 2 * 512 * 1024 + 2 * 512 * 1024)
    moved = traffic.traffic_of(many, scratch, 1e-3, 20.0)
    assert traffic.not_asked(many, moved, scratch, 20.0) == {}, "its memory tells"


def test_a_dense_product_is_never_unfused():
    assert Flag.UNFUSED not in metrics_of(operands("bf16"), 100, kernels=3)[2]


def test_a_kernel_too_short_to_matter_is_not_held_against_a_case():
    seen = Effects([KernelLaunch("aten::mm", 100.0), KernelLaunch("aten::copy_", 1.0)], 0)
    assert seen.heavy_kernels == 1


@pytest.mark.parametrize(("spread", "noisy"), [(0.0, False), (0.01, False), (0.2, True)])
def test_a_wide_interval_is_noisy(spread, noisy):
    assert (Flag.NOISY in metrics_of(operands(), 100, spread=spread)[2]) == noisy


def test_the_speedup_is_over_the_dense_product_of_the_same_run():
    times, _, _ = metrics_of(operands(), 50)
    assert times.baseline_us == pytest.approx(100) and times.speedup == pytest.approx(2)
    assert times.speedup_ci95[0] <= times.speedup <= times.speedup_ci95[1]


@pytest.mark.parametrize(
    ("us", "what", "says"),
    [
        (30, {}, "memory: it moves"),
        (1000, {}, "not memory"),
        (1000, {"peak_bytes": 2 * 512 * 1024}, "writes the decoded weight"),
        (1000, {"kernels": 3}, "3 kernels"),
    ],
)
def test_what_limits_a_case_follows_from_its_metrics(us, what, says):
    held = operands()
    times, moved, _ = metrics_of(held, us, **what)
    assert says in traffic.bottleneck(held, times, moved, 20.0)


@pytest.mark.parametrize(("scheme", "m", "us", "says"), [
    ("e4m3fn-row", 512, 120, "arithmetic: "),       # dense takes 100 us
    ("e4m3fn-row", 512, 2000,
     "neither memory nor arithmetic: 2 kernels a call, 0.268 TFLOP/s where dense reaches 5.37"),
    ("bf16", 1, 1000, "launches, not memory"),
    ("e4m3fn-row", 1, 1000, "decoding and launches, not memory"),
])
def test_arithmetic_limits_only_what_comes_near_the_dense_products_rate(scheme, m, us, says):
    held = operands(scheme, m=m)
    times, moved, _ = metrics_of(held, us, read_gb_per_s=100.0)
    moved = moved.model_copy(update={"kernels_launched": 2})
    assert traffic.bottleneck(held, times, moved, 100.0).startswith(says)


def test_of_a_dense_product_bound_by_memory_no_arithmetic_limit_is_read_off():
    held = operands(m=128)
    times, moved, _ = metrics_of(held, 100, read_gb_per_s=18.0)
    assert "arithmetic" not in traffic.bottleneck(held, times, moved, 18.0)


def test_timing_takes_the_case_and_its_baseline_in_turn():
    calls = []

    class Counting(Upcast):
        def matmul(self, x, weight):
            calls.append(weight.packed.data_ptr())
            return super().matmul(x, weight)

    held = operands(n=64, k=64)
    cache = held.weight.nbytes      # few copies: as few calls as a busy machine makes reach them all
    samples = timing.time_case(Counting(), held, cache_bytes=cache, budget_s=0)
    assert len(samples.call) == len(samples.baseline) == timing.MIN_SAMPLES
    assert all(seconds > 0 for seconds in samples.call + samples.baseline)
    assert (
        len(set(calls)) == timing.rotation(held.weight.nbytes, cache) and held.weight.packed.data_ptr() not in calls
    )
    assert samples.beyond_cache


class SlowToBegin:
    """A device that begins a launch late if it was idle. Microseconds of the host's and the device's clock."""

    ENQUEUED, BEGINS, CALLS = 5.0, 40.0, 16

    def __init__(self, work):
        self.work, self.host, self.busy_until, self.launches = work, 0.0, 0.0, 0

    def launch(self):
        self.host += self.ENQUEUED
        late = self.BEGINS if self.busy_until < self.host else 0.0
        self.busy_until = max(self.busy_until, self.host) + late + self.work
        self.launches += 1

    def event(self, enable_timing):
        return DeviceEvent(self)


class DeviceEvent:
    def __init__(self, device):
        self.device, self.us = device, None

    def record(self):
        self.us = max(self.device.host, self.device.busy_until)

    def synchronize(self):
        self.device.host = max(self.device.host, self.us)

    def elapsed_time(self, end):
        return (end.us - self.us) / 1e3


@pytest.mark.parametrize("work, behind_another, overhead", [(100.0, True, 0.0), (10_000.0, False, SlowToBegin.BEGINS)])
def test_a_launch_is_timed_without_the_time_that_an_idle_device_takes_to_begin(
        monkeypatch, work, behind_another, overhead):
    device = SlowToBegin(work)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(timing.device_wait, "synchronize", lambda: None)
    sample = timing._launch_sampler(timing.Launched(device.launch, device.CALLS, []), [])
    before = device.launches
    found = sample() * device.CALLS * 1e6
    assert device.launches - before == 1 + behind_another
    assert work - 1 <= found <= work + overhead + device.ENQUEUED, found


def test_a_first_call_that_has_to_wake_threads_is_no_remembered_result(monkeypatch):
    """Between two calls an activation is made: threads fall asleep meanwhile, on a busy machine for milliseconds."""
    asleep, made = False, Operands.activation

    def made_while_threads_sleep(self, *purpose):
        nonlocal asleep
        asleep = True
        return made(self, *purpose)

    class Threaded(Upcast):
        def matmul(self, x, weight):
            nonlocal asleep
            if asleep:
                asleep = False
                time.sleep(0.05)
            return super().matmul(x, weight)

    monkeypatch.setattr(Operands, "activation", made_while_threads_sleep)
    samples = timing.time_case(Threaded(), operands(), cache_bytes=1, budget_s=0.0)
    assert len(samples.call) >= timing.MIN_SAMPLES

"""What a device does while it is timed: read from the right device, flagged when throttled, energy only if measured."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from fake_nvml import IDLE, POWER_CAP, FakeGpu, fake_nvml, fake_properties
from pydantic import ValidationError
from sample_records import GPU, GPU_BUILD, case, record, write

from fpxbench.checking import energy, timing
from fpxbench.checking.inputs import make_weight
from fpxbench.checking.operands import Operands
from fpxbench.implementation import Implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.record import DeviceState, Flag, Record
from fpxbench.reports.site import build_site
from fpxbench.reports.sweep.charts import energy_chart
from fpxbench.reports.sweep.sweep_table import sweep_of

pytestmark = pytest.mark.usefixtures("few_targets")

CALLS, WEIGHT = 50, 16_000_000


class Clock:
    """A clock that only `run` moves: 5 ms for 50 calls."""

    def __init__(self):
        self.now = 1000.03

    def __call__(self):
        return self.now

    def run(self):
        self.now += 5e-3
        return CALLS


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(energy, "perf_counter", clock)
    return clock


@pytest.fixture
def gpu(clock, monkeypatch):
    """Return the GPU that torch calls 0 and the driver 1."""
    mine, other = FakeGpu("mine", clock), FakeGpu("other", clock, watts=70.0)
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(other, mine))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: fake_properties("mine"))
    monkeypatch.setattr(torch.version, "hip", None)
    energy._gpu_reader.cache_clear()
    yield mine
    energy._gpu_reader.cache_clear()


def state_of(clock, samples=6, budget_s=0.5):
    monitor = energy.StateMonitor("cuda")
    for _ in range(samples):
        clock.run()
        monitor.after_sample()
    monitor.measure_energy(clock.run, clock() + budget_s, WEIGHT)
    return monitor.state()


def test_the_device_is_found_by_its_uuid_and_not_by_its_number(gpu, clock):
    assert state_of(clock).power_w == 300


def test_the_power_is_that_of_the_moment_and_not_the_mean_of_the_last_second(gpu, clock):
    gpu.watts_now = 640
    assert state_of(clock).power_w == 640


def test_joules_a_call_are_exact_though_the_counter_steps_ten_times_a_second(gpu, clock):
    state = state_of(clock)
    expected = gpu.watts * 5e-3 / CALLS
    assert state.joules_per_call == pytest.approx(expected, rel=0.06)
    assert state.joules_per_gb == pytest.approx(state.joules_per_call / 0.016)
    assert state.energy_s >= energy.ENERGY_SPAN_S and state.no_energy == ""
    assert (state.sm_clock_mhz, state.memory_clock_mhz, state.temperature_c) == (1980, 3201, 61)


def test_a_counter_that_did_not_step_twice_within_the_budget_gives_no_energy_and_says_so(gpu, clock):
    gpu.step_s = 0.3
    state = state_of(clock)
    assert state.joules_per_call is None and "timing budget" in state.no_energy


def test_no_time_beyond_the_budget_is_taken_for_energy(gpu, clock):
    before = clock() + 6 * 5e-3
    assert state_of(clock, budget_s=0.0).joules_per_call is None and clock() == pytest.approx(before)


def test_a_gpu_without_a_counter_gives_its_clocks_and_no_energy(gpu, clock):
    gpu.has_counter = False
    state = state_of(clock)
    assert state.no_energy == "the device has no energy counter" and state.sm_clock_mhz == 1980


def test_a_sample_under_throttling_is_flagged_and_idling_is_not(gpu, clock):
    gpu.reasons = IDLE
    monitor = energy.StateMonitor("cuda")
    monitor.after_sample()
    gpu.reasons = IDLE | POWER_CAP
    monitor.after_sample()
    gpu.reasons = 0
    monitor.after_sample()
    assert monitor.state().throttled_samples == [1] and monitor.state().throttle_reasons == ["power cap"]


def test_a_gpu_without_bindings_or_unknown_to_the_driver_says_why(gpu, clock, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(FakeGpu("another", clock)))
    assert "NVML knows no device GPU-mine" in state_of(clock).no_energy
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'fpxbench[nvidia]'" in state_of(clock).no_energy
    assert energy.energy_joules("cuda") is None


def test_the_bits_of_throttling_are_the_drivers():
    nvml = pytest.importorskip("pynvml")
    names = ("SwPowerCap", "HwSlowdown", "SyncBoost", "SwThermalSlowdown", "HwThermalSlowdown", "HwPowerBrakeSlowdown")
    bits = {getattr(nvml, f"nvmlClocksEventReason{name}", None) or getattr(nvml, f"nvmlClocksThrottleReason{name}")
            for name in names}
    assert set(energy._NVML_REASONS) == bits and IDLE not in bits


def fake_amdsmi(**answers):
    """Return a module `amdsmi` whose driver has two GPUs, of which the second answers."""
    smi = ModuleType("amdsmi")
    kinds = SimpleNamespace(GFX="gfx", MEM="mem")

    class AmdSmiException(Exception):
        pass

    def answering(name):
        def answer(handle, *arguments):
            assert handle == "second"
            if name not in answers:
                raise AmdSmiException("not supported")
            return answers[name]

        return answer

    buses = {"first": "0000:03:00.0", "second": "0000:C1:00.0"}
    smi.__dict__.update(
        AmdSmiException=AmdSmiException, AmdSmiClkType=kinds, amdsmi_init=lambda: None,
        AmdSmiTemperatureType=SimpleNamespace(HOTSPOT=1), AmdSmiTemperatureMetric=SimpleNamespace(CURRENT=0),
        amdsmi_get_processor_handles=lambda: list(buses), amdsmi_get_gpu_device_bdf=buses.get,
        **{f"amdsmi_get_{name}": answering(name)
           for name in ("clock_info", "power_info", "temp_metric", "violation_status", "energy_count")})
    return smi


def test_an_amd_gpu_is_found_by_its_bus_and_what_it_does_not_report_is_none(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(
        pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0))
    monkeypatch.setitem(sys.modules, "amdsmi", fake_amdsmi(
        clock_info={"clk": 2100}, power_info={"current_socket_power": "N/A", "average_socket_power": 640},
        violation_status={"active_ppt_pwr": True, "active_hbm_thrm": "N/A"},
        energy_count={"energy_accumulator": 2_000_000, "counter_resolution": 15.3}))
    reader = energy.device_reader("cuda")
    assert reader.reading() == (2100, 2100, None, 640) and reader.throttle_reasons() == ["power cap"]
    assert reader.joules() == pytest.approx(30.6)


class Rapl:
    """A counter file that steps with every look."""

    def __init__(self):
        self.joules = 0

    def read_text(self):
        self.joules += 1
        return f"{self.joules * 1_000_000}\n"


@pytest.mark.usefixtures("one_thread")
def test_a_timed_case_carries_the_energy_of_its_own_calls(monkeypatch):
    monkeypatch.setattr(energy, "_RAPL", Rapl())
    monkeypatch.setattr(energy, "ENERGY_SPAN_S", 1e-9)
    of = Case(implementation="i", scheme="e4m3fn-row", workload="x", m=1, n=64, k=128)
    original = make_weight(of, 0)
    weight = Implementation().quantize(original, scheme_named(of.scheme))

    class Counting(Implementation):
        def matmul(self, x, weight):
            return torch.nn.functional.linear(x, weight.dequantize().to(x.dtype))

    samples = timing.time_case(Counting(), Operands(of, "cpu", 0, original, weight, weight.dequantize()),
                               cache_bytes=1 << 16, budget_s=5.0)
    state = samples.device_state
    assert state.energy_calls >= 1 and state.joules_per_call == pytest.approx(1 / state.energy_calls)
    assert state.joules_per_gb == pytest.approx(state.joules_per_call * 1e9 / weight.nbytes)


@pytest.mark.parametrize("field", [{"joules_per_call": -1.0}, {"joules_per_call": 0.0}, {"power_w": 1e30},
                                   {"throttle_reasons": ["x"] * 33}, {"energy_s": -1.0}])
def test_what_no_device_does_is_no_state(field):
    with pytest.raises(ValidationError):
        DeviceState(**field)


def measured() -> Record:
    return record(case(), speedup=2.0, machine=GPU, build=GPU_BUILD, flags=(Flag.THROTTLED,), device_state=DeviceState(
        sm_clock_mhz=1980, sm_clock_min_mhz=1410, memory_clock_mhz=3201, temperature_c=61, power_w=541.2, readings=9,
        throttle_reasons=["power cap"], throttled_samples=[3], joules_per_call=0.00125, joules_per_gb=0.0745,
        energy_calls=9000, energy_s=0.1))


def test_a_record_keeps_the_state_and_an_older_record_has_none():
    assert Record.model_validate_json(measured().to_json()) == measured()
    assert Record.model_validate_json(record(case(), speedup=2.0).to_json()).device_state is None


def test_the_report_shows_energy_beside_time_and_why_there_is_none(tmp_path):
    without = record(case("eager_upcast"), speedup=0.5, machine=GPU, build=GPU_BUILD,
                     device_state=DeviceState(no_energy="the device has no energy counter"))
    write(tmp_path / "results", [measured(), without])
    build_site(tmp_path / "results", tmp_path / "site")
    folder = tmp_path / "site" / "machines" / GPU.name / GPU_BUILD.stem
    assert "1 timing of 2 on NVIDIA H100 80GB HBM3 was taken while the device lowered its clocks" in (
        tmp_path / "site" / "index.html").read_text()
    table = (folder / "index.html").read_text()
    assert ">1.25 mJ, 74.5 mJ/GB</td>" in table
    page = (folder / f"{case().slug}.html").read_text()
    assert "1.25 mJ, 74.5 mJ/GB of stored weight, over 9000 calls" in page and "power cap; after 1 of" in page
    assert "not measured: the device has no energy counter" in (
        folder / f"{case('eager_upcast').slug}.html").read_text()


def test_the_chart_of_energy_is_over_the_dense_product_of_the_same_layer():
    def taking(joules: float, name: str, scheme: str, workload: str = "llama2-7b.o") -> Record:
        return record(case(name, scheme, workload=workload), speedup=1.0, machine=GPU, build=GPU_BUILD,
                      device_state=DeviceState(joules_per_call=joules, joules_per_gb=1.0))

    dense = taking(0.002, "dense", "bf16")
    swept = sweep_of(("m", "b"), [dense, taking(0.0005, "x", "mxfp4"), taking(0.001, "x", "mxfp4", "llama2-7b.down")])
    chart = energy_chart(swept)
    [line] = chart.figure["data"]
    assert list(line["x"]) == [0.25] and line["text"] == ["mxfp4"], "of the same layer only"
    assert energy_chart(sweep_of(("m", "b"), [dense])) is None

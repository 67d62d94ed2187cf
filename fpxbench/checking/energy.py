"""Read a device's clocks, temperature, power, throttling and energy while it is timed; never set them.

NVIDIA GPUs are read through nvidia-ml-py, AMD GPUs through amdsmi, and CPUs through their first package's RAPL counter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from time import perf_counter  # by name: an implementation may replace time.perf_counter
from typing import Any, NamedTuple, Protocol

import torch

from fpxbench.records.record import DeviceState

ENERGY_SPAN_S = 0.08
"""Least time between the two counter updates that are used. Counters update every 1 to 100 ms."""
ENERGY_BUDGET_S = 0.35
BATCH_S = 5e-3
"""How long the device works between two readings of the counter: 5% of an update interval of 100 ms."""
READING_INTERVAL_S = 0.02
_RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class Reading(NamedTuple):
    """A device's current readings; None for those that it does not report."""

    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None


class DeviceReader(Protocol):
    """Reads one device."""

    def reading(self) -> Reading:
        """Return clocks, temperature and power."""

    def throttle_reasons(self) -> list[str]:
        """Return why clocks are currently lowered; [] if they are not, or if the device does not report it."""

    def joules(self) -> float | None:
        """Return the energy counter; None if there is none."""


class NoReader(Exception):
    """The device cannot be read; the message says why, and what to do."""


def device_reader(device: str) -> DeviceReader:
    """Return the reader of torch's current device of that type. Raise NoReader."""
    if device.partition(":")[0] != "cuda":
        return _Rapl()
    return _gpu_reader(torch.cuda.current_device())


@cache
def _gpu_reader(index: int) -> DeviceReader:
    return _AmdSmi(index) if torch.version.hip else _Nvml(index)


def energy_joules(device: str) -> float | None:
    """Return the device's energy counter; None if there is none."""
    try:
        return device_reader(device).joules()
    except NoReader:
        return None


class _Rapl:
    """The energy counter of the first CPU package."""

    def __init__(self) -> None:
        if self.joules() is None:
            raise NoReader(f"{_RAPL} cannot be read")

    def reading(self) -> Reading:
        return Reading()

    def throttle_reasons(self) -> list[str]:
        return []

    def joules(self) -> float | None:
        try:
            return int(_RAPL.read_text()) / 1e6
        except (OSError, ValueError):
            return None


_NVML_REASONS = {
    0x4: "power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "heat", 0x40: "heat (hardware)",
    0x80: "power brake",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons that lower clocks under load. Idling and fixed clocks are not
throttling."""


def nvml_handle(index: int) -> Any:
    """Return NVML's handle of torch's device `index`. Raise NoReader.

    Uses the device's UUID or PCI bus, since CUDA_VISIBLE_DEVICES renumbers torch's devices but not NVML's.
    """
    try:
        import pynvml
    except ImportError:
        raise NoReader("nvidia-ml-py is not installed: pip install 'fpxbench[nvidia]'") from None
    properties = torch.cuda.get_device_properties(index)
    tries: list[tuple[Callable[[str], Any], str]] = []
    if uuid := getattr(properties, "uuid", None):
        tries += [(pynvml.nvmlDeviceGetHandleByUUID, f"{kind}-{uuid}") for kind in ("GPU", "MIG")]
    if getattr(properties, "pci_bus_id", None) is not None:
        tries.append((pynvml.nvmlDeviceGetHandleByPciBusId, _pci_bus(properties)))
    try:
        pynvml.nvmlInit()
        for find, name in tries:
            try:
                return find(name)
            except (pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
                continue
    except pynvml.NVMLError as error:       # an AMD machine, or no driver in this container
        raise NoReader(f"NVML: {error}") from None
    raise NoReader(f"NVML knows no device {' or '.join(name for _, name in tries)}")


def _pci_bus(properties: Any) -> str:
    return f"{properties.pci_domain_id:08X}:{properties.pci_bus_id:02X}:{properties.pci_device_id:02X}.0"


class _Nvml:
    """An NVIDIA GPU."""

    def __init__(self, index: int) -> None:
        self._handle = nvml_handle(index)
        import pynvml

        self._nvml = pynvml

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, name)(self._handle, *arguments)
        except self._nvml.NVMLError:        # this GPU does not report it
            return None

    def reading(self) -> Reading:
        nvml, power = self._nvml, self._milliwatts()
        return Reading(self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
                       self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
                       self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
                       None if power is None else power / 1e3)

    def _milliwatts(self) -> int | None:
        """Return the current power. Since Ampere, nvmlDeviceGetPowerUsage averages over the last second, which is
        longer than most timings, so it is only used if the driver has no instantaneous reading."""
        values = self._ask("nvmlDeviceGetFieldValues", [self._nvml.NVML_FI_DEV_POWER_INSTANT])
        if values and values[0].nvmlReturn == self._nvml.NVML_SUCCESS:
            return int(values[0].value.uiVal)
        return self._ask("nvmlDeviceGetPowerUsage")

    def throttle_reasons(self) -> list[str]:
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0     # this name exists in every version
        return [reason for bit, reason in _NVML_REASONS.items() if bits & bit]

    def joules(self) -> float | None:
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3


_AMD_REASONS = {
    "active_ppt_pwr": "power cap", "active_socket_thrm": "heat", "active_vr_thrm": "heat (voltage regulators)",
    "active_hbm_thrm": "heat (memory)", "active_prochot_thrm": "heat (hardware)",
}


class _AmdSmi:
    """An AMD GPU."""

    def __init__(self, index: int) -> None:
        try:
            import amdsmi
        except ImportError:
            raise NoReader("amdsmi is not installed; it comes with ROCm: pip install /opt/rocm/share/amd_smi") from None
        self._smi = amdsmi
        bus = _pci_bus(torch.cuda.get_device_properties(index)).lower()
        try:
            amdsmi.amdsmi_init()
            handles = {amdsmi.amdsmi_get_gpu_device_bdf(one).lower()[-12:]: one
                       for one in amdsmi.amdsmi_get_processor_handles()}
        except amdsmi.AmdSmiException as error:
            raise NoReader(f"AMD SMI: {error}") from None
        if bus[-12:] not in handles:
            raise NoReader(f"AMD SMI knows no device {bus}")
        self._handle = handles[bus[-12:]]

    def _ask(self, name: str, *arguments: Any) -> Any:
        try:
            return getattr(self._smi, name)(self._handle, *arguments)
        except self._smi.AmdSmiException:
            return None

    def reading(self) -> Reading:
        smi = self._smi
        core, memory = (_number((self._ask("amdsmi_get_clock_info", kind) or {}).get("clk"))
                        for kind in (smi.AmdSmiClkType.GFX, smi.AmdSmiClkType.MEM))
        power = self._ask("amdsmi_get_power_info") or {}
        watts = (_number(power.get(name)) for name in ("current_socket_power", "average_socket_power"))
        heat = self._ask("amdsmi_get_temp_metric", smi.AmdSmiTemperatureType.HOTSPOT,
                         smi.AmdSmiTemperatureMetric.CURRENT)
        return Reading(core, memory, _number(heat), next((one for one in watts if one is not None), None))

    def throttle_reasons(self) -> list[str]:
        found = self._ask("amdsmi_get_violation_status") or {}
        return [reason for name, reason in _AMD_REASONS.items() if found.get(name) is True]

    def joules(self) -> float | None:
        found = self._ask("amdsmi_get_energy_count") or {}
        counter = _number(found.get("energy_accumulator", found.get("power")))
        resolution = _number(found.get("counter_resolution"))
        return None if counter is None or resolution is None else counter * resolution / 1e6


def _number(value: Any) -> float | None:
    """Return a number as float; None for amdsmi's ``"N/A"``, which means that the GPU does not report it."""
    return float(value) if isinstance(value, int | float) else None


class StateMonitor:
    """Collects a device's readings during one timing; without a reader, only the reason.

    shared : whether another program used the device when the timing began
    """

    def __init__(self, device: str, shared: bool = False) -> None:
        self._shared = shared
        self._reader: DeviceReader | None = None
        self._why, self._device = "", device
        try:
            self._reader = device_reader(device)
        except NoReader as error:
            self._why = str(error)
        self._readings: list[Reading] = []
        self._reasons: dict[str, None] = {}
        self._throttled: list[int] = []
        self._samples = 0
        self._next = 0.0
        self._energy: dict[str, Any] = {}

    def after_sample(self) -> None:
        """Read the device right after a sample."""
        if self._reader is not None:
            reasons = self._reader.throttle_reasons()
            self._reasons |= dict.fromkeys(reasons)
            if reasons:
                self._throttled.append(self._samples)
            self._read(self._reader)
        self._samples += 1

    def _read(self, reader: DeviceReader) -> None:
        if perf_counter() >= self._next:
            self._readings.append(reader.reading())
            self._next = perf_counter() + READING_INTERVAL_S

    def measure_energy(self, run: Callable[[], int], deadline: float, weight_bytes: int) -> None:
        """Repeat `run`, which makes some calls, waits for them and returns their number, until two updates of the
        energy counter are `ENERGY_SPAN_S` apart.

        Measuring from update to update makes the counter's resolution irrelevant. Gives up at `deadline` (of
        perf_counter), and keeps the reason.
        """
        reader = self._reader
        if reader is None:
            return
        if (last := reader.joules()) is None:
            self._why = "the device has no energy counter"
            return
        deadline = min(deadline, perf_counter() + ENERGY_BUDGET_S)
        steps: list[tuple[float, float, int]] = []
        calls = 0
        while perf_counter() < deadline:
            calls += run()
            joules, now = reader.joules(), perf_counter()
            self._read(reader)
            if joules is None or joules == last:
                continue
            if joules < last:       # it wrapped around
                steps.clear()
            last = joules
            steps.append((now, joules, calls))
            if now - steps[0][0] >= ENERGY_SPAN_S:
                self._energy = _energy(steps[0], steps[-1], weight_bytes)
                return
        self._why = (f"the energy counter stepped {len(steps)} times in what the timing budget left: too few for"
                     f" {ENERGY_SPAN_S * 1e3:.0f} ms between two steps")

    def state(self) -> DeviceState | None:
        """Return the device's state during the timing; None for a CPU that cannot be read."""
        if self._reader is None and self._device == "cpu":
            return None
        columns = [[value for value in column if value is not None] for column in zip(*self._readings, strict=True)]
        sm, memory, temperature, power = columns or ([], [], [], [])
        return DeviceState(
            sm_clock_mhz=median(sm) if sm else None, sm_clock_min_mhz=min(sm, default=None),
            memory_clock_mhz=median(memory) if memory else None, temperature_c=max(temperature, default=None),
            power_w=median(power) if power else None, readings=len(self._readings),
            throttle_reasons=list(self._reasons), throttled_samples=self._throttled, shared=self._shared,
            **self._energy, no_energy="" if self._energy else self._why)


def _energy(first: tuple[float, float, int], last: tuple[float, float, int], weight_bytes: int) -> dict[str, Any]:
    seconds, joules, calls = (after - before for before, after in zip(first, last, strict=True))
    return {"joules_per_call": joules / calls, "joules_per_gb": joules / calls / (weight_bytes / 1e9),
            "energy_calls": int(calls), "energy_s": seconds}

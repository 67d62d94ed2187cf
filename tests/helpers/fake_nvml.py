"""A stand-in for nvidia-ml-py: GPUs of a driver, each with clocks, power, throttle reasons and an energy counter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

IDLE, POWER_CAP = 0x1, 0x4


@dataclass
class FakeGpu:
    """One GPU. Its counter steps every `step_s` seconds of `clock`."""

    uuid: str
    clock: Callable[[], float]
    watts: float = 300.0
    watts_now: float | None = None
    step_s: float = 0.1
    reasons: int = 0
    has_counter: bool = True


def fake_nvml(*gpus: FakeGpu) -> ModuleType:
    """Return a module `pynvml` whose driver has these GPUs."""
    nvml = ModuleType("pynvml")

    class NVMLError(Exception):
        pass

    class NotFound(NVMLError):
        pass

    class InvalidArgument(NVMLError):
        pass

    def by_uuid(uuid: str) -> FakeGpu:
        for gpu in gpus:
            if uuid == f"GPU-{gpu.uuid}":
                return gpu
        raise NotFound("Not Found")

    def energy(gpu: FakeGpu) -> int:
        if not gpu.has_counter:
            raise NVMLError("Not Supported")
        return int(gpu.clock() / gpu.step_s) * int(gpu.step_s * gpu.watts * 1e3)

    def fields(gpu: FakeGpu, wanted: list[int]) -> list[SimpleNamespace]:
        missing, watts = gpu.watts_now is None, gpu.watts_now or 0.0
        assert wanted == [186]
        return [SimpleNamespace(nvmlReturn=3 if missing else 0, value=SimpleNamespace(uiVal=int(watts * 1e3)))]

    nvml.__dict__.update(
        NVML_FI_DEV_POWER_INSTANT=186, NVML_SUCCESS=0, nvmlDeviceGetFieldValues=fields,
        NVMLError=NVMLError, NVMLError_NotFound=NotFound, NVMLError_InvalidArgument=InvalidArgument, NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetClockInfo=lambda gpu, kind: {1: 1980, 2: 3201}[kind],
        nvmlDeviceGetTemperature=lambda gpu, kind: 61, nvmlDeviceGetPowerUsage=lambda gpu: int(gpu.watts * 1e3),
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda gpu: gpu.reasons,
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    return nvml


def fake_properties(uuid: str) -> SimpleNamespace:
    """Return what torch says of a device, as far as a reader asks."""
    return SimpleNamespace(uuid=uuid)

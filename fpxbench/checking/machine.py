"""Describe a device: its name, its caches and memory, and its measured read bandwidth."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from fpxbench.checking.device_lock import device_lock
from fpxbench.checking.device_names import cpu_model, cpu_name, slug
from fpxbench.checking.energy import NoReader, nvml_handle
from fpxbench.records.record import Machine

# Assumed if a CPU does not report its last-level cache; larger than most servers'.
_ASSUMED_CACHE = 64 << 20


class NoDevice(ValueError):
    """PyTorch has no such device here."""


def describe(device: str, name: str | None = None) -> Machine:
    """Return the machine of torch's `device` (``cpu`` or ``cuda``), without its bandwidth.

    `name` is the machine name of its records, by default the device's own name: give machines with the same device
    different names to tell them apart. Raise NoDevice if there is no such device.
    """
    host = platform.node()
    if device == "cpu":
        model, arch = cpu_model(), f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return Machine(
            name=name or cpu_name(), device=model, arch=arch, host=host, kind="cpu",
            memory_bytes=psutil.virtual_memory().total, cache_bytes=cpu_cache_bytes(),
            facts={"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(),
                   "os": platform.platform()})
    if device.partition(":")[0] != "cuda":
        raise NoDevice(f"no device {device!r}: cpu or cuda (ROCm too)")
    if not torch.cuda.is_available():
        raise NoDevice(f"no device {device!r}: this PyTorch ({torch.__version__}) sees no GPU; `fpxbench doctor` says"
                       " why")
    properties = torch.cuda.get_device_properties(0)
    arch = (getattr(properties, "gcnArchName", "").split(":")[0] if torch.version.hip
            else f"sm_{properties.major}{properties.minor}")
    facts: dict[str, Any] = {"multiprocessors": properties.multi_processor_count, "os": platform.platform(),
                             **_driver_facts()}
    return Machine(
        name=name or slug(properties.name), device=properties.name, arch=arch, host=host, kind="cuda",
        memory_bytes=properties.total_memory, cache_bytes=properties.L2_cache_size, facts=facts)


def default_device() -> str:
    """Return ``cuda`` if PyTorch sees a GPU (NVIDIA's or AMD's), else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cpu_cache_bytes() -> int:
    """Return the size of the largest cache that the kernel lists for the first core."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", file.read_text().strip())
        if match:
            sizes.append(int(match[1]) << {"K": 10, "M": 20}[match[2]])
    return max(sizes, default=_ASSUMED_CACHE)


def described(device: str | None, name: str | None) -> Machine:
    """Return the machine of `device` (None: the default), without its bandwidth."""
    return describe(device or default_device(), name)


def measured(device: str | None, name: str | None) -> Machine:
    """Return the machine of `device` (None: the default), with its measured read bandwidth."""
    machine = described(device, name)
    with device_lock(machine.kind, "the read bandwidth"):
        bandwidth = measure_read_bandwidth(machine.kind, machine.cache_bytes)
    return machine.model_copy(update={"read_gb_per_s": round(bandwidth, 3)})


def measure_read_bandwidth(device: str, cache_bytes: int) -> float:
    """Measure the read bandwidth in 1e9 bytes per second: the best of several ways to read a buffer far larger than the
    cache, since other bandwidths are compared with it as a ceiling."""
    if device == "cpu":
        buffer = torch.ones(max(4 * cache_bytes, 256 << 20) // 4)   # subnormals would be multiplied ten times slower
        integers, wide, vector = buffer.view(torch.int32), buffer.view(-1, 4096), torch.ones(4096)
        best = 0.0
        for way in (lambda: integers.sum(dtype=torch.int32), lambda: torch.mv(wide, vector)):
            for _ in range(5):
                began = time.perf_counter()
                way()
                best = max(best, buffer.nbytes / (time.perf_counter() - began) / 1e9)
        return best
    elements = max(8 * cache_bytes, 1 << 30) // 4
    buffer = torch.ones(elements, dtype=torch.float32, device=device)
    half = buffer.view(torch.bfloat16).view(-1, 8192)
    vector = torch.ones(8192, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(buffer)
    ways = [(buffer.nbytes, lambda: buffer.sum()), (buffer.nbytes, lambda: torch.mv(half, vector)),
            (2 * buffer.nbytes, lambda: target.copy_(buffer))]
    best = 0.0
    for nbytes, way in ways:
        way()
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            way()
            end.record()
            end.synchronize()
            best = max(best, nbytes / (start.elapsed_time(end) / 1e3) / 1e9)
    return best


def _driver_facts() -> dict[str, Any]:
    """Return facts from NVML that torch does not report; {} without NVML."""
    try:
        handle = nvml_handle(0)
    except NoReader:
        return {}
    import pynvml

    try:
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "power_limit_w": pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000,
            "memory_bus_bits": pynvml.nvmlDeviceGetMemoryBusWidth(handle),
            "memory_clock_mhz": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        }
    except pynvml.NVMLError:
        return {}

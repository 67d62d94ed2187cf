"""Check this machine's setup: what it can run, and what to install."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from pathlib import Path

import psutil

from fpxbench.builds.installed import NoPyTorch, installed_build
from fpxbench.sweep.messages import SetupCheck


def examine(impls: list[Path]) -> list[SetupCheck]:
    """Check Python, PyTorch, Triton, devices, compiler, memory, disk and every implementation. Imports PyTorch."""
    checks = [SetupCheck("yes", "Python", f"{platform.python_version()} on {platform.platform()}")]
    try:
        build = installed_build()
    except NoPyTorch as error:
        return [*checks, SetupCheck("no", "PyTorch", str(error), "pip install torch")]
    checks.append(SetupCheck("yes", "PyTorch", f"{build.torch} ({build.channel}, {build.variant}), upstream commit"
                                               f" {build.git or 'unknown'}"))
    checks += [_triton(build.triton), *_devices(), _compiler(), *_memory_and_disk()]
    return checks + _implementations(impls)


def _triton(version: str | None) -> SetupCheck:
    if version is None:
        return SetupCheck("no", "Triton", "not installed: cases of triton_fused will be `missing`",
                          "pip install 'fpxbench[triton]'")
    return SetupCheck("yes", "Triton", version)


def _devices() -> list[SetupCheck]:
    import torch

    from fpxbench.checking import machine

    cpu = machine.describe("cpu")
    checks = [SetupCheck("yes", "CPU", f"{cpu.device}, {cpu.arch}, {cpu.facts['cores']} cores, cache"
                                       f" {(cpu.cache_bytes or 0) / 2**20:.0f} MiB")]
    if torch.cuda.is_available():
        gpu = machine.describe("cuda")
        checks.append(SetupCheck("yes", "GPU", f"{gpu.device}, {gpu.arch}, {(gpu.memory_bytes or 0) / 2**30:.0f} GiB"))
        if importlib.util.find_spec("pynvml") is None and not torch.version.hip:
            checks.append(SetupCheck("note", "GPU telemetry", "driver and clocks are not recorded",
                                     "pip install 'fpxbench[nvidia]'"))
    elif torch.version.cuda or torch.version.hip:
        checks.append(SetupCheck(
            "no", "GPU", f"this PyTorch is built for {torch.version.cuda or torch.version.hip}, and sees no GPU",
            "check the driver (nvidia-smi, rocminfo) and CUDA_VISIBLE_DEVICES"))
    elif Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists():
        checks.append(SetupCheck("no", "GPU", "there is a GPU, but this PyTorch is built for CPUs only",
                                 "install a CUDA or ROCm build of PyTorch"))
    else:
        checks.append(SetupCheck("note", "GPU", "none: GPU kernels run in Triton's interpreter, untimed"))
    return checks


def _compiler() -> SetupCheck:
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        without = "none: torch.compile on CPU will raise, and cpu_fused is missing"
        return SetupCheck("no", "C++ compiler", without, "install g++")
    return SetupCheck("yes", "C++ compiler", found)


def _memory_and_disk() -> list[SetupCheck]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    return [
        SetupCheck("yes" if memory.available > 4 << 30 else "no", "memory",
                   f"{memory.available / 2**30:.1f} GiB available",
                   "" if memory.available > 4 << 30 else "the quick profile needs 4 GiB"),
        SetupCheck("yes" if disk.free > 1 << 30 else "no", "disk", f"{disk.free / 2**30:.1f} GiB free here",
                   "" if disk.free > 1 << 30 else "records and compiled kernels need 1 GiB"),
    ]


def _implementations(impls: list[Path]) -> list[SetupCheck]:
    from fpxbench.checking.machine import default_device
    from fpxbench.implementation import discover
    from fpxbench.numbers.scheme import SCHEMES, USED_BY, scheme_named

    known, failures = discover(impls)
    device, schemes = default_device(), tuple(dict.fromkeys((*SCHEMES, *USED_BY)))
    checks = [SetupCheck("no", failure.path, f"not loaded: {failure.error}", "fix the file; the others still run")
              for failure in failures]
    for name, cls in sorted(known.items()):
        answers = {scheme: cls().support(scheme_named(scheme), device) for scheme in schemes}
        taken = [scheme for scheme, support in answers.items() if support.supported]
        missing = next((support.reason for support in answers.values() if support.missing), "")
        if taken:
            untimed = cls().no_timing(device)
            refused = [scheme for scheme in schemes if scheme not in taken]
            which = ", ".join(taken) if len(taken) < len(refused) else f"all but {', '.join(refused)}"
            message = f"{len(taken)} of {len(schemes)} schemes on {device}: {which}"
            message += f"; no timing: {untimed}" if untimed else ""
            checks.append(SetupCheck("note" if untimed else "yes", name, message))
        else:
            reason = missing or next(support.reason for support in answers.values())
            checks.append(SetupCheck("no" if missing else "note", name, f"nothing on {device}: {reason}"))
    return checks

"""What this machine can and cannot do, and what to install."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from fpxbench.builds.installed import NoPyTorch, installed_build


class Finding(NamedTuple):
    """One thing that was looked at."""

    state: Literal["yes", "no", "note"]
    what: str
    said: str
    advice: str = ""


def examine(impls: tuple[Path, ...] = ()) -> list[Finding]:
    """Look at the interpreter, PyTorch, Triton, the device, the compiler and every implementation. Takes seconds."""
    findings = [Finding("yes", "Python", f"{platform.python_version()} on {platform.platform()}")]
    try:
        build = installed_build()
    except NoPyTorch as error:
        return [*findings, Finding("no", "PyTorch", str(error), "pip install torch")]
    findings.append(Finding("yes", "PyTorch", f"{build.torch} ({build.channel}, {build.variant}), upstream commit {build.git or 'unknown'}"))
    findings += [_triton(build.triton), *_devices(), _compiler(), *_room()]
    return findings + _implementations(impls)


def _triton(version: str | None) -> Finding:
    if version is None:
        return Finding("no", "Triton", "not installed: triton_fused will be `missing`", "pip install 'fpxbench[triton]'")
    return Finding("yes", "Triton", version)


def _devices() -> list[Finding]:
    import torch

    from fpxbench.checking import machine

    cpu = machine.describe("cpu")
    findings = [Finding("yes", "CPU", f"{cpu.device}, {cpu.arch}, {cpu.facts['cores']} cores, cache {cpu.cache_bytes / 2**20:.0f} MiB")]
    if torch.cuda.is_available():
        gpu = machine.describe("cuda")
        findings.append(Finding("yes", "GPU", f"{gpu.device}, {gpu.arch}, {gpu.memory_bytes / 2**30:.0f} GiB"))
        if importlib.util.find_spec("pynvml") is None and not torch.version.hip:
            findings.append(Finding("note", "GPU telemetry", "driver and clocks are not recorded", "pip install 'fpxbench[nvidia]'"))
    elif torch.version.cuda or torch.version.hip:
        findings.append(Finding("no", "GPU", f"this PyTorch is built for {torch.version.cuda or torch.version.hip}, and sees no GPU",
                                "check the driver (nvidia-smi, rocminfo) and CUDA_VISIBLE_DEVICES"))
    else:
        present = Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()
        said = "there is a GPU, but this PyTorch is built for CPUs only" if present else "none: GPU kernels run in Triton's interpreter, untimed"
        findings.append(Finding("no" if present else "note", "GPU", said, "install a CUDA or ROCm build of PyTorch" if present else ""))
    return findings


def _compiler() -> Finding:
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if found is None:
        return Finding("no", "C++ compiler", "none: torch.compile on CPU will raise", "install g++")
    return Finding("yes", "C++ compiler", shutil.which(found))


def _room() -> list[Finding]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".")
    return [Finding("yes" if memory.available > 4 << 30 else "no", "memory", f"{memory.available / 2**30:.1f} GiB available",
                    "" if memory.available > 4 << 30 else "the quick profile wants 4 GiB"),
            Finding("yes" if disk.free > 1 << 30 else "no", "disk", f"{disk.free / 2**30:.1f} GiB free here",
                    "" if disk.free > 1 << 30 else "records and compiled kernels want 1 GiB")]


def _implementations(impls: tuple[Path, ...]) -> list[Finding]:
    from fpxbench.checking.machine import default_device
    from fpxbench.implementation import discover
    from fpxbench.numbers.scheme import SCHEMES, scheme_named

    known, failures = discover(impls)
    device = default_device()
    findings = [Finding("no", failure.path, f"not loaded: {failure.error}", "mend the file; the others still run") for failure in failures]
    for name, cls in sorted(known.items()):
        answers = {scheme: cls().supports(scheme_named(scheme), device) for scheme in SCHEMES}
        taken = [scheme for scheme, support in answers.items() if support.supported]
        missing = next((support.reason for support in answers.values() if support.missing), "")
        if taken:
            untimed = cls().no_timing(device)
            said = f"{len(taken)} of {len(SCHEMES)} schemes on {device}: {', '.join(taken)}"
            findings.append(Finding("note" if untimed else "yes", name, said + (f"; no timing: {untimed}" if untimed else "")))
        else:
            reason = missing or next(support.reason for support in answers.values())
            findings.append(Finding("no" if missing else "note", name, f"nothing on {device}: {reason}"))
    return findings

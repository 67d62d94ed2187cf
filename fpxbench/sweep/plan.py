"""A sweep's plan: its cases in order, including refused ones. Imports no torch; `fpxbench.sweep.selection` makes plans.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from pydantic import BaseModel

from fpxbench.builds.installed import installed_build
from fpxbench.cache_folder import cache_root
from fpxbench.checkpoint.weight_source import TensorSource, WeightSource
from fpxbench.records.case import Case
from fpxbench.sweep.settings import Settings
from fpxbench.whole_file import write_whole
from fpxbench.workloads import is_canary


class Planned(BaseModel):
    """A case, and the reason if its implementation refuses it on this device."""

    case: Case
    refused: str = ""
    missing: bool = False
    weight: WeightSource | None = None
    activations: TensorSource | None = None


class Plan(BaseModel):
    """The cases in the order in which they run, and the files that could not be loaded."""

    device: str
    cases: list[Planned]
    about: dict[str, str] = {}
    """Implementation -> first sentence of its docstring."""
    sources: dict[str, str] = {}
    """Implementation -> digest of its source."""
    not_loaded: list[str] = []
    left_out: list[str] = []
    """Implementations without a case on this device, each with the reason."""


LAST_STAGE = 2


def stage(case: Case) -> int:
    """Return the stage of a sweep in which a case runs: 0 canaries, 1 layers at M = 1, 2 the rest."""
    return 0 if is_canary(case.workload) else 1 if case.m == 1 else LAST_STAGE


SHARED_PLAN_VARIABLE = "FPX_SHARED_PLAN"
"""Path of a shared plan: the first process writes its cases there, and later ones, with any PyTorch, read them."""


VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd")


def planned_cases(settings: Settings) -> list[str]:
    """Return the ids of the cases to run, planned in a child process (this one does not import torch), and cached while
    settings, implementations and PyTorch stay the same.

    Raise RuntimeError with the child's last message if it fails.
    """
    shared = os.environ.get(SHARED_PLAN_VARIABLE)
    if shared is None:
        return _own_plan(settings)
    path = Path(shared)
    if not path.exists():
        write_whole(path, json.dumps(_own_plan(settings)))
    return json.loads(path.read_text())


def _own_plan(settings: Settings) -> list[str]:
    cache = cache_root() / "plans" / f"{_plan_digest(settings)}.json"
    try:
        return json.loads(cache.read_text())
    except (OSError, ValueError):
        pass
    command = [sys.executable, "-m", "fpxbench.sweep.selection"]
    done = subprocess.run(command, input=settings.model_dump_json(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"planning failed ({done.returncode})")
    ids = json.loads(done.stdout.splitlines()[-1])
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_whole(cache, json.dumps(ids))
    return ids


def _dates(path: Path) -> str:
    """Return names, sizes and dates of a file or a folder's files, which may be too large to read. Ignores ``:NAME``.
    """
    path = path if path.exists() else Path(str(path).rpartition(":")[0])
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def _metadata_folders(folder: Path) -> list[str]:
    """Return the names of the folders that hold installed packages' metadata, and with it their names and versions.
    Reading the metadata itself takes 60 ms, in each of asv's processes."""
    try:
        return [name for name in os.listdir(folder) if name.endswith((".dist-info", ".egg-info", ".egg-link"))]
    except OSError:     # an archive, or a folder that is not there
        return []


def _plan_digest(settings: Settings) -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(settings.model_dump_json().encode())
    digest.update(f"{sys.executable} {installed_build().torch}".encode())
    # Plug-ins and peers are installed packages, and a plan is of the devices that are visible.
    installed = sorted(name for folder in sys.path for name in _metadata_folders(Path(folder or ".")))
    visible = [(name, os.environ.get(name)) for name in VISIBLE_DEVICES]
    digest.update(repr((installed, visible, [Path(device).exists() for device in GPU_DEVICES])).encode())
    for file in (settings.checkpoint, settings.weights, settings.activations):
        if file is not None:
            digest.update(_dates(Path(file)).encode())
    for place in [package, package / "impls", *settings.impls, *filter(None, [settings.cases])]:
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.is_file() else []:
            digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()[:24]

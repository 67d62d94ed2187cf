"""Which cases a sweep has: profiles and globs over implementations, schemes and workloads."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from fpxbench.case import Case
from fpxbench.settings import Settings


class Planned(BaseModel):
    """A case, and why it will not be run if its implementation refuses the scheme on this device."""

    case: Case
    refused: str = ""
    missing: bool = False


class Plan(BaseModel):
    """Cases in the order in which they run, and what could not be loaded on the way."""

    device: str
    cases: list[Planned]
    about: dict[str, str] = {}
    """Implementation: what its docstring says first."""
    sources: dict[str, str] = {}
    """Implementation: digest of its source."""
    not_loaded: list[str] = []


class _Profile(NamedTuple):
    schemes: tuple[str, ...]
    workloads: tuple[str, ...]
    """Globs over ``workload/mM``."""
    activations: tuple[str, ...]


_SMOKE_SCHEMES = ("bf16", "int8-row", "e4m3fn-row", "e4m3fnuz-row", "e3m2-row", "mxfp4")
_CANARIES = ("canary.*",)
_ALL = ("*",)

PROFILES: dict[tuple[str, str], _Profile] = {
    ("smoke", "cpu"): _Profile(_SMOKE_SCHEMES, ("canary.codes/m1", "llama3-8b.k/m1"), ("bf16",)),
    ("smoke", "cuda"): _Profile(_SMOKE_SCHEMES, ("canary.codes/m1", "canary.ragged/*", "llama3-8b.k/m1"), ("bf16",)),
    # On a CPU: what two cores take in minutes.
    ("quick", "cpu"): _Profile(_ALL, (*_CANARIES, "llama2-7b.o/m1", "llama3-8b.k/m16"), ("bf16",)),
    ("quick", "cuda"): _Profile(
        _ALL, (*_CANARIES, "llama2-7b.o/m1", "llama2-7b.gate_up/m1", "llama3-8b.down/m1", "llama3-8b.down/m16", "llama2-7b.o/m512"),
        ("bf16",)),
    ("full", "cpu"): _Profile(_ALL, _ALL, ("bf16", "fp16")),
    ("full", "cuda"): _Profile(_ALL, _ALL, ("bf16", "fp16")),
}


def make_plan(settings: Settings) -> Plan:
    """The cases that `settings` select. Imports torch and every implementation.

    Raises ValueError for a glob or name that selects nothing, naming the nearest ones.
    """
    from fpxbench.implementation import discover, source_digest, summary
    from fpxbench.machine import default_device
    from fpxbench.scheme import SCHEMES, scheme_named
    from fpxbench.workloads import workloads

    device = settings.device or default_device()
    profile = PROFILES[settings.profile, "cpu" if device == "cpu" else "cuda"]
    known, failures = discover(settings.impls)
    names = _select(settings.implementation or ("*",), known, "implementation")
    schemes = _select_schemes(settings.scheme or profile.schemes, SCHEMES, scheme_named)
    layers = {f"{w.name}/m{m}": (w, m) for w in workloads().values() for m in w.m}
    if settings.workload:
        picked_layers = _select_layers(settings.workload, layers, profile.workloads)
    else:
        picked_layers = _select(profile.workloads, layers, "workload")

    planned: list[Planned] = []
    instances = {name: known[name]() for name in names}
    # Grouped by layer and scheme, so that what shares inputs runs together and a baseline stands near its rivals.
    for layer in picked_layers:
        workload, m = layers[layer]
        for scheme_name in schemes:
            scheme = scheme_named(scheme_name)
            # A dense scheme is the activation's own dtype.
            activations = [scheme_name] if not scheme.quantized else profile.activations
            if not scheme.quantized and scheme_name not in profile.activations and not settings.scheme:
                continue
            for name, instance in instances.items():
                limit = instance.max_elements(device)
                if limit is not None and m * workload.n * workload.k > limit:
                    continue
                support = instance.supports(scheme, device)
                if not support.supported and (instance.baseline or not scheme.quantized):
                    continue    # that a dense product takes no quantized weight, and the reverse, is no finding
                for activation in activations:
                    case = Case(implementation=name, scheme=scheme_name, workload=workload.name, m=m, n=workload.n, k=workload.k,
                                activation=activation)
                    planned.append(Planned(case=case, refused=support.reason, missing=support.missing))
    return Plan(
        device=device, cases=planned, about={name: summary(known[name]) for name in names},
        sources={name: source_digest(name) for name in names}, not_loaded=[f"{f.path}: {f.error}" for f in failures],
    )


def planned_cases(settings: Settings) -> list[str]:
    """Ids of the cases that will be run, without importing torch here: asked of a child process, and remembered for as
    long as settings, implementations and PyTorch stay the same.

    Raises RuntimeError with the child's words if it fails.
    """
    cache = Path(tempfile.gettempdir()) / f"fpxbench-plans-{os.getuid()}" / f"{_plan_digest(settings)}.json"
    try:
        return json.loads(cache.read_text())
    except (OSError, ValueError):
        pass
    command = [sys.executable, "-m", "fpxbench.plan"]
    done = subprocess.run(command, input=settings.model_dump_json(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"planning failed ({done.returncode})")
    ids = json.loads(done.stdout.splitlines()[-1])
    cache.parent.mkdir(mode=0o700, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(ids))
    partial.replace(cache)
    return ids


def _plan_digest(settings: Settings) -> str:
    from fpxbench.build import installed_build

    package = Path(__file__).parent
    digest = hashlib.sha256(settings.model_dump_json().encode())
    digest.update(f"{sys.executable} {installed_build().torch}".encode())
    folders = [package, package / "impls", package.parent / "impls", *settings.impls]
    for folder in folders:
        files = sorted(folder.glob("*.py")) if folder.is_dir() else [folder] if folder.is_file() else []
        for file in files:
            digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()[:24]


def _select(globs: Iterable[str], known: Iterable[str], what: str) -> list[str]:
    known = list(known)
    picked: dict[str, None] = {}
    for glob in globs:
        matching = [name for name in known if fnmatchcase(name, glob)]
        if not matching:
            raise ValueError(_unknown(what, glob, known))
        picked |= dict.fromkeys(matching)
    return list(picked)


def _select_schemes(globs: Iterable[str], known: tuple[str, ...], parse) -> list[str]:
    picked: dict[str, None] = {}
    for glob in globs:
        matching = [name for name in known if fnmatchcase(name, glob)]
        if not matching:
            if any(wildcard in glob for wildcard in "*?["):
                raise ValueError(_unknown("scheme", glob, known))
            matching = [parse(glob).name]
        picked |= dict.fromkeys(matching)
    return list(picked)


def _select_layers(globs: Iterable[str], layers: dict, profile: tuple[str, ...]) -> list[str]:
    """``llama2-7b.o/m1`` picks one layer with its M; ``llama2-7b.o`` picks the profile's M of it, or all if it has none."""
    in_profile = [name for name in layers if any(fnmatchcase(name, glob) for glob in profile)]
    picked: dict[str, None] = {}
    for glob in globs:
        pattern = glob if "/" in glob else glob + "/*"
        matching = [name for name in layers if fnmatchcase(name, pattern)]
        if not matching:
            known = list(layers) if "/" in glob else sorted({name.split("/")[0] for name in layers})
            raise ValueError(_unknown("workload", glob, known))
        if "/" not in glob:
            matching = [name for name in matching if name in in_profile] or matching
        picked |= dict.fromkeys(matching)
    return list(picked)


def _unknown(what: str, glob: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(glob, known, n=3, cutoff=0.4)
    return f"no {what} {glob!r}; " + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[:20])}")


def _main() -> int:
    settings = Settings.model_validate_json(sys.stdin.read())
    try:
        plan = make_plan(settings)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps([planned.case.id for planned in plan.cases if not planned.refused]))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())

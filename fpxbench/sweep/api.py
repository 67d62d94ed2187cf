"""A sweep from Python: `fpxbench.run`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fpxbench.records.table import Records
from fpxbench.sweep.run import main_sweep
from fpxbench.sweep.settings import Profile, Settings, default_memory_limit

Globs = str | Iterable[str]


def run(
    *,
    profile: Profile = "quick",
    implementation: Globs = (),
    scheme: Globs = (),
    workload: Globs = (),
    checkpoint: str | Path | None = None,
    layer: Globs = (),
    weights: str | None = None,
    activations: str | None = None,
    impls: str | Path | Iterable[str | Path] = (),
    device: str | None = None,
    results: str | Path = "results",
    machine: str | None = None,
    fresh: bool = False,
    timing: bool = True,
    jobs: int | None = None,
    timeout_s: float = 180.0,
    memory_limit: int | None = None,
    seed: int | None = None,
) -> Records:
    """Check and time cases like ``fpxbench run``, and return their records.

    implementation, scheme, workload : globs; empty: the profile's
    checkpoint, layer : measure this checkpoint's layers (globs) with their own codes and scales
    weights, activations : ``FILE[:NAME]`` of weights to quantize, and of a tensor [..., K] to multiply
    impls : files or folders of more implementations
    results : folder to append records to; cases with a record there are not rerun, unless `fresh`
    timing : whether to time, not only check
    jobs : how many cases to prepare at once; None: one per core, within memory

    Cases run in child processes; this process does not import PyTorch. Raise ValueError for a selection that matches
    nothing, RuntimeError if the sweep cannot start, and KeyboardInterrupt after Ctrl-C; records made so far are kept.
    """
    settings = Settings(profile=profile, implementation=_several(implementation), scheme=_several(scheme),
                        workload=_several(workload), checkpoint=None if checkpoint is None else Path(checkpoint),
                        layer=_several(layer), weights=weights, activations=activations, impls=_several(impls, Path),
                        device=device, results=Path(results), machine=machine, fresh=fresh, jobs=jobs,
                        timeout_s=timeout_s, seed=seed, memory_limit=memory_limit or default_memory_limit(),
                        timing_budget_s=Settings.model_fields["timing_budget_s"].default if timing else 0.0)
    sweep = main_sweep(settings)
    if sweep.interrupted:
        raise KeyboardInterrupt
    return Records(sweep.records)


def _several(values: str | Path | Iterable[str | Path], kind: Callable[[str | Path], Any] = str) -> tuple[Any, ...]:
    return tuple(kind(value) for value in ([values] if isinstance(values, str | Path) else values))

"""Make the matrix of some Triton builds: compile every cell with each, evaluate, and merge equal outcomes into runs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from packaging.version import Version

from fpxbench import __version__
from fpxbench.records.verdict import Status
from fpxbench.targets import cell_outcomes, engine
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.matrix import (
    CellOutcome,
    CompilingMachine,
    KernelMetrics,
    Matrix,
    OperationSummary,
    Probe,
    Run,
    TritonBuild,
)
from fpxbench.targets.operations import OPERATIONS, ProbeSpec
from fpxbench.targets.triton_builds import TritonInstall, TritonUnavailable, find_triton


@dataclass(frozen=True)
class BuildOutcomes:
    """The outcome of every cell on one build, by probe and architecture."""

    build: TritonBuild
    outcomes: dict[tuple[str, str], CellOutcome]
    metrics: dict[tuple[str, str], KernelMetrics]


def evaluate_build(
    build: TritonInstall, cells: Sequence[engine.Cell], jobs: int | None = None, timeout_s: float = engine.TIMEOUT_S,
    fresh: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildOutcomes:
    """Compile and evaluate every cell with one build. Raises engine.UnusableTriton if it cannot be run."""
    answers = engine.compile_cells(build, cells, jobs, timeout_s, fresh, progress)
    outcomes: dict[tuple[str, str], CellOutcome] = {}
    metrics: dict[tuple[str, str], KernelMetrics] = {}
    for spec, architecture in cells:
        key = (spec.id, architecture.name)
        if architecture.name in answers.unknown:
            outcomes[key] = cell_outcomes.unknown_architecture(answers.unknown[architecture.name])
            continue
        outcomes[key], found = cell_outcomes.evaluate(spec, architecture, answers.by_cell[key])
        if found is not None:
            metrics[key] = found
    cell_outcomes.follow_decodes(outcomes, metrics)
    seconds = sum(answer["seconds"] for answer in answers.by_cell.values())
    torch = answers.torch if any(OPERATIONS[spec.operation].needs_torch for spec, _ in cells) else ""
    about = TritonBuild(triton=answers.triton, key=answers.key, python=answers.python, torch=torch,
                        linker=Path(answers.linker).name, cells=len(cells),
                        seconds=round(seconds, 1))
    return BuildOutcomes(about, outcomes, metrics)


def evaluate_builds(
    requested: Sequence[str], probes: Sequence[ProbeSpec], architectures: Sequence[Architecture], *,
    jobs: int | None = None,
    timeout_s: float = engine.TIMEOUT_S, fresh: bool = False, notify: Callable[[str], None] = lambda message: None,
    progress: Callable[[str, int, int], None] = lambda build, done, total: None,
) -> list[BuildOutcomes]:
    """Evaluate each build; one that is unavailable or unusable is in the result with the reason."""
    results = []
    for name in requested:
        try:
            build = find_triton(name, notify)
            # A Triton from a folder has no PyTorch beside it: operations that need one are left out.
            cells = [(spec, architecture)
                     for spec in probes if not (build.folder and OPERATIONS[spec.operation].needs_torch)
                     for architecture in architectures]
            results.append(evaluate_build(build, cells, jobs, timeout_s, fresh,
                                     lambda done, total, name=name: progress(name, done, total)))
        except (TritonUnavailable, engine.UnusableTriton) as error:
            notify(str(error))
            results.append(BuildOutcomes(TritonBuild(triton=name, unusable=str(error)), {}, {}))
    return results


def assemble(results: Sequence[BuildOutcomes], probes: Sequence[ProbeSpec],
             architectures: Sequence[Architecture]) -> Matrix:
    """Return one matrix of them, in order of version. Of two with the same version the later in `results` counts."""
    builds = sorted({result.build.triton: result for result in results}.values(),
                    key=lambda result: _order(result.build.triton))
    outcomes: dict[tuple, int] = {}
    shared: list[CellOutcome] = []

    def position(outcome: CellOutcome) -> int:
        evidence = outcome.message if outcome.status is Status.WRONG else ""      # differs from cell to cell
        cause = (outcome.status, outcome.kind, outcome.cause, outcome.check, outcome.signal, outcome.flags, evidence)
        if cause not in outcomes:
            outcomes[cause] = len(shared)
            shared.append(outcome)
        return outcomes[cause]

    def history(probe: str, architecture: str) -> list[Run]:
        runs: list[Run] = []
        for at, result in enumerate(builds):
            outcome = result.outcomes.get((probe, architecture))
            if outcome is None:
                continue
            number, metrics = position(outcome), result.metrics.get((probe, architecture))
            first = at
            if runs and runs[-1].outcome == number and runs[-1].builds[1] == at - 1:
                first = runs.pop().builds[0]
            runs.append(Run(builds=(first, at), outcome=number, metrics=metrics))
        return runs

    found = [
        Probe(id=spec.id, operation=spec.operation, format=spec.format,
              cells={architecture.name: runs
                     for architecture in architectures if (runs := history(spec.id, architecture.name))})
        for spec in probes
    ]
    found = [probe for probe in found if probe.cells]
    operations = list(dict.fromkeys(probe.operation for probe in found))
    return Matrix(
        generator=f"fpxbench {__version__}", generated=datetime.now(UTC).replace(microsecond=0), machine=this_machine(),
        builds=[result.build for result in builds], architectures=list(architectures),
        operations=[OperationSummary(name=name, title=OPERATIONS[name].title, about=OPERATIONS[name].about)
                    for name in operations],
        outcomes=shared, probes=found,
    )


def this_machine() -> CompilingMachine:
    """Return the machine that compiles, without its name."""
    processor = platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")),
                             processor)
    except OSError:
        pass        # only Linux has this file; the architecture remains
    return CompilingMachine(
        system=f"{platform.system()} {platform.machine()}", processor=processor, cores=os.cpu_count() or 1
    )


def _order(triton: str) -> tuple[int, Version | str]:
    """Return a sort key: by version, then builds without one (a path that could not be used)."""
    try:
        return 0, Version(triton)
    except ValueError:
        return 1, triton

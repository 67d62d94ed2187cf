"""The matrix of some Triton builds: each is asked, its answers are judged, and what did not change is folded into runs."""

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
from fpxbench.targets import engine, judgement
from fpxbench.targets.architectures import Architecture
from fpxbench.targets.matrix import Figures, Machine, Matrix, OperationSummary, Outcome, Probe, Run, TritonBuild
from fpxbench.targets.operations import OPERATIONS, Question
from fpxbench.targets.triton_builds import CannotObtain, TritonAt, triton_at


@dataclass(frozen=True)
class Judged:
    """What one build makes of every cell: by probe and architecture."""

    build: TritonBuild
    outcomes: dict[tuple[str, str], Outcome]
    figures: dict[tuple[str, str], Figures]


def ask_build(
    build: TritonAt, cells: Sequence[engine.Cell], jobs: int | None = None, timeout_s: float = engine.TIMEOUT_S, fresh: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """Ask that build about every cell. Raises engine.Unusable for one that cannot be run."""
    answers = engine.ask(build, cells, jobs, timeout_s, fresh, progress)
    outcomes: dict[tuple[str, str], Outcome] = {}
    figures: dict[tuple[str, str], Figures] = {}
    for question, architecture in cells:
        key = (question.id, architecture.name)
        if architecture.name in answers.unknown:
            outcomes[key] = judgement.unknown_architecture(answers.unknown[architecture.name])
            continue
        outcomes[key], found = judgement.judged(question, architecture, answers.by_cell[key])
        if found is not None:
            figures[key] = found
    judgement.follow_decodes(outcomes, figures)
    seconds = sum(answer["seconds"] for answer in answers.by_cell.values())
    torch = answers.torch if any(OPERATIONS[question.operation].needs_torch for question, _ in cells) else ""
    about = TritonBuild(triton=answers.triton, key=answers.key, python=answers.python, torch=torch, linker=Path(answers.linker).name, cells=len(cells),
                        seconds=round(seconds, 1))
    return Judged(about, outcomes, figures)


def ask_builds(
    asked_for: Sequence[str], questions: Sequence[Question], architectures: Sequence[Architecture], *, jobs: int | None = None,
    timeout_s: float = engine.TIMEOUT_S, fresh: bool = False, say: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] = lambda build, done, total: None,
) -> list[Judged]:
    """`ask_build` for each of them. One that cannot be had or run is in the result with the reason, and the others go on."""
    results = []
    for name in asked_for:
        try:
            build = triton_at(name, say)
            # A Triton from a folder sees nothing else that is installed: what takes PyTorch is not asked there.
            cells = [(question, architecture) for question in questions if not (build.folder and OPERATIONS[question.operation].needs_torch)
                     for architecture in architectures]
            results.append(ask_build(build, cells, jobs, timeout_s, fresh,
                                     lambda done, total, name=name: progress(name, done, total)))
        except (CannotObtain, engine.Unusable) as error:
            say(str(error))
            results.append(Judged(TritonBuild(triton=name, unusable=str(error)), {}, {}))
    return results


def assembled(results: Sequence[Judged], questions: Sequence[Question], architectures: Sequence[Architecture]) -> Matrix:
    """One matrix of them, in order of version. Of two with the same version the later in `results` counts."""
    builds = sorted({result.build.triton: result for result in results}.values(), key=lambda result: _order(result.build.triton))
    outcomes: dict[tuple, int] = {}
    shared: list[Outcome] = []

    def position(outcome: Outcome) -> int:
        evidence = outcome.words if outcome.status is Status.WRONG else ""      # of a wrong result each has its own
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
            number, figures = position(outcome), result.figures.get((probe, architecture))
            first = at
            if runs and runs[-1].outcome == number and runs[-1].builds[1] == at - 1:
                first = runs.pop().builds[0]
            runs.append(Run(builds=(first, at), outcome=number, figures=figures))
        return runs

    probes = [
        Probe(id=question.id, operation=question.operation, format=question.format,
              cells={architecture.name: runs for architecture in architectures if (runs := history(question.id, architecture.name))})
        for question in questions
    ]
    probes = [probe for probe in probes if probe.cells]
    asked = list(dict.fromkeys(probe.operation for probe in probes))
    return Matrix(
        generator=f"fpxbench {__version__}", generated=datetime.now(UTC).replace(microsecond=0), machine=this_machine(),
        builds=[result.build for result in builds], architectures=list(architectures),
        operations=[OperationSummary(name=name, title=OPERATIONS[name].title, about=OPERATIONS[name].about) for name in asked],
        outcomes=shared, probes=probes,
    )


def this_machine() -> Machine:
    """What compiles here, without its name."""
    processor = platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), processor)
    except OSError:
        pass        # no such file but on Linux; the architecture is what is left to say
    return Machine(system=f"{platform.system()} {platform.machine()}", processor=processor, cores=os.cpu_count() or 1)


def _order(triton: str) -> tuple[int, Version | str]:
    """By version; what has none (a path that could not be used) after all that have."""
    try:
        return 0, Version(triton)
    except ValueError:
        return 1, triton

"""A full row of the support matrix: the builds of every architecture, failures with messages, and scripts that
reproduce them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from fpxbench.records.verdict import SEVERITY, Status
from fpxbench.reports.targets.support_cell import BuildState, SupportCell, build_states
from fpxbench.reports.targets.support_table import SupportMatrix, SupportRow, detail
from fpxbench.targets.architectures import ARCHITECTURES, Architecture
from fpxbench.targets.matrix import CellOutcome, KernelMetrics, Probe
from fpxbench.targets.operations import OPERATIONS, ProbeSpec
from fpxbench.targets.reproduction import failure_summary, script

CHECKS = {
    "table": "checked: every code was run through the compiled assembly",
    "inputs": "checked: every number, every midpoint and their neighbours were run through the compiled assembly",
    "instruction": "checked by its conversion or matrix instruction, without running it",
    "none": "compiled only, its result was not checked",
}
"""The `check` of an outcome, spelled out."""

_NEEDS_TORCH = "triton_fused"


@dataclass(frozen=True)
class OutcomeSpan:
    """Probes with the same outcome on the same builds."""

    outcome: CellOutcome
    first: str
    last: str
    """Versions."""
    probes: tuple[Probe, ...]
    every: bool
    """Whether these are all the row's probes."""
    script: int | None
    """Index of the script on the page that reproduces the outcome."""

    @property
    def builds(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def details(self) -> list[str]:
        """Names of the probes without operation and format."""
        return [detail(probe) for probe in self.probes]

    @property
    def shows_something(self) -> bool:
        return _shows_something(self.outcome)


@dataclass(frozen=True)
class ArchitectureDetail:
    """A cell in full."""

    architecture: Architecture
    cell: SupportCell
    timeline: list[BuildState | None]
    """The state on each build."""
    entries: list[OutcomeSpan]
    """Oldest first."""
    metrics: list[tuple[Probe, CellOutcome, KernelMetrics]]
    """Metrics of the code of the newest tested build."""


@dataclass
class Scripts:
    """Scripts stored as lists of paragraphs, most of which many scripts share."""

    scripts: list[list[int]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        return list(self._places)

    def add(self, text: str) -> int:
        self.scripts.append([self._places.setdefault(part, len(self._places)) for part in text.split("\n\n")])
        return len(self.scripts) - 1

    def text(self, number: int) -> str:
        """Return a script as reports/static/support.js assembles it."""
        parts = self.parts
        return "\n\n".join(parts[at] for at in self.scripts[number])


def _shows_something(outcome: CellOutcome) -> bool:
    """Return whether a reproducing script would show something."""
    return bool(outcome.flags) or outcome.status not in (Status.OK, Status.MISSING)


def row_detail(support: SupportMatrix, row: SupportRow) -> tuple[list[ArchitectureDetail], Scripts]:
    """Return the row on each architecture where it was tested, and scripts for outcomes that are not ok.

    The suite's own kernels have no script here, since only PyTorch can compile them: `fpxbench targets repro` prints
    theirs."""
    matrix, scripts = support.matrix, Scripts()
    operation = OPERATIONS.get(row.operation.name) if row.operation.name != _NEEDS_TORCH else None
    questions = {question.id: question for question in operation.probes()} if operation else {}
    found = []
    for architecture in matrix.architectures:
        if cell := row.cells.get(architecture.name):
            entries = list(_entries(support, row, architecture, questions, scripts))
            timeline = build_states(matrix, row.probes, architecture.name)
            found.append(ArchitectureDetail(architecture, cell, timeline, entries,
                                            _metrics(support, row, architecture.name)))
    return found, scripts


def _entries(support: SupportMatrix, row: SupportRow, architecture: Architecture, questions: dict[str, ProbeSpec],
             scripts: Scripts) -> Iterator[OutcomeSpan]:
    groups: dict[tuple[int, int, int], list[Probe]] = defaultdict(list)
    for probe in row.probes:
        for run in probe.cells.get(architecture.name, ()):
            groups[*run.builds, run.outcome].append(probe)
    outcomes, versions = support.matrix.outcomes, [build.triton for build in support.matrix.builds]
    for first, last, number in sorted(groups, key=lambda key: (key[0], SEVERITY[outcomes[key[2]].status], key[1:])):
        outcome, probes = outcomes[number], groups[first, last, number]
        text = _script(questions.get(probes[0].id), architecture.name, versions[first], versions[last], outcome)
        yield OutcomeSpan(outcome, versions[first], versions[last], tuple(probes), len(probes) == len(row.probes),
                          scripts.add(text) if text else None)


def _script(question: ProbeSpec | None, architecture: str, first: str, last: str, outcome: CellOutcome) -> str:
    """Return a script for the newest build with this outcome, or an empty string. The version becomes part of a program
    that people run, so it is validated."""
    valid = architecture in ARCHITECTURES and re.fullmatch(r"[\w.+]+", last)
    if question is None or not valid or not _shows_something(outcome):
        return ""
    return script(question, ARCHITECTURES[architecture], last, failure_summary(outcome, first, last))


def _metrics(support: SupportMatrix, row: SupportRow,
             architecture: str) -> list[tuple[Probe, CellOutcome, KernelMetrics]]:
    runs = [(probe, of[-1]) for probe in row.probes if (of := probe.cells.get(architecture))]
    newest = max(run.builds[1] for _, run in runs)
    return [(probe, support.matrix.outcomes[run.outcome], run.metrics)
            for probe, run in runs if run.builds[1] == newest and run.metrics]

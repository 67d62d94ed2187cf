"""One row of the support table in full: every architecture's timeline, in whose words what failed, and scripts that show it again."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from fpxbench.records.verdict import SEVERITY, Status
from fpxbench.reports.targets.support_cell import Cell, Moment, moments
from fpxbench.reports.targets.support_table import Row, Support, detail
from fpxbench.targets.architectures import ARCHITECTURES, Architecture
from fpxbench.targets.matrix import CellOutcome, KernelMetrics, Probe
from fpxbench.targets.operations import OPERATIONS, ProbeSpec
from fpxbench.targets.reproduction import script, told

CHECKS = {
    "table": "every code was run through the assembly, and compared",
    "inputs": "run on every number, every midpoint and their neighbours, and compared",
    "instruction": "the conversion or matrix instruction was compared, nothing was run",
    "none": "compiled only: what it computes was not checked",
}
"""What each `check` of an outcome comes to."""

_ASKED_WITH_TORCH = "triton_fused"


@dataclass(frozen=True)
class Entry:
    """Probes that had the same outcome on the same builds."""

    outcome: CellOutcome
    first: str
    last: str
    """Versions."""
    probes: tuple[Probe, ...]
    every: bool
    """Whether these are all probes of the row."""
    script: int | None
    """Which of the page's scripts shows it again."""

    @property
    def builds(self) -> str:
        return self.first if self.first == self.last else f"{self.first} to {self.last}"

    @property
    def details(self) -> list[str]:
        """The probes by what they have beside operation and format."""
        return [detail(probe) for probe in self.probes]

    @property
    def shows_something(self) -> bool:
        return _shows_something(self.outcome)


@dataclass(frozen=True)
class OnArchitecture:
    """A cell in full."""

    architecture: Architecture
    cell: Cell
    timeline: list[Moment | None]
    """Build by build."""
    entries: list[Entry]
    """Oldest first."""
    metrics: list[tuple[Probe, CellOutcome, KernelMetrics]]
    """Of the objects that the newest build that was asked makes."""


@dataclass
class Scripts:
    """Scripts as lists of parts, of which most are in many: a part is what stands between empty lines."""

    scripts: list[list[int]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    @property
    def parts(self) -> list[str]:
        return list(self._places)

    def add(self, text: str) -> int:
        self.scripts.append([self._places.setdefault(part, len(self._places)) for part in text.split("\n\n")])
        return len(self.scripts) - 1

    def text(self, number: int) -> str:
        """One of them, as reports/static/support.js puts it together."""
        parts = self.parts
        return "\n\n".join(parts[at] for at in self.scripts[number])


def _shows_something(outcome: CellOutcome) -> bool:
    """Whether there is something to see in doing it again."""
    return bool(outcome.flags) or outcome.status not in (Status.OK, Status.MISSING)


def row_in_full(support: Support, row: Row) -> tuple[list[OnArchitecture], Scripts]:
    """The row on each architecture where it was asked, and the scripts for what is not ok there.

    There are none for the suite's own kernels, of which only PyTorch can say how they are compiled: `fpxbench targets repro` prints those.
    """
    matrix, scripts = support.matrix, Scripts()
    operation = OPERATIONS.get(row.operation.name) if row.operation.name != _ASKED_WITH_TORCH else None
    questions = {question.id: question for question in operation.questions()} if operation else {}
    found = []
    for architecture in matrix.architectures:
        if cell := row.cells.get(architecture.name):
            entries = list(_entries(support, row, architecture, questions, scripts))
            timeline = moments(matrix, row.probes, architecture.name)
            found.append(OnArchitecture(architecture, cell, timeline, entries, _metrics(support, row, architecture.name)))
    return found, scripts


def _entries(support: Support, row: Row, architecture: Architecture, questions: dict[str, ProbeSpec], scripts: Scripts) -> Iterator[Entry]:
    groups: dict[tuple[int, int, int], list[Probe]] = defaultdict(list)
    for probe in row.probes:
        for run in probe.cells.get(architecture.name, ()):
            groups[*run.builds, run.outcome].append(probe)
    outcomes, versions = support.matrix.outcomes, [build.triton for build in support.matrix.builds]
    for first, last, number in sorted(groups, key=lambda key: (key[0], SEVERITY[outcomes[key[2]].status], key[1:])):
        outcome, probes = outcomes[number], groups[first, last, number]
        text = _script(questions.get(probes[0].id), architecture.name, versions[first], versions[last], outcome)
        yield Entry(outcome, versions[first], versions[last], tuple(probes), len(probes) == len(row.probes),
                    scripts.add(text) if text else None)


def _script(question: ProbeSpec | None, architecture: str, first: str, last: str, outcome: CellOutcome) -> str:
    """For the newest build that shows it. None where this package does not know the cell; a version from elsewhere must be one, as it
    becomes part of a program that people run."""
    if question is None or architecture not in ARCHITECTURES or not _shows_something(outcome) or not re.fullmatch(r"[\w.+]+", last):
        return ""
    return script(question, ARCHITECTURES[architecture], last, told(outcome, first, last))


def _metrics(support: Support, row: Row, architecture: str) -> list[tuple[Probe, CellOutcome, KernelMetrics]]:
    runs = [(probe, of[-1]) for probe in row.probes if (of := probe.cells.get(architecture))]
    newest = max(run.builds[1] for _, run in runs)
    return [(probe, support.matrix.outcomes[run.outcome], run.metrics) for probe, run in runs if run.builds[1] == newest and run.metrics]

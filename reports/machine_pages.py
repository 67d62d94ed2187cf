"""Write the pages of machines (their series and newest sweeps), several machines in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fpxbench.records.store import BrokenLine, Store, folder_of
from fpxbench.regressions.machine_processes import in_processes
from fpxbench.reports.casts.conversion_pages import CastSweep
from fpxbench.reports.history.chapter import HistoryInputs, MachineHistory
from fpxbench.reports.kept_pages import KeptPages
from fpxbench.reports.pages import Pages
from fpxbench.reports.sweep.sweep_pages import newest_of, write_sweep
from fpxbench.reports.sweep.sweep_table import SweepHeading, SweepTable


@dataclass(frozen=True)
class MachineTask:
    """The inputs of one machine's pages, and the folder to write them to."""

    name: str
    paths: list[Path]
    """Its records files."""
    casts: dict[tuple[str, str], CastSweep]
    """Its cast sweeps in brief, by folder."""
    inputs: HistoryInputs
    output: Path
    from_report: bool
    """Whether `output` holds an earlier report."""


@dataclass(frozen=True)
class MachinePages:
    """The data of one machine that the rest of the report needs."""

    name: str
    history: MachineHistory
    sweeps: list[SweepHeading] = field(default_factory=list)
    newest: list[SweepTable] = field(default_factory=list)
    """The newest sweep of each channel and variant, with its cases."""
    broken: list[BrokenLine] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    written: set[Path] = field(default_factory=set)
    kept: dict[Path, frozenset[str]] = field(default_factory=dict)
    """Pages that are kept, by folder."""


def write_machine(machine: MachineTask) -> MachinePages:
    """Write the pages of one machine."""
    store, pages = Store(machine.inputs.results), Pages(machine.output)
    kept = KeptPages(machine.output, machine.from_report)
    history, shown, histories = machine.inputs.of_machine(machine.name, machine.paths, pages)
    found = MachinePages(machine.name, history, failures=pages.failures, written=pages.written, kept=kept.kept)
    sweeps: list[tuple[Path, SweepHeading]] = []
    for path in shown:
        sweep, broken = write_sweep(store, path, pages, kept, machine.casts.get(folder_of(path)), histories)
        found.broken.extend(broken)
        if sweep is not None:
            sweeps.append((path, sweep))
            found.sweeps.append(sweep.heading())
    found.newest.extend(newest_of(store, sweeps, histories))
    return found


def write_machines(machines: list[MachineTask], jobs: int, say: Callable[[str], None]) -> Iterator[MachinePages]:
    """Write the pages of each machine in `jobs` processes, and yield the results in order."""
    alone = jobs < 2 or len(machines) < 2

    def begun(machine: MachineTask) -> MachinePages:
        say(f"{machine.name}: changes from build to build")
        return write_machine(machine)

    for done, found in enumerate(in_processes(begun if alone else write_machine, machines, jobs), 1):
        if not alone:
            say(f"{found.name}: done, {done} of {len(machines)} machines")
        yield found

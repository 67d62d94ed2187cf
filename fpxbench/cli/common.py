"""Shared by commands: consoles, common options, and errors that the user can correct."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fpxbench.records.fields import NAME_PATTERN
from fpxbench.records.verdict import Status
from fpxbench.sweep.settings import Profile, default_memory_limit
from fpxbench.user_error import UserError

if TYPE_CHECKING:
    from fpxbench.sweep.isolation import Outcome
    from fpxbench.workloads import Workload

CHILD_TIMEOUT_S = 300.0

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ResultsOption = Annotated[Path, typer.Option("--results", help="Folder of the records.", show_default=True)]
ImplsOption = Annotated[list[Path] | None, typer.Option(
    "--impls", help="File or folder with more implementations. Repeatable.")]
ImplementationOption = Annotated[list[str] | None, typer.Option(
    "--implementation", "-i", help="Implementations, by glob. Repeatable.")]
SchemeOption = Annotated[list[str] | None, typer.Option(
    "--scheme", "-s", help="Schemes, by glob or by parts (e2m2-row, e3m4b5-g64). Repeatable.")]
WorkloadOption = Annotated[list[str] | None, typer.Option(
    "--workload", "-w", help="Workloads, by glob: llama2-7b.*, canary.ragged/m3. Repeatable.")]
TpOption = Annotated[str, typer.Option(
    "--tp", help="Tensor-parallel sizes: 2,4,8 adds one rank's shard of each layer (llama3-70b.down.tp8).")]
ProfileOption = Annotated[Profile, typer.Option(
    "--profile", help="smoke takes a minute, quick several; full runs everything.")]


def checked_device(name: str | None) -> str | None:
    """Return the name of a device, or None. Raise UsageError for any other than cpu and cuda."""
    if name not in (None, "cpu", "cuda"):
        raise UsageError(f"no device {name!r}: cpu or cuda (ROCm too)")
    return name


DeviceOption = Annotated[str | None, typer.Option(
    "--device", callback=checked_device, help="cpu or cuda (ROCm too).  [dim]default: a GPU if PyTorch sees one[/]")]


def _machine_name(name: str | None) -> str | None:
    if name is not None and not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(f"--machine {name!r}: a name has letters, digits and _ . + - only, and begins with one of the"
                         " first three")
    return name


StoredAsOption = Annotated[str | None, typer.Option(
    "--machine", callback=_machine_name, help="Name to store the records under.  [dim]default: the device's name[/]")]
TimingOption = Annotated[bool, typer.Option("--timing/--no-timing", help="Time the correct cases, or only check them.")]
CaseTimeoutOption = Annotated[float, typer.Option(
    "--timeout", help="Time limit for one case, in seconds.", min=0.1)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
MachineJobsOption = Annotated[int, typer.Option(
    "--jobs", min=1, help="Number of processes, each with one machine's series in memory.")]


_WIDEST = 1000


def end_run(
    file: Path, results: Path, found: Iterable[Status], failing: Container[Status], interrupted: bool,
    quiet: bool = False,
) -> None:
    """Print where the records are, and end the command: 130 after Ctrl-C, 1 if a status is among the `failing` ones."""
    if not quiet:
        out.print(f"records: {file}   next: fpxbench report --results {results}", markup=False, style="dim")
    if interrupted:
        raise typer.Exit(130)
    if any(status in failing for status in found):
        raise typer.Exit(1)


def new_table(*columns: str, title: str | None = None, no_wrap: bool = False) -> Table:
    """Return a table without rows. A column whose name begins with ``>`` is aligned to the right."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left",
                         overflow="fold", no_wrap=no_wrap)
    return table


def print_table(table: Table) -> None:
    """Print a table: within the terminal's width on a terminal, as wide as it is elsewhere, where a cut or folded id is
    of no use."""
    if out.is_terminal:
        out.print(table)
    else:
        print_wide(table)


def print_wide(table: Table) -> None:
    """Print a table as wide as it is."""
    wide = Console(highlight=False, width=_WIDEST)
    wide.print(table, width=table.__rich_measure__(wide, wide.options).maximum)


class UsageError(UserError):
    """A mistake in how a command was used."""


def new_app() -> typer.Typer:
    """Return the app that a module of commands registers them on."""
    return typer.Typer(rich_markup_mode="rich")


def user_message(error: Exception) -> str | None:
    """Return the message to print for an error that a user can correct; None for any other, which is a bug."""
    if isinstance(error, ValidationError):
        return "; ".join(
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors(include_url=False)
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, (UserError, OSError, ValueError)) else None


def results_folder(results: Path) -> Path:
    """Return `results`. Raise UsageError if it is not a folder."""
    if not results.exists():
        raise UsageError(f"--results {results}: no such folder; `fpxbench run --results {results}` creates it")
    if not results.is_dir():
        raise UsageError(f"--results {results}: this is a file; give the folder that `fpxbench run --results` wrote to")
    return results


def statuses(text: str) -> frozenset[Status]:
    """Return the statuses in ``--fail-on wrong,crash``. Raise UsageError for a name that is not a status."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in list(Status):
            raise UsageError(f"--fail-on {name!r}: a status is one of {', '.join(Status)}")
    return frozenset(map(Status, names))


def ranks(text: str) -> tuple[int, ...]:
    """Return the sizes of ``--tp 2,4,8``. Raise UsageError for a part that is no size."""
    sizes = [part.strip() for part in text.split(",") if part.strip()]
    for size in sizes:
        if not (size.isdecimal() and 2 <= int(size) <= 1024):
            raise UsageError(f"--tp {size!r}: a size of tensor parallelism is a number from 2 to 1024")
    return tuple(map(int, sizes))


def call_in_child(target: str, *arguments: object, timeout_s: float = CHILD_TIMEOUT_S) -> Outcome:
    """Call ``module:function``, which imports PyTorch, in a child. Raise UsageError for a mistake that it reports."""
    from fpxbench.sweep.isolation import Isolation

    with Isolation(default_memory_limit()) as isolation:
        outcome = isolation.call(target, *arguments, timeout_s=timeout_s)
    if outcome.mistake:
        raise UsageError(outcome.mistake)
    return outcome


def known_workloads(ranks: tuple[int, ...] = ()) -> dict[str, Workload]:
    """Return the workloads by name, with those of `ranks`. transformers, which has their shapes, imports PyTorch."""
    from fpxbench.workloads import Workload

    outcome = call_in_child("fpxbench.workloads:workloads", ranks)
    if outcome.value is None:
        raise UsageError(f"the workloads could not be read: {outcome.failure.summary}")
    return outcome.read(dict[str, Workload])

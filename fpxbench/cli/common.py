"""What commands share: the consoles, common options, and the errors that are a user's mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from fpxbench.records.verdict import Status
from fpxbench.sweep.settings import Profile

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ResultsOption = Annotated[Path, typer.Option("--results", help="Folder of the records.", show_default=True)]
ImplsOption = Annotated[list[Path] | None, typer.Option("--impls", help="A file or folder of further implementations. Repeatable.")]
ImplementationOption = Annotated[list[str] | None, typer.Option("--implementation", "-i", help="Glob over implementations. Repeatable.")]
SchemeOption = Annotated[list[str] | None, typer.Option(
    "--scheme", "-s", help="Glob over schemes, or one by its parts (e2m2-row, e3m4b5-g64). Repeatable.")]
WorkloadOption = Annotated[list[str] | None, typer.Option("--workload", "-w", help="Glob over workloads: llama2-7b.*, canary.ragged/m3. Repeatable.")]
ProfileOption = Annotated[Profile, typer.Option("--profile", help="smoke: a minute. quick: minutes. full: everything.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda (ROCm too).  [dim]default: a GPU if PyTorch sees one[/]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


_WIDEST = 1000


def print_table(table: Table) -> None:
    """Print a table: within the terminal's width on a terminal, as wide as it is elsewhere, where a cut or folded id is of no use."""
    if out.is_terminal:
        out.print(table)
    else:
        print_wide(table)


def print_wide(table: Table) -> None:
    """Print a table as wide as it is."""
    wide = Console(highlight=False, width=_WIDEST)
    wide.print(table, width=table.__rich_measure__(wide, wide.options).maximum)


class UsageError(Exception):
    """A mistake in how a command was used. Ends it with the message and exit status 2."""


def new_app() -> typer.Typer:
    """Return the app that a module of commands registers them on."""
    return typer.Typer(rich_markup_mode="rich")


def user_message(error: Exception) -> str | None:
    """Return the message to print for an error that a user can correct; None for any other, which is a bug."""
    from fpxbench.builds.installed import NoPyTorch

    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors(include_url=False))
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, (UsageError, NoPyTorch, OSError, ValueError)) else None


def results_folder(results: Path) -> Path:
    """`results`. Raises UsageError where it is no folder."""
    if not results.exists():
        raise UsageError(f"--results {results}: no such folder; `fpxbench run --results {results}` makes it")
    if not results.is_dir():
        raise UsageError(f"--results {results}: a file; give the folder that `fpxbench run --results` wrote to")
    return results


def statuses(text: str) -> frozenset[Status]:
    """The statuses of ``--fail-on wrong,crash``. Raises UsageError for a word that is none."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in list(Status):
            raise UsageError(f"--fail-on {name!r}: a status is one of {', '.join(Status)}")
    return frozenset(map(Status, names))

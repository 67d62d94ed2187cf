"""What every command shares: the app, the consoles, the options that several commands take, and the user's mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fpxbench.records.verdict import Status
from fpxbench.sweep.settings import Profile

app = typer.Typer(
    name="fpxbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Is low-bit floating-point matmul still [bold]right[/], and still [bold]fast[/]?

    """
    "fpxbench checks and times weight-only quantized matmul (FP8, FP6, FP4, MX, NVFP4 and any float up to 8 bits): every "
    "implementation on every scheme, on this machine's device and the PyTorch that is installed. A case that is not right gets a "
    """verdict instead of a time.

    [bold]Start with[/]   fpxbench run --profile smoke && fpxbench report

    """
    "[bold]Words[/]   A [italic]scheme[/] is a number format and its scales (e4m3fn-row, mxfp4). An [italic]implementation[/] is one "
    "way to store such a weight and multiply by it. A [italic]workload[/] is a real layer's shape and a number of tokens. A "
    "[italic]case[/] is one of each: eager_upcast/e4m3fn-row/llama2-7b.o/m1/bf16.",
)

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


class UsageError(Exception):
    """A mistake of the user's: one sentence, exit status 2."""


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

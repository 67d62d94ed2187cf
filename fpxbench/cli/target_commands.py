"""`fpxbench targets`: which low-bit operations Triton compiles for which GPU, and since which version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fpxbench.cli.common import JsonOption, UsageError, err, new_app, new_table, out, print_wide
from fpxbench.counted import counted
from fpxbench.records.verdict import Status
from fpxbench.targets.triton_builds import INSTALLED, normal_name

if TYPE_CHECKING:
    from fpxbench.targets.collection import BuildOutcomes
    from fpxbench.targets.matrix import Matrix
    from fpxbench.targets.operations import ProbeSpec

app = new_app()

group = typer.Typer(no_args_is_help=False)
app.add_typer(group, name="targets")

ArchOption = Annotated[list[str] | None,
                       typer.Option("--arch", "-a", help="Architectures, by glob: sm_90, gfx9*. Repeatable.")]
OperationOption = Annotated[list[str] | None, typer.Option(
    "--operation", "-o", help="Probes, by glob: decode, encode/e5m2fnuz, */e4m3fn/*. Repeatable.")]
TritonOption = Annotated[
    list[str] | None,
    typer.Option(
        "--triton",
        "-t",
        help="A release (downloaded once), a folder that contains a Triton, or a Python that has one. Repeatable.  "
        "[dim]default: the installed Triton[/]",
    ),
]
JobsOption = Annotated[int | None,
    typer.Option("--jobs", "-j", min=1, help="Number of parallel compilations.  [dim]default: one per core[/]")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=0.1, help="Time limit for one compilation, in seconds.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Compile everything again.")]

_COLOURS = {Status.OK: "green", Status.UNSUPPORTED: "dim", Status.MISSING: "dim", Status.WRONG: "bold red"}
_MOST_CAUSES = 12


@group.callback(invoke_without_command=True)
def targets(
    context: typer.Context, triton: TritonOption = None, arch: ArchOption = None, operation: OperationOption = None,
    jobs: JobsOption = None, timeout: TimeoutOption = 120.0, fresh: FreshOption = False,
    json: JsonOption = False,
    export: Annotated[Path | None,
        typer.Option("--export", help="Write the matrix to this file (docs/targets.md has the schema).")] = None,
) -> None:
    """Compile low-bit kernels for GPUs that need not be present, and show what each supports.

    Every cell is compiled in its own process. Results are cached: Ctrl-C keeps what is done, and nothing is compiled
    twice.

    Exit status: 0; 1 if no Triton build is usable; 2 for a usage error; 130 after Ctrl-C.
    """
    if context.invoked_subcommand is not None:
        return
    if export is not None and not export.absolute().parent.is_dir():
        raise UsageError(f"--export {export}: the folder {export.parent} does not exist")
    matrix = _asked(triton or [INSTALLED], operation, arch, jobs, timeout, fresh)
    if export is not None:
        matrix.write(export)
    if json:
        print(matrix.to_json(), end="")
    else:
        _print(matrix)
        if export is not None:
            out.print(f"written: {export}", markup=False, style="dim")
    if all(build.unusable for build in matrix.builds):
        raise typer.Exit(1)


@group.command()
def diff(
    before: Annotated[str,
        typer.Argument(help="A build: a version, `installed`, a folder, or a targets.json (its newest build).")],
    after: Annotated[str, typer.Argument(help="The build to compare with it.")],
    arch: ArchOption = None, operation: OperationOption = None, jobs: JobsOption = None, timeout: TimeoutOption = 120.0,
    fresh: FreshOption = False, json: JsonOption = False,
    matrix: Annotated[Path | None,
        typer.Option("--matrix", help="Look both versions up in this targets.json instead of compiling.")] = None,
    ask: Annotated[bool, typer.Option("--ask",
        help="Compile with both builds even if the matrix that ships with fpxbench has them.")] = False,
) -> None:
    """List what one Triton build supports and another does not.

    Releases in the matrix that ships with fpxbench are looked up there. Others are downloaded, to compile the cells.

    Exit status: 0; 1 if something that was ok no longer is; 2 for a usage error; 130 after Ctrl-C.
    """
    from fpxbench.reports.targets.support_table import SHIPPED
    from fpxbench.targets.build_diff import changes, compared
    from fpxbench.targets.matrix import read_matrix

    given = read_matrix(matrix) if matrix is not None else None
    if given is None and not (ask or fresh) and _has(shipped := read_matrix(SHIPPED), (before, after), operation, arch):
        given = shipped
        err.print("from the matrix that ships with fpxbench; --ask compiles with both builds here", style="dim")
    (old, at), (new, there) = (_build(name, given, operation, arch, jobs, timeout, fresh) for name in (before, after))
    wanted = _wanted(operation, arch)
    cells = compared(old, at, new, there, wanted)
    if not cells:
        raise UsageError(f"Triton {old.builds[at].triton} and {new.builds[there].triton} have none of the selected"
                         " cells in common: nothing was compared")
    found = changes(old, at, new, there, wanted)
    if json:
        import json as writer

        print(writer.dumps([{
            "change": change.verdict, "operation": change.operation, "format": change.format,
            "before": change.before.model_dump(mode="json"), "after": change.after.model_dump(mode="json"),
            "cells": [{"probe": probe, "architecture": architecture} for probe, architecture in change.cells],
        } for change in found], indent=1))
    else:
        out.print(f"Triton {old.builds[at].triton} -> {new.builds[there].triton}, {cells} cells compared",
                  markup=False, style="bold")
        for verdict, colour in (("lost", "red"), ("gained", "green"), ("other", "dim")):
            some = [change for change in found if change.verdict == verdict]
            out.print(f"{verdict}: {sum(len(change.cells) for change in some)} cells", style=colour)
            for change in some:
                out.print(f"  {change}", markup=False)
    if any(change.verdict == "lost" for change in found):
        raise typer.Exit(1)


@group.command()
def repro(
    probe: Annotated[str, typer.Argument(help="A probe as in targets.json: encode/e5m2fnuz/fp16-rtne.")],
    architecture: Annotated[str, typer.Argument(help="For example sm_90 or gfx942.")],
    triton: Annotated[str, typer.Option("--triton", "-t", help="The Triton version that the script installs.")] = "",
) -> None:
    """Print a script for a bug report that compiles one cell and needs only Triton.

    It begins with the verdict in the matrix that ships with fpxbench and, for a miscompiled cell, the wrong codes.
    """
    from fpxbench.reports.targets.support_table import SHIPPED
    from fpxbench.targets.matrix import read_matrix
    from fpxbench.targets.reproduction import newest_failure, script

    architectures = _architectures([architecture])
    if len(architectures) != 1:
        raise UsageError(f"{architecture!r} is {len(architectures)} architectures; name one, as in"
                         f" {architectures[0].name}")
    arch, probes = architectures[0], _probes([probe])
    if len(probes) != 1:
        raise UsageError(f"{probe!r} is {len(probes)} probes; name one, as in {probes[0].id}")
    version, found = newest_failure(read_matrix(SHIPPED), probes[0].id, arch.name,
                                    normal_name(triton) if triton else "")
    print(script(probes[0], arch, triton or version, found), end="")


def _asked(builds: list[str], operation: list[str] | None, arch: list[str] | None, jobs: int | None, timeout: float,
           fresh: bool) -> Matrix:
    from fpxbench.targets.collection import assemble, evaluate_builds

    probes, architectures = _probes(operation), _architectures(arch)
    with _progress() as progress:
        results: list[BuildOutcomes] = evaluate_builds(list(dict.fromkeys(map(normal_name, builds))), probes,
                                                       architectures, jobs=jobs, timeout_s=timeout, fresh=fresh,
                                           notify=lambda text: err.print(f"fpxbench: {text}", markup=False),
                                           progress=progress)
    return assemble(results, probes, architectures)


def _probes(operation: list[str] | None) -> list[ProbeSpec]:
    from fpxbench.targets.operations import probes_like

    try:
        return probes_like(operation or [])
    except ModuleNotFoundError as error:    # raised by listing the suite's own kernels
        if error.name not in ("torch", "triton"):
            raise
        raise UsageError(f"the probes of triton_fused need {error.name}, which is not installed: exclude them with "
                         "--operation") from None


def _architectures(arch: list[str] | None) -> list:
    from fpxbench.targets.architectures import architectures_like

    return architectures_like(arch or [])


def _build(
    name: str, given: Matrix | None, operation: list[str] | None, arch: list[str] | None, jobs: int | None,
    timeout: float, fresh: bool
) -> tuple[Matrix, int]:
    """Return a matrix (`given`, unless it is None) and the position of the named build in it."""
    from fpxbench.targets.matrix import read_matrix

    if name.endswith(".json"):
        matrix = read_matrix(Path(name))
        position = max((at for at, build in enumerate(matrix.builds) if not build.unusable), default=None)
        if position is None:
            raise UsageError(f"{name} has no usable build")
        return matrix, position
    if given is not None:
        versions = [build.triton for build in given.builds]
        if normal_name(name) not in versions:
            raise UsageError(f"the matrix has no Triton {name}: it has {', '.join(versions)}")
        position = versions.index(normal_name(name))
        if given.builds[position].unusable:
            raise UsageError(f"Triton {name} was unusable: {given.builds[position].unusable}")
        return given, position
    matrix = _asked([name], operation, arch, jobs, timeout, fresh)
    if matrix.builds[0].unusable:
        raise UsageError(matrix.builds[0].unusable)
    return matrix, 0


def _has(matrix: Matrix, names: tuple[str, str], operation: list[str] | None, arch: list[str] | None) -> bool:
    """Return whether a matrix has both builds with every selected probe and architecture."""
    architectures, probes = {architecture.name for architecture in matrix.architectures}, {probe.id
                                                                                           for probe in matrix.probes}
    return ({normal_name(name) for name in names} <= {build.triton for build in matrix.builds if not build.unusable}
            and {architecture.name for architecture in _architectures(arch)} <= architectures
            and (not operation or {spec.id for spec in _probes(operation)} <= probes))


def _wanted(operation: list[str] | None, arch: list[str] | None) -> Callable[[str, str], bool]:
    """Return whether a cell is among the selected probes and architectures."""
    probes = {spec.id for spec in _probes(operation)} if operation else None
    names = {architecture.name for architecture in _architectures(arch)}
    return lambda probe, architecture: (probes is None or probe in probes) and architecture in names


@contextmanager
def _progress() -> Iterator:
    """Show a bar per build on a terminal, and a line every ten seconds elsewhere."""
    import time

    bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("left"),
                   TimeRemainingColumn(), console=err, disable=not err.is_terminal, transient=True)
    tasks: dict[str, TaskID] = {}
    shown = {"next": time.monotonic() + 10}

    def update(build: str, done: int, total: int) -> None:
        if build not in tasks:
            tasks[build] = bar.add_task(f"Triton {escape(build)}", total=total)
        bar.update(tasks[build], completed=done)
        if not err.is_terminal and time.monotonic() >= shown["next"]:
            shown["next"] = time.monotonic() + 10
            err.print(f"[{done}/{total}] Triton {build}", markup=False)

    with bar:
        yield update


def _print(matrix: Matrix) -> None:
    from fpxbench.records.verdict import SIGNS
    from fpxbench.targets.version_spans import SOME, UNCHECKED, causes, checked_cells, history_signs, rows, spans

    table = new_table("operation", "format", *(gpu.name for gpu in matrix.architectures), no_wrap=True)
    last = ""
    for operation, fmt, probes in rows(matrix):
        cells = []
        for architecture in matrix.architectures:
            history = spans(matrix, probes, architecture.name)
            colour = _COLOURS.get(history[-1].state.status, "red") if history else "dim"
            cells.append(f"[{colour}]{escape(history_signs(history))}[/]" if history else "")
        table.add_row("" if operation == last else operation, fmt, *cells)
        last = operation
    # As wide as it is: a terminal that is narrower wraps lines, which loses less than cutting names off.
    print_wide(table)
    signs = {sign: status for status, sign in SIGNS.items()}
    legend = [*reversed(signs.items()), (SOME, "ok for some of the options"),
              (UNCHECKED, "some only compiled, not executed")]
    out.print("   ".join(f"{sign} {status}" for sign, status in legend)
              + ("   a version: since" if len(matrix.builds) > 1 else ""), style="dim", markup=False)
    for position, build in enumerate(matrix.builds):
        if build.unusable:
            out.print(f"Triton {build.triton}: {build.unusable}", style="red", markup=False)
            continue
        linker = f"; AMD's objects linked by a stand-in, {build.linker}" if build.linker not in ("", "built in") else ""
        out.print(f"Triton {build.triton}: {build.cells} cells, {build.seconds:.0f} s of processor time{linker}",
                  style="bold", markup=False)
        checked, compiled = checked_cells(matrix, position)
        out.print(f"  of {compiled} cells that compile, {checked} were executed or compared by instruction; "
                  f"{compiled - checked} only compiled ({UNCHECKED})", markup=False)
        reasons = causes(matrix, position)
        for outcome, count, where in reasons[:_MOST_CAUSES] if len(matrix.builds) == 1 else []:
            kind = f" ({outcome.kind})" if outcome.kind else ""
            by = f", {outcome.signal}" if outcome.signal else ""
            names = ", ".join(name for name, _ in where.most_common(2)) + (" …" if len(where) > 2 else "")
            out.print(f"  {SIGNS[outcome.status]} {count:4d}  {outcome.status}{kind}{by}: {outcome.cause}  [{names}]",
                      markup=False)
        if len(matrix.builds) == 1 and len(reasons) > _MOST_CAUSES:
            out.print(f"  … and {counted(len(reasons) - _MOST_CAUSES, 'more cause')}: --json prints all of "
                      f"them", style="dim")

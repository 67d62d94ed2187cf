"""`fpxbench tensor-check`: what a quantized tensor class can do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fpxbench.cli.common import JsonOption, ResultsOption, StoredAsOption, UsageError, err, new_app, new_table, out
from fpxbench.model.tensor_record import OperationOutcome, OperationResult, TensorOperationRecord
from fpxbench.records.verdict import Status, Verdict

if TYPE_CHECKING:
    from fpxbench.records.record import Build

app = new_app()

_COLOURS = {OperationOutcome.OK: "green", OperationOutcome.PLAIN: "yellow", OperationOutcome.WRONG: "red",
            OperationOutcome.ERROR: "red", OperationOutcome.CRASH: "red"}
_BAD = frozenset({OperationOutcome.WRONG, OperationOutcome.CRASH})
_SHOWN = _BAD | {OperationOutcome.ERROR, OperationOutcome.PLAIN}
TIMEOUT_S = 120.0


@app.command(name="tensor-check")
def tensor_check(
    tensors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLASS",
            help="Names of classes, by glob, or package.module:factory, a function that converts a bf16 tensor [N, K].",
        ),
    ] = None,
    operation: Annotated[
        list[str] | None, typer.Option("--operation", "-o", help="Glob over operations. Repeatable.")
    ] = None,
    results: ResultsOption = Path("results"),
    machine: StoredAsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check quantized tensor classes, operation by operation, against plain tensors.

    Each operation runs in a watched child, so a crash or hang does not affect the others.

    Exit status: 1 if a class gives wrong numbers or crashes.
    """
    from fpxbench.builds.installed import installed_build
    from fpxbench.records.store import Store

    classes, operations = _chosen(tensors or ["*"], operation or ["*"])
    build, store = installed_build(), Store(results, TensorOperationRecord)
    store.make_folder()
    found = []
    for record in _checked(classes, operations, machine, build):
        store.append(record)
        found.append(record.result)
    if as_json:
        print(json.dumps([result.model_dump(mode="json") for result in found]))
    else:
        _print(found, classes, operations)
        out.print(f"records: {store.file(record.machine.name, build)}   next: fpxbench report --results {results}",
                  markup=False, style="dim")
    if any(result.outcome in _BAD for result in found):
        raise typer.Exit(1)


def _chosen(tensors: list[str], operations: list[str]) -> tuple[list[str], list[str]]:
    from fnmatch import fnmatchcase

    from fpxbench.cli.common import call_in_child

    known, listed = call_in_child("fpxbench.model.tensor_check:names").required(
        tuple[list[str], list[str]], "the tensor classes could not be listed")
    classes = []
    for glob in tensors:
        found = [glob] if ":" in glob else [name for name in known if fnmatchcase(name, glob) or name == glob]
        if not found:
            raise UsageError(f"no tensor class {glob!r}: one of {', '.join(known)}, or package.module:factory")
        classes += found
    chosen = [name for name in listed if any(fnmatchcase(name, glob) or name == glob for glob in operations)]
    if not chosen:
        raise UsageError(f"no operation {', '.join(operations)}: one of {', '.join(listed)}")
    return list(dict.fromkeys(classes)), chosen


def _checked(classes: list[str], operations: list[str], machine: str | None,
             build: Build) -> Iterator[TensorOperationRecord]:
    from rich.progress import Progress

    from fpxbench.sweep.isolation import Isolation
    from fpxbench.sweep.run import machine_here
    from fpxbench.sweep.settings import default_memory_limit

    with Isolation(default_memory_limit()) as isolation, Progress(console=err, transient=True) as progress:
        described = machine_here(isolation, "cpu", machine, timed=False)
        task = progress.add_task("", total=len(classes) * len(operations))
        for tensor in classes:
            for name in operations:
                progress.update(task, description=f"{escape(tensor)}: {escape(name)}", advance=1)
                outcome = isolation.call(
                    "fpxbench.model.tensor_check:check", {"tensor": tensor, "operation": name}, timeout_s=TIMEOUT_S
                )
                if outcome.mistake:
                    raise UsageError(outcome.mistake)
                yield TensorOperationRecord(build=build, machine=described, result=(
                    outcome.read(OperationResult) if outcome.value is not None
                    else _died(tensor, name, outcome.failure)))


def _died(tensor: str, operation: str, verdict: Verdict) -> OperationResult:
    outcome = OperationOutcome.CRASH if verdict.status is Status.CRASH else OperationOutcome.ERROR
    return OperationResult(tensor=tensor, operation=operation, message=verdict.summary, outcome=outcome)


def _print(results: list[OperationResult], classes: list[str], operations: list[str]) -> None:
    found = {(result.tensor, result.operation): result for result in results}
    table = new_table("operation", *(str(number) for number, _ in enumerate(classes, 1)), "needed by")
    for name in operations:
        cells = [_sign(found[tensor, name].outcome) for tensor in classes]
        table.add_row(escape(name), *cells, escape(found[classes[0], name].needed_by))
    for number, tensor in enumerate(classes, 1):
        of_class = [found[tensor, name] for name in operations]
        done = sum(result.outcome is OperationOutcome.OK for result in of_class)
        library = f" ({of_class[0].library})" if of_class[0].library else ""
        out.print(f"{number}  {escape(tensor)}{escape(library)}: {done} of {len(operations)}")
    out.print(table)
    out.print("   ".join(f"{outcome.sign} {outcome.meaning}" for outcome in OperationOutcome), markup=False)
    for result in results:
        if result.outcome in _SHOWN:
            out.print(f"{_sign(result.outcome)} {escape(result.tensor)}, {escape(result.operation)}:"
                      f" {escape(result.message or result.outcome.meaning)}")


def _sign(outcome: OperationOutcome) -> str:
    colour = _COLOURS.get(outcome)
    return f"[{colour}]{outcome.sign}[/]" if colour else outcome.sign

"""`fpxbench tensor-check`: what a quantized tensor class can do."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fpxbench.cli.common import JsonOption, UsageError, err, new_app, out

app = new_app()

SIGNS = {
    "ok": "[green]✓[/]",
    "wrong": "[red]✗[/]",
    "plain": "[yellow]≈[/]",
    "refused": "–",
    "error": "[red]![/]",
    "crash": "[red]☠[/]",
    "missing": "?",
}
TIMEOUT_S = 120.0


@app.command(name="tensor-check")
def tensor_check(
    tensors: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CLASS",
            help="Names of classes, by glob, or package.module:factory, which makes a tensor of bf16 values [N, K].",
        ),
    ] = None,
    operation: Annotated[
        list[str] | None, typer.Option("--operation", "-o", help="Glob over operations. Repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check quantized tensor classes, operation by operation, against plain tensors.

    Each operation runs in a watched child: one that crashes or hangs ends no other. Exit status: 1 if a class gives
    wrong numbers or crashes.
    """
    classes, operations = _chosen(tensors or ["*"], operation or ["*"])
    results = _checked(classes, operations)
    if as_json:
        print(json.dumps(results))
    else:
        _print(results, classes, operations)
    if any(result["outcome"] in ("wrong", "crash") for result in results):
        raise typer.Exit(1)


def _chosen(tensors: list[str], operations: list[str]) -> tuple[list[str], list[str]]:
    from fnmatch import fnmatchcase

    from fpxbench.cli.common import call_in_child

    known, listed = call_in_child("fpxbench.model.tensor_check:names").read(tuple[list[str], list[str]])
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


def _checked(classes: list[str], operations: list[str]) -> list[dict[str, Any]]:
    from rich.progress import Progress

    from fpxbench.sweep.isolation import Isolation
    from fpxbench.sweep.settings import default_memory_limit

    results = []
    with Isolation(default_memory_limit()) as isolation, Progress(console=err, transient=True) as progress:
        task = progress.add_task("", total=len(classes) * len(operations))
        for tensor in classes:
            for name in operations:
                progress.update(task, description=f"{escape(tensor)}: {escape(name)}", advance=1)
                outcome = isolation.call(
                    "fpxbench.model.tensor_check:check", {"tensor": tensor, "operation": name}, timeout_s=TIMEOUT_S
                )
                if outcome.mistake:
                    raise UsageError(outcome.mistake)
                if outcome.value is not None:
                    results.append(json.loads(outcome.value))
                    continue
                verdict = outcome.failure
                results.append({"tensor": tensor, "operation": name, "needed_by": "", "message": verdict.summary,
                                "outcome": "crash" if verdict.status == "crash" else "error"})
    return results


def _print(results: list[dict[str, Any]], classes: list[str], operations: list[str]) -> None:
    found = {(result["tensor"], result["operation"]): result for result in results}
    table = Table(box=None, pad_edge=False)
    table.add_column("operation")
    for number, _ in enumerate(classes, 1):
        table.add_column(str(number))
    table.add_column("needed by")
    for name in operations:
        cells = [SIGNS[found[tensor, name]["outcome"]] for tensor in classes]
        table.add_row(escape(name), *cells, escape(found[classes[0], name]["needed_by"]))
    for number, tensor in enumerate(classes, 1):
        done = sum(found[tensor, name]["outcome"] == "ok" for name in operations)
        out.print(f"{number}  {escape(tensor)}: {done} of {len(operations)}")
    out.print(table)
    out.print(
        "✓ right   ✗ other numbers   ≈ right, but plain numbers   – refused   ! raised   ☠ crashed   ? not installed"
    )
    for result in results:
        if result["outcome"] in ("wrong", "crash", "error", "plain"):
            out.print(
                f"{SIGNS[result['outcome']]} {escape(result['tensor'])}, {escape(result['operation'])}:"
                f" {escape(result['message'])}"
            )

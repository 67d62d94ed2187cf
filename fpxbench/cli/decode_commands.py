"""`fpxbench decode`: the speed of each engine's decode, beside a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fpxbench.casts.decode_speed import BUDGET_S, ENGINES, FORMATS, TARGETS, DecodeSpeed, measure_all
from fpxbench.cli.common import (
    DeviceOption,
    JsonOption,
    ResultsOption,
    StoredAsOption,
    UsageError,
    err,
    new_app,
    new_table,
    out,
    print_table,
)
from fpxbench.did_you_mean import did_you_mean
from fpxbench.records.store import Store
from fpxbench.records.verdict import SIGNS, Status
from fpxbench.sweep.settings import Settings

app = new_app()


@app.command()
def decode(
    formats: Annotated[
        list[str] | None, typer.Option("--format", "-f", help="Only this format. Repeatable.")
    ] = None,
    device: DeviceOption = None,
    results: ResultsOption = Path("results"),
    machine: StoredAsOption = None,
    budget: Annotated[
        float, typer.Option("--budget", help="Seconds of timing for each format and dtype.", min=0.01)
    ] = BUDGET_S,
    as_json: JsonOption = False,
) -> None:
    """Time the decode of each format to bf16, fp16 and fp32, beside a copy of as many bytes.

    Compares PyTorch's cast, eager and compiled, Triton's cast, and fpxbench's own decode. Only one that decodes every
    code correctly gets a speed. The report shows the records as a table, with the instructions per weight where the
    targets matrix has them.
    """
    from fpxbench.builds.installed import installed_build
    from fpxbench.sweep.isolation import Isolation
    from fpxbench.sweep.run import machine_here

    for name in formats or ():
        if name not in FORMATS:
            raise UsageError(f"no format {name!r} to decode; {did_you_mean(name, FORMATS, ', '.join(FORMATS))}")
    settings = Settings(device=device, results=results, machine=machine)
    store, chosen = Store(results, DecodeSpeed), tuple(formats or FORMATS)
    measured = []
    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with (Isolation(settings.memory_limit) as isolation,
          Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar):
        found = machine_here(isolation, settings.device, settings.machine, timed=False)
        store.make_folder()
        task = bar.add_task("starting", total=len(chosen) * len(TARGETS))
        for record in measure_all(isolation, installed_build(), found, chosen, found.kind, budget,
                                  starting=lambda name: bar.update(task, description=name)):
            store.append(record)
            measured.append(record)
            bar.advance(task)
    if as_json:
        for record in measured:
            print(record.to_json())
        return
    print_table(_table(measured))
    out.print(f"GB/s: bytes read and written. next: fpxbench report --results {results}", markup=False, style="dim")


def _table(records: list[DecodeSpeed]) -> Table:
    table = new_table("format", "to", ">copy", *(f">{engine}" for engine in ENGINES))
    for record in records:
        cells = []
        for engine in ENGINES:
            one = record.engines[engine]
            shown = f"{one.gb_per_s:.1f}" if one.gb_per_s is not None else f"{SIGNS[one.verdict.status]}"
            cells.append(shown if one.verdict.status in (Status.OK, Status.UNSUPPORTED) else f"[red]{shown}[/]")
        copied = f"{record.copy_gb_per_s:.1f}" if record.copy_gb_per_s is not None else ""
        table.add_row(record.format, record.target, copied, *cells)
    return table

"""`fpxbench codec`: the speed of encoding, decoding and packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fpxbench.casts.codec_speed import COPY, ELEMENTS, OWN, SpeedRow, measure_rows, rows
from fpxbench.cli.common import JsonOption, err, new_app, new_table, out
from fpxbench.sweep.settings import default_memory_limit

app = new_app()

_PEERS = ("ml_dtypes", "gfloat", "torch")


@app.command()
def codec(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Rows, by glob: encode/e4m3fn/*, unpack/planar/6. Repeatable.")
    ] = None,
    elements: Annotated[
        int, typer.Option("--elements", min=1, help="Elements per call, rounded to a multiple of 64 x 4096.")
    ] = ELEMENTS,
    as_json: JsonOption = False,
) -> None:
    """Benchmark encoding, decoding and packing against other libraries.

    Runs on the CPU, interleaved with ml_dtypes, gfloat, PyTorch's casts and a plain copy.
    """
    from fpxbench.sweep.isolation import Isolation

    with Isolation(default_memory_limit()) as isolation:
        asked = rows(only or (), isolation)
        columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("starting", total=len(asked))
            measured = []
            for row in measure_rows(
                asked, isolation, elements, starting=lambda name: bar.update(task, description=name)
            ):
                measured.append(row)
                bar.advance(task)
    if as_json:
        for row in measured:
            print(row.model_dump_json())
        return
    for table in (_encoding(measured), _decoding(measured), _packing(measured)):
        if table.row_count:
            out.print(table)
            out.print()
    for line in _notes(measured):
        out.print(line, markup=False)


def _encoding(measured: Sequence[SpeedRow]) -> Table:
    table = _table("encode", "from", "M/s", "", *(f"x {peer}" for peer in _PEERS))
    for row, name, source in _rows(measured, "encode"):
        table.add_row(name, source, *_speed(row), *(_ratio(row, peer) for peer in _PEERS))
    return table


def _decoding(measured: Sequence[SpeedRow]) -> Table:
    table = _table("decode", "GB/s", "M/s", "", "x copy", *(f"x {peer}" for peer in _PEERS))
    for row, name in _rows(measured, "decode"):
        table.add_row(name, _gb_per_s(row), *_speed(row), *(_ratio(row, peer) for peer in (COPY, *_PEERS)))
    return table


def _packing(measured: Sequence[SpeedRow]) -> Table:
    table = _table("layout", "bits", "", "GB/s", "M/s", "", "x copy")
    for way in ("pack", "unpack"):
        for row, name, bits in _rows(measured, way):
            table.add_row(name, bits, way, _gb_per_s(row), *_speed(row), _ratio(row, COPY))
    return table


def _table(first: str, *columns: str) -> Table:
    return new_table(first, *(column if column == "from" else f">{column}" for column in columns))


def _rows(measured: Sequence[SpeedRow], what: str) -> list[tuple[Any, ...]]:
    return [(row, *row.row.split("/")[1:]) for row in measured if row.row.startswith(f"{what}/")]


def _speed(row: SpeedRow) -> tuple[str, str]:
    if row.died:
        return "[red]died[/]", ""
    own = row.timed[OWN]
    return f"{own.elements_per_s / 1e6:.0f}", f"±{own.spread:.0%}"


def _gb_per_s(row: SpeedRow) -> str:
    return "" if row.died else f"{row.timed[OWN].gb_per_s:.1f}"


def _ratio(row: SpeedRow, other: str) -> str:
    ratio = row.ratio(other)
    return f"{ratio.median:.2f} [dim]±{(ratio.high - ratio.low) / 2 / ratio.median:.0%}[/]" if ratio else "[dim]-[/]"


def _notes(measured: Sequence[SpeedRow]) -> list[str]:
    timed = [row for row in measured if row.timed]
    lines = [f"{row.row}: {row.died}" for row in measured if row.died]
    if timed:
        own = timed[0].timed[OWN]
        lines += [
            f"{own.elements:,} numbers or codes per call, on {timed[0].threads} threads (ml_dtypes, gfloat and the "
            "copy use one). M/s: millions of them per second; GB/s: bytes read and written.",
            "x: speed relative to the other, whose calls were interleaved with these; the copy moves as many bytes. "
            "All are medians over the rounds, ± half the interquartile range.",
        ]
    absent = {peer for row in timed for peer, why in row.missing.items() if why == "is not installed"}
    lines += [f"{peer} is not installed: pip install {peer}" for peer in sorted(absent)]
    return lines

"""How fast encoding, decoding and packing are, beside others: `fpxbench codec`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fpxbench.casts.codec_speed import COPY, ELEMENTS, OWN, Contest, contests, rows
from fpxbench.cli.common import JsonOption, err, new_app, out
from fpxbench.sweep.settings import default_memory_limit

app = new_app()

_PEERS = ("ml_dtypes", "gfloat", "torch")


@app.command()
def codec(
    only: Annotated[list[str] | None, typer.Option("--only", help="Glob over rows: encode/e4m3fn/*, unpack/planar/6. Repeatable.")] = None,
    elements: Annotated[int, typer.Option("--elements", min=1, help="Numbers or codes a call; rounded to whole [64, 4096].")] = ELEMENTS,
    as_json: JsonOption = False,
) -> None:
    """Time encoding, decoding and packing on this machine's CPU, in turn with ml_dtypes, gfloat, torch's casts and a plain copy."""
    from fpxbench.sweep.isolation import Isolation

    with Isolation(default_memory_limit()) as isolation:
        asked = rows(only or (), isolation)
        columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("starting", total=len(asked))
            held = []
            for contest in contests(asked, isolation, elements, starting=lambda row: bar.update(task, description=row)):
                held.append(contest)
                bar.advance(task)
    if as_json:
        for contest in held:
            print(contest.model_dump_json())
        return
    for table in (_encoding(held), _decoding(held), _packing(held)):
        if table.row_count:
            out.print(table)
            out.print()
    for line in _notes(held):
        out.print(line, markup=False)


def _encoding(held: Sequence[Contest]) -> Table:
    table = _table("encode", "from", "M/s", "", *(f"x {peer}" for peer in _PEERS))
    for contest, name, source in _rows(held, "encode"):
        table.add_row(name, source, *_speed(contest), *(_ratio(contest, peer) for peer in _PEERS))
    return table


def _decoding(held: Sequence[Contest]) -> Table:
    table = _table("decode", "GB/s", "M/s", "", "x copy", *(f"x {peer}" for peer in _PEERS))
    for contest, name in _rows(held, "decode"):
        table.add_row(name, _gb_per_s(contest), *_speed(contest), *(_ratio(contest, peer) for peer in (COPY, *_PEERS)))
    return table


def _packing(held: Sequence[Contest]) -> Table:
    table = _table("layout", "bits", "", "GB/s", "M/s", "", "x copy")
    for way in ("pack", "unpack"):
        for contest, name, bits in _rows(held, way):
            table.add_row(name, bits, way, _gb_per_s(contest), *_speed(contest), _ratio(contest, COPY))
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="left" if column == "from" else "right")
    return table


def _rows(held: Sequence[Contest], what: str) -> list[tuple[Contest, ...]]:
    return [(contest, *contest.row.split("/")[1:]) for contest in held if contest.row.startswith(f"{what}/")]


def _speed(contest: Contest) -> tuple[str, str]:
    if contest.died:
        return "[red]died[/]", ""
    own = contest.timed[OWN]
    return f"{own.elements_per_s / 1e6:.0f}", f"±{own.spread:.0%}"


def _gb_per_s(contest: Contest) -> str:
    return "" if contest.died else f"{contest.timed[OWN].gb_per_s:.1f}"


def _ratio(contest: Contest, other: str) -> str:
    ratio = contest.ratio(other)
    return f"{ratio.median:.2f} [dim]±{(ratio.high - ratio.low) / 2 / ratio.median:.0%}[/]" if ratio else "[dim]-[/]"


def _notes(held: Sequence[Contest]) -> list[str]:
    timed = [contest for contest in held if contest.timed]
    lines = [f"{contest.row}: {contest.died}" for contest in held if contest.died]
    if timed:
        own = timed[0].timed[OWN]
        lines += [
            f"{own.elements:,} numbers or codes a call, on {timed[0].threads} threads (ml_dtypes, gfloat and the copy use one). M/s: millions of them"
            " a second; GB/s: bytes read and written.",
            "x: how many times as fast as the other, whose calls took turns with these; the copy moves as many bytes. All are medians over"
            " the rounds, ± half the distance of the quartiles.",
        ]
    absent = {peer for contest in timed for peer, why in contest.missing.items() if why == "is not installed"}
    lines += [f"{peer} is not installed: pip install {peer}" for peer in sorted(absent)]
    return lines

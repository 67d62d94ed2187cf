"""`fpxbench numerics`: whether the casts of PyTorch and Triton conform to the formats."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fpxbench.casts.cast_findings import CastFinding, disagreements, find, overflows
from fpxbench.casts.cast_record import CastRecord
from fpxbench.casts.conversion import Engine
from fpxbench.cli.common import JsonOption, ResultsOption, StoredAsOption, end_run, new_app, new_table, out, statuses
from fpxbench.records.store import Store
from fpxbench.records.verdict import BROKEN, SIGNS, Status
from fpxbench.sweep.settings import Settings

app = new_app()

EngineOption = Annotated[list[Engine] | None, typer.Option(
    "--engine", "-e", help="Only conversions of this engine. Repeatable.")]
ConversionOption = Annotated[list[str] | None, typer.Option(
    "--conversion", "-c", help="Conversions, by glob: cast/fp32/*, */e5m2fnuz/eager/*. Repeatable.")]
DevicesOption = Annotated[str | None, typer.Option(
    "--device", help="cpu or cuda (also for ROCm).  [dim]default: both, if there is a GPU[/]")]
ExhaustiveOption = Annotated[bool, typer.Option(
    "--exhaustive", help="Try all 2**32 inputs for casts from fp32 to FP8, which takes minutes each.")]
FreshOption = Annotated[bool, typer.Option(
    "--fresh/--resume", help="Check every conversion again, or only those without a record.")]
TimeoutOption = Annotated[float, typer.Option(
    "--timeout", help="Time limit for conversions that are compiled together, in seconds.", min=0.1)]
CastOption = Annotated[str | None, typer.Option(
    "--cast", metavar="MODULE:FUNCTION", help="Check your own cast instead: a function of a tensor [n] that"
    " returns the codes of --to. Nothing is recorded, and the exit status is 1 if it is wrong.")]
FromOption = Annotated[str, typer.Option("--from", help="With --cast: the dtype of its input, fp32, bf16 or fp16.")]
ToOption = Annotated[str, typer.Option("--to", help="With --cast: the format of its codes, e4m3fn, e3m2, e2m1, …")]
FailOnOption = Annotated[str, typer.Option(
    "--fail-on", help="Exit with status 1 if a conversion has one of these statuses: wrong,crash,…")]


@app.command()
def numerics(
    engine: EngineOption = None,
    conversion: ConversionOption = None,
    device: DevicesOption = None,
    exhaustive: ExhaustiveOption = False,
    results: ResultsOption = Path("results"),
    machine: StoredAsOption = None,
    fresh: FreshOption = False,
    timeout: TimeoutOption = 180.0,
    as_json: JsonOption = False,
    fail_on: FailOnOption = "",
    cast: CastOption = None,
    source: FromOption = "bf16",
    target: ToOption = "e4m3fn",
) -> None:
    """Check the casts of PyTorch and Triton against the definition of each format.

    Covers casts between FP8 and wider dtypes in eager PyTorch, under torch.compile and in Triton, the constants of
    torch.finfo, and bit operations on uint16, uint32 and uint64. A 16-bit source is tried on all 65,536 inputs, a wider
    one on every value, every midpoint and their neighbours. docs/numerics.md has the rules.

    Exit status: 0; 1 if --fail-on applies; 2 for a usage error; 130 after Ctrl-C.
    """
    from fpxbench.casts.cast_run import run_casts
    from fpxbench.casts.own_cast import check_own_cast

    failing = statuses(fail_on)
    settings = Settings(device=device, results=results, machine=machine, fresh=fresh, timeout_s=timeout)
    if cast is not None:
        record = check_own_cast(settings, cast, source, target)
        if as_json:
            print(record.to_json())
        else:
            _print_own(cast, record)
        raise typer.Exit(record.verdict.status is not Status.OK)
    run = run_casts(settings, tuple(engine or ()), tuple(conversion or ()), exhaustive=exhaustive)
    if as_json:
        print(json.dumps([json.loads(record.to_json()) for record in run.records]))
    else:
        _print_findings(run.records)
    end_run(Store(results, CastRecord).file(run.machine.name, run.build), results,
            [record.verdict.status for record in run.records], failing, run.interrupted, quiet=as_json)


def _print_own(function: str, record: CastRecord) -> None:
    verdict = record.verdict
    out.print(f"{SIGNS[verdict.status]} {escape(function)}  {record.conversion.source} to {record.conversion.target}:"
              f" {escape(verdict.headline)}  {escape(verdict.summary)}", soft_wrap=True)
    for difference in record.differences:
        one = difference.examples[0]
        out.print(f"    {difference.kind}: {difference.count:,} inputs{' (permitted)' if difference.permitted else ''},"
                  f" e.g. {one.input} ({one.input_value}) gives {one.got} ({one.got_value}),"
                  f" not {one.expected} ({one.expected_value})", markup=False, soft_wrap=True)


def _print_findings(records: list[CastRecord]) -> None:
    for finding in find(records):
        _print_finding(finding)
    for disagreement in disagreements(records):
        out.print("[yellow]≠ engines disagree[/]  ", escape(disagreement.message), sep="")
    _print_conforming(records)
    _print_overflows(records)


def _print_finding(finding: CastFinding) -> None:
    colour = "red" if finding.status in BROKEN else "dim"
    out.print(
        f"[{colour}]{escape(finding.headline)}[/]  [bold]{escape(finding.what)}[/]  "
        f"[dim]{', '.join(finding.runs_on)}[/]"
    )
    detail = ": ".join(part for part in (finding.cause, finding.counts) if part)
    for line in (detail, finding.example):
        if line:
            out.print(f"    {line}", markup=False)


def _print_conforming(records: list[CastRecord]) -> None:
    """Print how many conversions of each engine there are, by status."""
    by_engine: dict[str, Counter[Status]] = {}
    for record in records:
        by_engine.setdefault(record.conversion.runs_on, Counter())[record.verdict.status] += 1
    present = [status for status in reversed(Status) if any(counts[status] for counts in by_engine.values())]
    table = new_table("", *(f">{SIGNS[status]} {status}" for status in present), title="conversions")
    for name, counts in by_engine.items():
        table.add_row(name, *(str(counts[status] or "") for status in present))
    out.print(table)


def _print_overflows(records: list[CastRecord]) -> None:
    found = overflows(records)
    if not found:
        return
    table = new_table("target", "become", "in", title="what values past the maximum become")
    for target, ways in found.items():
        for how, who in ways.items():
            table.add_row(escape(target), escape(how), escape(", ".join(who)))
    out.print(table)

"""`fpxbench report`, `records`, `show` and `repro`: read what was recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fpxbench.cli.common import (
    JsonOption,
    MachineJobsOption,
    ResultsOption,
    UsageError,
    err,
    new_app,
    out,
    results_folder,
)
from fpxbench.did_you_mean import did_you_mean
from fpxbench.records.case import split_id
from fpxbench.records.record import Record
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import SIGNS

app = new_app()


WORST_PRINTED = 3


@app.command()
def report(
    results: ResultsOption = Path("results"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the report to.")] = Path("report"),
    timeline: Annotated[
        Path, typer.Option("--timeline", help="Folder of the timeline, which has the dates of the builds.")
    ] = Path(".timeline"),
    builds: Annotated[
        int, typer.Option("--builds", min=1, help="Number of newest builds per machine that get a page for every case.")
    ] = 10,
    jobs: MachineJobsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """Build a static HTML report from the records and print the worst findings.

    The report opens from file://, without a server.
    """
    from fpxbench.builds.timeline import Timeline
    from fpxbench.reports.site import build_site
    from fpxbench.reports.sweep.problems import Section

    with err.status("conversions") as progress:
        summary = build_site(
            results_folder(results), output, Timeline(timeline), builds, lambda line: progress.update(escape(line)),
            jobs)
    if as_json:
        print(json.dumps({
            "index": str(summary.index.resolve()),
            "empty": summary.empty,
            "choices": summary.choices,
            "findings": [problem.message for problem in summary.problems],
            "broken_lines": [str(line) for line in summary.broken_lines],
            "troubles": summary.troubles,
        }))
        return
    for line in (*summary.broken_lines, *summary.troubles):
        err.print(str(line), markup=False, style="yellow")
    shown = summary.problems[:WORST_PRINTED]
    wrong = sum(problem.section is Section.WRONG for problem in shown)
    messages = [f"{number}. {problem.message}" for number, problem in enumerate(shown, 1)]
    for message in (*messages[:wrong], *summary.choices, *messages[wrong:]):    # as on the first page
        out.print(message, markup=False)
    if summary.empty:
        out.print(f"no records in {results}: run `fpxbench run --results {results}` first", markup=False)
    elif not summary.problems:
        out.print("no problems found")
    out.print(f"report: {summary.index.resolve().as_uri()}", markup=False, style="bold")


@app.command()
def records(
    results: ResultsOption = Path("results"),
    newest: Annotated[
        bool, typer.Option("--latest", help="Only the latest record of each case, build and machine.")
    ] = False,
) -> None:
    """Print the records, one JSON object per line.

    Lines that cannot be read are reported on stderr.
    """
    store = Store(results_folder(results))
    for path in store.files():
        read, broken = store.read(path)
        for line in broken:
            err.print(str(line), markup=False, style="yellow")
        for record in latest(read) if newest else read:
            print(record.to_json())


@app.command()
def show(
    case: Annotated[str, typer.Argument(help="Case id, as printed by `fpxbench list cases`.")],
    results: ResultsOption = Path("results"),
    as_json: JsonOption = False,
) -> None:
    """Show everything that is recorded about one case.

    Verdict, evidence, accuracy, timing, traffic and log, for each build and machine.
    """
    found = _records_of(case, results)
    for record in found:
        if as_json:
            print(record.to_json())
        else:
            _print_record(record)


@app.command()
def repro(
    case: Annotated[str, typer.Argument(help="Case id, as printed by `fpxbench list cases`.")],
    results: ResultsOption = Path("results"),
) -> None:
    """Print a standalone script that reproduces one case.

    fpxbench repro CASE > repro.py && python repro.py
    """
    from fpxbench.sweep.repro_script import repro_script

    print(repro_script(_records_of(case, results)[-1]))


def _records_of(case: str, results: Path) -> list[Record]:
    split_id(case)
    read, broken = Store(results_folder(results)).read_all()
    for line in broken:
        err.print(str(line), markup=False, style="yellow")
    found = [record for record in latest(read) if record.case.id == case]
    if not found:
        hint = did_you_mean(case, {record.case.id for record in read}, f"nothing like it is in {results}")
        raise UsageError(f"no record of {case!r}; {hint}")
    return found


def _print_record(record: Record) -> None:
    from fpxbench.reports.formatting import number, pretty, times

    verdict = record.verdict
    table = Table(box=None, show_header=False, pad_edge=False, title=escape(record.case.id), title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        if value not in (None, "", [], {}):
            table.add_row(name, escape(str(value)))

    row("verdict", f"{SIGNS[verdict.status]} {verdict.headline}")
    row("summary", verdict.summary)
    row("signal", verdict.signal)
    row("exit code", verdict.exit_code)
    for name, value in verdict.evidence.items():
        row(f"  {name}", pretty(value))
    row("shape", record.case.shape)
    row("machine", f"{record.machine.name} ({record.machine.device}, {record.machine.arch})")
    row("build", f"torch {record.build.torch}, triton {record.build.triton or 'none'}")
    accuracy, timing, traffic = record.accuracy, record.timing, record.traffic
    if accuracy.relative_error is not None:
        row(
            "relative error",
            f"{number(accuracy.relative_error)} (bound {number(accuracy.bound)}); "
            f"worst {number(accuracy.worst_ulp)} ulp",
        )
    row("SQNR", f"{accuracy.sqnr_db:.2f} dB" if accuracy.sqnr_db is not None else None)
    if timing is not None:
        low, high = timing.ci95_us
        row(
            "time",
            f"{number(timing.median_us)} us [{number(low)}, {number(high)}], dense {number(timing.baseline_us)} us: "
            f"{times(timing.speedup)}",
        )
    row("no timing", record.no_timing)
    if traffic.gb_per_s is not None:
        share = (
            f", {traffic.roofline_fraction:.0%} of this machine's read bandwidth"
            if traffic.roofline_fraction is not None
            else ""
        )
        row("bandwidth", f"{traffic.gb_per_s:.1f} GB/s{share}")
    row("kernels", traffic.kernels_launched)
    row("bottleneck", traffic.bottleneck)
    row("flags", ", ".join(record.flags))
    row("seed", record.seed)
    out.print(table)
    if verdict.log_tail:
        out.print("log:", style="bold")
        out.print(verdict.log_tail, markup=False)

"""`fpxbench run`: check and time cases."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fpxbench.cli.common import (
    CaseTimeoutOption,
    DeviceOption,
    ImplementationOption,
    ImplsOption,
    ProfileOption,
    ResultsOption,
    SchemeOption,
    StoredAsOption,
    TimingOption,
    TpOption,
    UsageError,
    WorkloadOption,
    end_run,
    err,
    new_app,
    new_table,
    out,
    print_table,
    ranks,
    statuses,
)
from fpxbench.counted import counted
from fpxbench.records.record import Record
from fpxbench.records.store import Store
from fpxbench.records.verdict import BROKEN, SEVERITY, SIGNS, Status
from fpxbench.sweep.settings import Settings, default_memory_limit

app = new_app()

CasesOption = Annotated[Path | None, typer.Option(
    "--cases", help="Run the cases in this file, one JSON object per line as in a record, instead of a profile.")]
CheckpointOption = Annotated[Path | None, typer.Option(
    "--checkpoint", help="Measure the layers of this checkpoint, safetensors or GGUF, with its own codes and scales.")]
LayerOption = Annotated[list[str] | None, typer.Option(
    "--layer", help="Layers of --checkpoint, by glob.  [dim]default: one of each scheme and shape[/]")]
WeightsOption = Annotated[str | None, typer.Option(
    "--weights", metavar="FILE[:NAME]", help="Quantize and measure these weights, [N, K] each.")]
ActivationsOption = Annotated[str | None, typer.Option(
    "--activations", metavar="FILE[:NAME]", help="Multiply rows of this tensor [..., K].")]
FreshOption = Annotated[bool, typer.Option(
    "--fresh/--resume", help="Measure every case again, or only those without a record.")]
JobsOption = Annotated[int | None, typer.Option(
    "--jobs", "-j", min=1, help="Prepare this many cases at once; they are timed one by one.  "
                                "[dim]default: one per core, as far as memory goes[/]")]
ReportOption = Annotated[Path | None, typer.Option(
    "--report", help="Build the report in this folder within a minute, rebuild it as records arrive, and once more at"
                     " the end.")]
MemoryLimitOption = Annotated[str | None, typer.Option(
    "--memory-limit", help="Memory limit for one case: 8GiB, 500MB.  [dim]default: 3/4 of the machine's memory[/]")]
SeedOption = Annotated[int | None, typer.Option(
    "--seed", help="Seed of the random inputs.  [dim]default: a new one for each case, stored in its record[/]")]
TuneOption = Annotated[bool, typer.Option(
    "--tune", help="Let implementations tune their tiles at the first call of each shape, and remember the fastest.")]
FailOnOption = Annotated[str, typer.Option(
    "--fail-on", help="Exit with status 1 if a case has one of these statuses: wrong,crash,…")]


@app.command()
def run(
    profile: ProfileOption = "quick",
    implementation: ImplementationOption = None,
    scheme: SchemeOption = None,
    workload: WorkloadOption = None,
    tp: TpOption = "",
    cases: CasesOption = None,
    checkpoint: CheckpointOption = None,
    layer: LayerOption = None,
    weights: WeightsOption = None,
    activations: ActivationsOption = None,
    device: DeviceOption = None,
    impls: ImplsOption = None,
    results: ResultsOption = Path("results"),
    machine: StoredAsOption = None,
    fresh: FreshOption = False,
    jobs: JobsOption = None,
    report: ReportOption = None,
    timeout: CaseTimeoutOption = 180.0,
    memory_limit: MemoryLimitOption = None,
    seed: SeedOption = None,
    timing: TimingOption = True,
    tune: TuneOption = False,
    fail_on: FailOnOption = "",
) -> None:
    """Check and time cases. Write one record for each.

    A case that is wrong is not timed. A sweep that was interrupted resumes where it stopped.

    Exit status: 0; 1 if --fail-on applies; 2 for a usage error; 130 after Ctrl-C, with everything measured so far kept.
    """
    from fpxbench.checking.tuning import TUNE_VARIABLE
    from fpxbench.sweep.run import main_sweep

    failing = statuses(fail_on)
    if tune:
        os.environ[TUNE_VARIABLE] = "1"     # the children inherit it
    settings = Settings(profile=profile, implementation=tuple(implementation or ()), scheme=tuple(scheme or ()),
                        workload=tuple(workload or ()), tp=ranks(tp), cases=cases,
                        checkpoint=checkpoint, layer=tuple(layer or ()), weights=weights, activations=activations,
                        device=device, impls=tuple(impls or ()), results=results, machine=machine, fresh=fresh,
                        jobs=jobs, report=report, timeout_s=timeout, seed=seed,
                        memory_limit=_bytes(memory_limit) if memory_limit else default_memory_limit(),
                        timing_budget_s=Settings.model_fields["timing_budget_s"].default if timing else 0.0)
    sweep = main_sweep(settings)
    _print_matrix(sweep.records)
    for line in _worst(sweep.records, 3):
        out.print(line)
    if cases is not None and (missing := _missing(sweep.records)):
        out.print(missing, markup=False, style="yellow")
    if took := sweep.duration_message():
        out.print(took, markup=False, style="dim")
    if report is not None and not sweep.interrupted:
        _build_report(results, report)
    end_run(Store(results).file(sweep.machine.name, sweep.build), results,
            [record.verdict.status for record in sweep.records], failing, sweep.interrupted)


def _build_report(results: Path, folder: Path) -> None:
    """Build the report with the sweep's last records, as `fpxbench report` does with its defaults."""
    from fpxbench.builds.timeline import Timeline
    from fpxbench.reports.site import build_site

    with err.status("the report"):
        summary = build_site(results, folder, Timeline(Path(".timeline")))
    out.print(f"report: {summary.index.resolve().as_uri()}", markup=False, style="bold")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory-limit {text!r}: a number of bytes, as in 8GiB or 500MB")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _worst(records: list[Record], count: int) -> list[str]:
    broken = sorted((r for r in records if r.verdict.status in BROKEN), key=lambda r: SEVERITY[r.verdict.status])
    lines = [
        f"[red]{SIGNS[r.verdict.status]} {escape(r.case.id)}[/]: {escape(r.verdict.headline)}: "
        f"{escape(r.verdict.summary)}"
        for r in broken[:count]
    ]
    if len(broken) > count:
        lines.append(f"[red]… and {counted(len(broken) - count, 'more broken case')}[/]")
    return lines


def _missing(records: list[Record]) -> str:
    """Return a line for each dependency that cases of a shared list lack on this machine."""
    reasons = Counter(record.verdict.summary for record in records if record.verdict.status is Status.MISSING)
    return "".join(
        f"{SIGNS[Status.MISSING]} not run: {counted(count, 'case')}: {why}\n" for why, count in reasons.items()
    ).rstrip()


def _print_matrix(records: list[Record]) -> None:
    """Print implementations × schemes: the worst verdict of each, and its range of speedups over dense. Schemes of
    which nothing ran are counted only."""
    implementations = list(dict.fromkeys(record.case.implementation for record in records))
    not_run = (Status.UNSUPPORTED, Status.MISSING)
    ran = {record.case.scheme for record in records if record.verdict.status not in not_run}
    every = list(dict.fromkeys(record.case.scheme for record in records))
    schemes = [scheme for scheme in every if scheme in ran]
    table = new_table("scheme", *(f">{name}" for name in implementations),
                      title="worst verdict, and speedup over the dense 16-bit matmul")
    for scheme in schemes:
        row = [scheme]
        for name in implementations:
            cell = [r for r in records if r.case.scheme == scheme and r.case.implementation == name]
            row.append(_cell(cell))
        table.add_row(*row)
    if schemes:
        print_table(table)
    if left_out := len(every) - len(schemes):
        out.print(f"{counted(left_out, 'scheme')} without a case that ran {'is' if left_out == 1 else 'are'} left out",
                  style="dim")


def _cell(records: list[Record]) -> str:
    if not records:
        return ""
    worst = min(records, key=lambda r: SEVERITY[r.verdict.status]).verdict.status
    if worst in BROKEN:
        return f"[red]{SIGNS[worst]} {worst}[/]"
    if worst is not Status.OK:
        return f"[dim]{SIGNS[worst]}[/]"
    speedups = sorted(r.timing.speedup for r in records if r.timing and r.timing.speedup)
    return f"[green]{SIGNS[worst]}[/]" + (
        f" {speedups[0]:.2f}–{speedups[-1]:.2f}×" if len(speedups) > 1 else f" {speedups[0]:.2f}×" if speedups else ""
    )

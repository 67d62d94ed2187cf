"""`fpxbench regressions` and `detector`: what changed from build to build, and how reliable the rule is that finds
it."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fpxbench.cli.common import (
    JsonOption,
    MachineJobsOption,
    ResultsOption,
    UsageError,
    err,
    new_app,
    new_table,
    out,
    results_folder,
)
from fpxbench.counted import counted

app = new_app()

_SHOWN = 40


class Fail(StrEnum):
    """Values of `--fail-on`. Only changes for the worse count."""

    SUSPECT = "suspect"
    CONFIRMED = "confirmed"
    VERDICT = "verdict"
    FIGURE = "figure"


@app.command()
def regressions(
    results: ResultsOption = Path("results"),
    machine: Annotated[str | None, typer.Option("--machine", help="Only series of this machine.")] = None,
    timeline: Annotated[
        Path, typer.Option("--timeline", help="Folder of the timeline, which has the dates of the builds.")
    ] = Path(".timeline"),
    everything: Annotated[
        bool, typer.Option("--all", help="Include changes of older builds, and those that are over or refuted.")
    ] = False,
    fail_on: Annotated[
        str,
        typer.Option("--fail-on", help="Exit with status 1 if there is one of these: suspect,confirmed,verdict,figure"),
    ] = "",
    jobs: MachineJobsOption = 1,
    as_json: JsonOption = False,
) -> None:
    """List what changed from build to build, worst first.

    Shows the suspected regressions that are open and what changed with the newest builds. docs/decision-rule.md defines
    the rule.

    Exit status: 0; 1 if --fail-on applies; 2 for a usage error.
    """
    from fpxbench.builds.timeline import Timeline
    from fpxbench.regressions.result_changes import find_changes

    failing = _fail_on(fail_on)
    found = find_changes(results_folder(results), Timeline(timeline), machine, jobs)
    shown = found if everything else found.of_newest_builds()
    for trouble in found.troubles:
        err.print(trouble, markup=False, style="yellow")
    if as_json:
        print(
            json.dumps(
                {
                    **{
                        name: [one.model_dump(mode="json", by_alias=True) for one in getattr(shown, name)]
                        for name in ("suspects", "events", "machine")
                    },
                    "troubles": found.troubles,
                }
            )
        )
    else:
        _print(shown, everything)
    if failing & _failures(found.of_newest_builds()):
        raise typer.Exit(1)


def _fail_on(text: str) -> frozenset[Fail]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in list(Fail):
            raise UsageError(f"--fail-on {name!r}: choose from {', '.join(Fail)}")
    return frozenset(map(Fail, names))


def _failures(found) -> frozenset[Fail]:
    from fpxbench.regressions.change_report import Direction
    from fpxbench.regressions.confirmation import ConfirmationOutcome

    worse = [finding for finding in (*found.suspects, *found.events)
             if finding.direction is Direction.WORSE and finding.stands]
    kinds = {Fail.CONFIRMED for finding in worse if finding.outcome is ConfirmationOutcome.CONFIRMED}
    metrics = {finding.series.metric for finding in worse}
    from_metric = {"verdict": Fail.VERDICT, "median_us": Fail.SUSPECT}
    return frozenset(kinds | {from_metric.get(metric, Fail.FIGURE) for metric in metrics})


def _print(found, everything: bool) -> None:
    from fpxbench.regressions.decision_rule import LEAST_FREEDOM

    for suspect in found.suspects[:_SHOWN]:
        low, high = (f"{100 * end:+z.1f}" for end in suspect.interval)
        series = suspect.series
        control = "" if suspect.control is None else f", dense {suspect.control:+z.1%}"
        out.print(
            f"{suspect.change:+z.1%} [{low}, {high}] time  {series.case}",
            markup=False,
            style="red" if suspect.change > 0 else "green",
        )
        out.print(
            f"    {_where(series)}, since {suspect.first_bad_tag} (before it: {suspect.last_good_tag}), seen in "
            f"{counted(suspect.builds_after, 'build')}; {abs(suspect.z):.1f} standard "
            f"errors{control}{_source(suspect)}",
            markup=False,
        )
        out.print(f"    {_next(suspect)}", markup=False, style="dim")
    for event in found.events[:_SHOWN]:
        times = counted(event.changes_before, "time")
        again = f"; it changed {times} in the builds before" if event.changes_before else ""
        words = event.series.metric.replace("_", " ")
        out.print(
            f"{words}  {event.series.case}",
            markup=False,
            style={"worse": "red", "better": "green"}.get(event.direction, "yellow"),
        )
        out.print(f"    {event.before}  ->  {event.after}", markup=False)
        out.print(
            f"    {_where(event.series)}, since {event.first_bad_tag} (before it: "
            f"{event.last_good_tag}){again}{_source(event)}",
            markup=False,
        )
        out.print(f"    {_next(event)}", markup=False, style="dim")
    for move in found.machine[:_SHOWN]:
        out.print(
            f"{move.change:+z.1%} in {counted(move.cases, 'case')}, and dense {move.control:+z.1%} in the same runs: "
            f"{move.machine}, or PyTorch's dense product, since {move.first_tag}",
            markup=False,
            style="yellow",
        )
    hidden = sum(max(0, len(found_of) - _SHOWN) for found_of in (found.suspects, found.events, found.machine))
    if hidden:
        out.print(f"… and {hidden} more: --json prints all of them", style="dim")
    if found.builds < 2:
        out.print("nothing to compare: no machine has records of two builds of one channel and variant")
    elif not (found.suspects or found.events or found.machine):
        out.print("nothing changed" if everything
                  else "nothing changed with the newest builds, and no suspected regression is open")
    if 2 <= found.builds <= LEAST_FREEDOM:
        out.print(f"times were not compared: that takes {LEAST_FREEDOM + 1} builds, and the longest series has "
                  f"{found.builds}; `fpxbench compare` shows two builds", style="dim")


def _where(series) -> str:
    return f"{series.machine} ({series.device}), {series.channel} {series.variant}"


def _source(finding) -> str:
    return "; the implementation's own source changed too" if finding.implementation_changed else ""


def _next(finding) -> str:
    if finding.message:
        return finding.message
    return f"confirm with: fpxbench confirm {finding.id}"


@app.command()
def detector(
    series: Annotated[
        int, typer.Option("--series", min=10, help="Number of synthetic series of each kind. 1000 take minutes.")
    ] = 200,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Seed of the series.  [dim]default: the one used for docs/decision-rule.md[/]"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", help="Detectors to evaluate: rule, rule + confirmation, z-score, asv, Otava. Repeatable."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Number of processes.  [dim]default: one per core[/]")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the regression detector on synthetic and recorded series.

    Compares it with a plain z-score, asv's own step detection and, if installed, Apache Otava.
    """
    from fpxbench.regressions.evaluation import SEED, available, evaluation_runs, result_as_json

    here = available()
    for name in only or ():
        if name not in here:
            raise UsageError(f"--only {name!r}: choose from {', '.join(here)}" + (
                "; `pip install --no-deps apache-otava` adds Otava" if name == "Otava" else ""))
    asked = evaluation_runs(series, list(only or here), SEED if seed is None else seed)
    columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    results = {}
    with (Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar,
          ProcessPoolExecutor(jobs or os.cpu_count()) as pool):
        task = bar.add_task("runs", total=len(asked))
        futures = {pool.submit(one.run): one for one in asked}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                bar.advance(task)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    ordered = [results[one] for one in asked]
    if as_json:
        for result in ordered:
            print(json.dumps(result_as_json(result)))
        return
    _print_evaluation(ordered, series)
    if "Otava" not in here:
        out.print("Otava is not installed: `pip install --no-deps apache-otava` adds its rows", style="dim")


def _print_evaluation(results, series: int) -> None:
    from fpxbench.regressions import recorded_series as recorded
    from fpxbench.regressions.evaluation import Detection

    real = recorded.places()
    found = [result for result in results if isinstance(result, Detection) and result.kind not in real]
    _print_found(found, f"Steps found, of {series} series with 30 builds before")
    alarmed = [result for result in results if not isinstance(result, Detection) and result.kind not in real]
    lengths = sorted({result.builds for result in alarmed})
    table = new_table("series", "detector", *(f">{length} builds" for length in lengths), no_wrap=True,
                      title=f"Alarms in 1,000 series in which no case changed, σ = 2%, from {series} of each")
    cells = {(result.kind, result.detector, result.builds): result.per_1000 for result in alarmed}
    last = None
    for kind, name in dict.fromkeys((result.kind, result.detector) for result in alarmed):
        table.add_row(kind if kind != last else "", name, *(_count(cells[kind, name, length]) for length in lengths))
        last = kind
    out.print(table)
    out.print()
    for where in real:
        found = [result for result in results if isinstance(result, Detection) and result.kind == where]
        _print_found(found, f"Steps found, of {found[0].series} windows with 30 runs before, recorded on {where}")
        alarms = {
            result.detector: result.per_1000
            for result in results
            if not isinstance(result, Detection) and result.kind == where
        }
        out.print(
            "Alarms in 1,000 such windows without a step: "
            + "; ".join(f"{name} {_count(alarms[name])}" for name in alarms)
        )
        out.print()


def _print_found(found, title: str) -> None:
    table = new_table(">step", ">σ", "detector", *(f">in {k}" for k in range(1, 6)), ">right build", title=title,
                      no_wrap=True)
    last = None
    for result in found:
        here = (result.step, result.noise)
        table.add_row(
            *(
                (f"{result.step:.0%}", f"{result.noise:.0%}" if result.noise > 0.1 else f"{100 * result.noise:.2g}%")
                if here != last
                else ("", "")
            ),
            result.detector,
            *(f"{share:.1%}" for share in result.within),
            f"{result.placed:.0%}" if result.within[-1] else "",
        )
        last = here
    out.print(table)
    out.print()


def _count(per_1000: float) -> str:
    return f"{per_1000:,.0f}" if per_1000 >= 10 else f"{per_1000:.1f}"

"""`fpxbench compare` and `issues`: two builds compared by their records, and texts of confirmed regressions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fpxbench.builds.timeline import Timeline, TimelineError
from fpxbench.cli.common import JsonOption, ResultsOption, UsageError, err, new_app, out, results_folder
from fpxbench.cli.timeline_commands import TimelineOption
from fpxbench.records.record import Record
from fpxbench.records.store import Store, latest

app = new_app()


@app.command()
def compare(
    before: Annotated[
        str, typer.Argument(metavar="A", help="The earlier build: a tag, a version, or a prefix of its hash.")
    ],
    after: Annotated[str, typer.Argument(metavar="B", help="The later build.")],
    machine: Annotated[str | None, typer.Option("--machine", help="Only records of this machine.")] = None,
    results: ResultsOption = Path("results"),
    timeline: TimelineOption = Path(".timeline"),
    everything: Annotated[bool, typer.Option("--all", help="Include what has not changed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two builds from their records.

    Verdicts come first, then times, worst first. docs/decision-rule.md, “Comparison of two builds”, defines when a time
    counts as changed. To rerun both builds, use `fpxbench confirm`.
    """
    from fpxbench.regressions.compare import compare as rows_of

    known_builds, results = Timeline(timeline), results_folder(results)
    sides = [_records_of_build(name, known_builds, results, machine) for name in (before, after)]
    rows = rows_of(*sides)
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows]))
        return
    _print_rows(rows, [before, after], everything)
    if not set.intersection(*({record.machine.name for record in side} for side in sides)):
        out.print("no machine has records of both builds: run the same cases with both on one machine", style="bold")


@app.command()
def issues(
    results: ResultsOption = Path("results"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write ID.md and ID.title for each issue to this folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the text of an issue for each confirmed regression.

    It names the case, the first bad build, the confidence, the upstream commits, and how to reproduce the regression.
    """
    from fpxbench.reports.history.issue_texts import confirmed, issues as texts

    found = texts(confirmed(results))
    if as_json:
        print(json.dumps([vars(issue) for issue in found]))
        return
    if output is None:
        for issue in found:
            print(f"# {issue.title}\n\n{issue.body}")
        if not found:
            err.print(f"no confirmed regression in {results}; `fpxbench confirm` confirms suspects", markup=False)
        return
    output.mkdir(parents=True, exist_ok=True)
    for issue in found:
        (output / f"{issue.id}.title").write_text(issue.title + "\n", encoding="utf-8")
        (output / f"{issue.id}.md").write_text(issue.body, encoding="utf-8")
    out.print(f"{len(found)} {'issue' if len(found) == 1 else 'issues'} in {output}", markup=False)


def _records_of_build(name: str, known_builds: Timeline, results: Path, machine: str | None) -> list[Record]:
    """Return the latest record of each case of one build, found on the timeline or by the version in the records."""
    try:
        key = known_builds.find(name).key
    except TimelineError:
        key = None
    store, found, labels = Store(results), [], set()
    for path in store.files():
        if machine is not None and path.parent.parent.name != machine:
            continue
        read, broken = store.read(path)
        labels |= {record.build.label for record in read}
        of_build = [record for record in read
                    if (record.build.key == key if key else name in (record.build.label, record.build.torch))]
        if of_build:
            for line in broken:
                err.print(str(line), markup=False, style="yellow")
            found += of_build
    if not found:
        where = f" of machine {machine!r}" if machine else ""
        raise UsageError(
            f"no records{where} of build {name!r} in {results}: it has records of "
            f"{', '.join(sorted(labels)) or 'no build'}"
        )
    return latest(found)


def _print_rows(rows, names: list[str], everything: bool) -> None:
    from fpxbench.regressions.compare import ChangeClass

    folded = [row for row in rows if row.change in (ChangeClass.UNCHANGED, ChangeClass.ONLY_ONE, ChangeClass.MACHINE)]
    shown = rows if everything else [row for row in rows if row not in folded]
    widths = [
        max((len(text) for text in column), default=0)
        for column in zip(*((row.change, row.case, row.machine) for row in shown), strict=True)
    ]
    out.print(f"{names[0]} → {names[1]}", markup=False, style="bold")
    for row in shown:
        place = "  ".join(
            f"{text:{width}}" for text, width in zip((row.change, row.case, row.machine), widths, strict=True)
        )
        out.print(f"{place}  {_described(row)}", markup=False, style=_STYLES.get(row.change))
    counts = {change: sum(row.change is change for row in rows) for change in ChangeClass}
    out.print("; ".join(f"{count} {change}" for change, count in counts.items() if count), markup=False, style="bold")
    if not everything and folded:
        out.print("--all lists these as well", style="dim")


_STYLES = {"verdict worse": "red", "slower": "red", "faster": "green", "verdict better": "green"}


def _described(row) -> str:
    from fpxbench.stats import percent

    def interval(found: tuple[float, float, float]) -> str:
        return f"{percent(found[0])} [{percent(found[1], '')}, {percent(found[2], '')}]"

    text = f"{row.before or 'not measured'} → {row.after or 'not measured'}"
    if row.time:
        text = f"{interval(row.time)}  {row.before_us:.4g} → {row.after_us:.4g} us"
        text += f"; speedup over dense {interval(row.speedup)}" if row.speedup else ""
    return text + (f"  ({row.variants[0]} → {row.variants[1]})" if row.variants else "")

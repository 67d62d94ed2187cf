"""The command line: thin words around the modules that do the work."""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fpxbench import __version__
from fpxbench.build import NoPyTorch
from fpxbench.case import split_id
from fpxbench.record import Record
from fpxbench.settings import Profile, Settings, default_memory_limit
from fpxbench.store import Store, latest
from fpxbench.verdict import BROKEN, SEVERITY, SIGNS, Status

app = typer.Typer(
    name="fpxbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Is low-bit floating-point matmul still [bold]right[/], and still [bold]fast[/]?

    """
    "fpxbench checks and times weight-only quantized matmul (FP8, FP6, FP4, MX, NVFP4 and any float up to 8 bits): every "
    "implementation on every scheme, on this machine's device and the PyTorch that is installed. A case that is not right gets a "
    """verdict instead of a time.

    [bold]Start with[/]   fpxbench run --profile smoke && fpxbench report

    """
    "[bold]Words[/]   A [italic]scheme[/] is a number format and its scales (e4m3fn-row, mxfp4). An [italic]implementation[/] is one "
    "way to store such a weight and multiply by it. A [italic]workload[/] is a real layer's shape and a number of tokens. A "
    "[italic]case[/] is one of each: eager_upcast/e4m3fn-row/llama2-7b.o/m1/bf16.",
)

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ResultsOption = Annotated[Path, typer.Option("--results", help="Folder of the records.", show_default=True)]
ImplsOption = Annotated[list[Path] | None, typer.Option("--impls", help="A file or folder of further implementations. Repeatable.")]
ImplementationOption = Annotated[list[str] | None, typer.Option("--implementation", "-i", help="Glob over implementations. Repeatable.")]
SchemeOption = Annotated[list[str] | None, typer.Option(
    "--scheme", "-s", help="Glob over schemes, or one by its parts (e2m2-row, e3m4b5-g64). Repeatable.")]
WorkloadOption = Annotated[list[str] | None, typer.Option("--workload", "-w", help="Glob over workloads: llama2-7b.*, canary.ragged/m3. Repeatable.")]
ProfileOption = Annotated[Profile, typer.Option("--profile", help="smoke: a minute. quick: minutes. full: everything.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu or cuda (ROCm too).  [dim]default: a GPU if PyTorch sees one[/]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class UsageError(Exception):
    """A mistake of the user's: one sentence, exit status 2."""


@app.command()
def run(
    profile: ProfileOption = "quick",
    implementation: ImplementationOption = None,
    scheme: SchemeOption = None,
    workload: WorkloadOption = None,
    device: DeviceOption = None,
    impls: ImplsOption = None,
    results: ResultsOption = Path("results"),
    machine: Annotated[str | None, typer.Option("--machine", help="File the records under this name.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Measure again what is measured, or go on where a sweep stopped.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that one case may take.", min=0.1)] = 180.0,
    memory_limit: Annotated[str | None, typer.Option(
        "--memory-limit", help="Memory that one case may hold: 8GiB, 500MB.  [dim]default: 3/4 of the machine's[/]")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Inputs of every case.  [dim]default: new ones each time, kept on the record[/]")] = None,
    timing: Annotated[bool, typer.Option("--timing/--no-timing", help="Time what is right, or only check.")] = True,
    fail_on: Annotated[str, typer.Option("--fail-on", help="Exit with 1 if a case has one of these statuses: wrong,crash,…")] = "",
) -> None:
    """Check and time cases, one record each. Ctrl-C keeps what was measured.

    Exit status: 0; 1 where --fail-on says so; 2 for a mistake in the command; 130 after Ctrl-C.
    """
    from fpxbench.sweep import CannotStart, main_sweep

    failing = _statuses(fail_on)
    settings = Settings(
        profile=profile, implementation=tuple(implementation or ()), scheme=tuple(scheme or ()), workload=tuple(workload or ()),
        device=device, impls=tuple(impls or ()), results=results, machine=machine, fresh=fresh, timeout_s=timeout, seed=seed,
        memory_limit=_bytes(memory_limit) if memory_limit else default_memory_limit(), **({} if timing else {"timing_budget_s": 0.0}),
    )
    try:
        sweep = main_sweep(settings)
    except CannotStart as error:
        raise UsageError(str(error)) from None
    _print_matrix(sweep.records)
    for sentence in _worst(sweep.records, 3):
        out.print(sentence)
    out.print(f"records: {Store(results).file(sweep.machine.name, sweep.build)}   next: fpxbench report --results {results}", markup=False, style="dim")
    if sweep.interrupted:
        raise typer.Exit(130)
    if any(record.verdict.status in failing for record in sweep.records):
        raise typer.Exit(1)


@app.command()
def report(
    results: ResultsOption = Path("results"),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the site to.")] = Path("report"),
    as_json: JsonOption = False,
) -> None:
    """Turn records into a static site that opens from file://, and print the worst things in it."""
    from fpxbench.reports.build import build_site

    if not results.exists():
        raise UsageError(f"--results {results}: no such folder; `fpxbench run --results {results}` makes it")
    summary = build_site(results, output)
    if as_json:
        print(json.dumps({
            "index": str(summary.index.resolve()),
            "findings": [finding.sentence for finding in summary.findings],
            "broken_lines": [str(line) for line in summary.broken_lines],
        }))
        return
    for line in summary.broken_lines:
        err.print(str(line), markup=False, style="yellow")
    for number, finding in enumerate(summary.findings[:3], 1):
        out.print(f"{number}. {finding.sentence}", markup=False)
    if not summary.findings:
        out.print("nothing wrong was found")
    out.print(f"report: {summary.index.resolve().as_uri()}", markup=False, style="bold")


@app.command()
def records(
    results: ResultsOption = Path("results"),
    newest: Annotated[bool, typer.Option("--latest", help="Only the last record of each case, build and machine.")] = False,
) -> None:
    """Print every record, one JSON object a line. Lines that are none are named on stderr."""
    store = Store(results)
    if not results.exists():
        raise UsageError(f"--results {results}: no such folder")
    for path in store.files():
        read, broken = store.read(path)
        for line in broken:
            err.print(str(line), markup=False, style="yellow")
        for record in latest(read) if newest else read:
            print(record.to_json())


@app.command()
def show(
    case: Annotated[str, typer.Argument(help="A case id, as `fpxbench list cases` prints.")],
    results: ResultsOption = Path("results"),
    as_json: JsonOption = False,
) -> None:
    """Show what is known of one case: verdict, evidence, accuracy, timing, log."""
    found = _records_of(case, results)
    for record in found:
        if as_json:
            print(record.to_json())
        else:
            _print_record(record)


@app.command()
def repro(
    case: Annotated[str, typer.Argument(help="A case id, as `fpxbench list cases` prints.")],
    results: ResultsOption = Path("results"),
) -> None:
    """Print a script that reproduces a case by itself: fpxbench repro CASE > repro.py && python repro.py"""
    from fpxbench.repro import repro_script

    print(repro_script(_records_of(case, results)[-1]))


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="implementations, schemes, workloads or cases.")] = "implementations",
    profile: ProfileOption = "quick",
    implementation: ImplementationOption = None,
    scheme: SchemeOption = None,
    workload: WorkloadOption = None,
    device: DeviceOption = None,
    impls: ImplsOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what there is: implementations, schemes, workloads, or the cases that a profile would run."""
    listings = {"implementations": _implementations, "schemes": _schemes, "workloads": _workloads, "cases": _cases}
    if what not in listings:
        raise UsageError(f"there is no list of {what!r}: one of {', '.join(listings)}")
    settings = Settings(profile=profile, implementation=tuple(implementation or ()), scheme=tuple(scheme or ()),
                         workload=tuple(workload or ()), device=device, impls=tuple(impls or ()))
    rows = listings[what](settings)
    if as_json:
        print(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row.values()))
    out.print(table)


@app.command()
def doctor(
    impls: ImplsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine can and cannot do, and what to install."""
    from fpxbench.doctor import examine

    findings = examine(tuple(impls or ()))
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
        return
    marks = {"yes": "[green]✓[/]", "no": "[red]✗[/]", "note": "[yellow]·[/]"}
    for finding in findings:
        line = f"{marks[finding.state]} [bold]{escape(finding.what)}[/]: {escape(finding.said)}"
        out.print(line + (f"  [dim]→ {escape(finding.advice)}[/]" if finding.advice else ""))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        print(f"fpxbench {__version__}")
        raise typer.Exit()


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit status 2, never a traceback."""
    try:
        app()
    except (UsageError, NoPyTorch, FileNotFoundError, ValidationError, ValueError) as error:
        err.print(f"fpxbench: {_sentence(error)}", markup=False, style="red")
        sys.exit(2)
    except BrokenPipeError:     # `fpxbench records | head`
        sys.stderr.close()
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors(include_url=False))
    return str(error)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory-limit {text!r}: a number of bytes, as in 8GiB or 500MB")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 0
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _statuses(text: str) -> frozenset[Status]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in list(Status):
            raise UsageError(f"--fail-on {name!r}: a status is one of {', '.join(Status)}")
    return frozenset(map(Status, names))


def _records_of(case: str, results: Path) -> list[Record]:
    split_id(case)
    read, broken = Store(results).read_all()
    for line in broken:
        err.print(str(line), markup=False, style="yellow")
    found = [record for record in latest(read) if record.case.id == case]
    if not found:
        near = difflib.get_close_matches(case, {record.case.id for record in read}, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; nothing like it is in {results}"
        raise UsageError(f"no record of {case!r}{hint}")
    return found


def _worst(records: list[Record], count: int) -> list[str]:
    broken = sorted((r for r in records if r.verdict.status in BROKEN), key=lambda r: SEVERITY[r.verdict.status])
    lines = [f"[red]{SIGNS[r.verdict.status]} {escape(r.case.id)}[/]: {escape(r.verdict.headline)}: {escape(r.verdict.summary)}" for r in broken[:count]]
    if len(broken) > count:
        lines.append(f"[red]… and {len(broken) - count} more[/]")
    return lines


def _print_matrix(records: list[Record]) -> None:
    """Implementations × schemes: the worst verdict of each, and the speedup over dense where it was timed."""
    implementations = list(dict.fromkeys(record.case.implementation for record in records))
    schemes = list(dict.fromkeys(record.case.scheme for record in records))
    table = Table(title="worst verdict, and speedup over the dense 16-bit product", title_justify="left", box=None, pad_edge=False)
    table.add_column("scheme")
    for name in implementations:
        table.add_column(name, justify="right")
    for scheme in schemes:
        row = [scheme]
        for name in implementations:
            cell = [r for r in records if r.case.scheme == scheme and r.case.implementation == name]
            row.append(_cell(cell))
        table.add_row(*row)
    out.print(table)


def _cell(records: list[Record]) -> str:
    if not records:
        return ""
    worst = min(records, key=lambda r: SEVERITY[r.verdict.status]).verdict.status
    if worst in BROKEN:
        return f"[red]{SIGNS[worst]} {worst}[/]"
    if worst is not Status.OK:
        return f"[dim]{SIGNS[worst]}[/]"
    speedups = sorted(r.timing.speedup for r in records if r.timing and r.timing.speedup)
    return f"[green]{SIGNS[worst]}[/]" + (f" {speedups[0]:.2f}–{speedups[-1]:.2f}×" if len(speedups) > 1 else f" {speedups[0]:.2f}×" if speedups else "")


def _print_record(record: Record) -> None:
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
        row(f"  {name}", value)
    row("shape", f"M = {record.case.m}, N = {record.case.n}, K = {record.case.k}")
    row("machine", f"{record.machine.name} ({record.machine.device}, {record.machine.arch})")
    row("build", f"torch {record.build.torch}, triton {record.build.triton or 'none'}")
    accuracy, timing, traffic = record.accuracy, record.timing, record.traffic
    if accuracy.relative_error is not None:
        row("relative error", f"{accuracy.relative_error:.3g}, at most {accuracy.bound:.3g} is right; worst {accuracy.worst_ulp:.3g} ulp")
    row("SQNR", f"{accuracy.sqnr_db:.2f} dB" if accuracy.sqnr_db is not None else None)
    if timing is not None:
        low, high = timing.ci95_us
        row("time", f"{timing.median_us:.1f} us [{low:.1f}, {high:.1f}], dense {timing.baseline_us:.1f} us: {timing.speedup:.2f}×")
    row("no timing", record.no_timing)
    if traffic.gb_per_s is not None:
        share = f", {traffic.roofline_fraction:.0%} of what this machine reads" if traffic.roofline_fraction is not None else ""
        row("bandwidth", f"{traffic.gb_per_s:.1f} GB/s{share}")
    row("kernels", traffic.kernels_launched)
    row("what holds it back", traffic.bottleneck)
    row("flags", ", ".join(record.flags))
    row("seed", record.seed)
    out.print(table)
    if verdict.log_tail:
        out.print("log:", style="bold")
        out.print(verdict.log_tail, markup=False)


def _implementations(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.implementation import discover, summary

    known, failures = discover(settings.impls)
    rows = [{"implementation": name, "baseline": "yes" if cls.baseline else "", "about": summary(cls)} for name, cls in sorted(known.items())]
    return rows + [{"implementation": failure.path, "baseline": "", "about": f"not loaded: {failure.error}"} for failure in failures]


def _schemes(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.scheme import SCHEMES, scheme_named

    rows = []
    for name in settings.scheme or SCHEMES:
        scheme = scheme_named(name)
        fmt = scheme.format
        rows.append({
            "scheme": scheme.name,
            "format": f"E{fmt.exponent_bits}M{fmt.mantissa_bits} bias {fmt.bias}" if fmt and not fmt.is_integer else fmt.name if fmt else "dense",
            "max": f"{fmt.max:g}" if fmt else "",
            "scaling": scheme.scaling.name if scheme.scaling else "",
            "bits a weight at 4096 x 4096": f"{scheme.bits_per_weight(4096, 4096):.3f}",
        })
    return rows


def _workloads(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.workloads import workloads

    return [
        {"workload": w.name, "N": str(w.n), "K": str(w.k), "M": " ".join(map(str, w.m)), "about": w.about}
        for w in workloads().values()
    ]


def _cases(settings: Settings) -> list[dict[str, str]]:
    from fpxbench.selection import make_plan

    return [{"case": planned.case.id, "refused": planned.refused} for planned in make_plan(settings).cases]


if __name__ == "__main__":
    main()

"""`fpxbench fleet`: measure several builds on every device of a Ray cluster."""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from fpxbench.builds.installed import NoPyTorch, installed_build
from fpxbench.builds.timeline import Entry, Timeline
from fpxbench.cli.common import (
    CaseTimeoutOption,
    ImplementationOption,
    ImplsOption,
    JsonOption,
    ProfileOption,
    ResultsOption,
    SchemeOption,
    TimingOption,
    UsageError,
    WorkloadOption,
    checked_device,
    err,
    new_app,
    new_table,
    out,
    print_table,
    results_folder,
)
from fpxbench.cli.confirm_commands import RetryOption
from fpxbench.cli.timeline_commands import TimelineOption
from fpxbench.counted import counted
from fpxbench.fleet.state import FleetFolder, FleetState
from fpxbench.records.store import Store

if TYPE_CHECKING:
    from fpxbench.fleet.cluster import Call, Node
    from fpxbench.fleet.fleet_messages import DeviceType

NODE_ANSWERS_WITHIN_S = 120.0

app = new_app()

fleet_app = typer.Typer(no_args_is_help=True, help="Measure builds on every device of a Ray cluster: run, status, "
                                                   "nodes, asv.")
app.add_typer(fleet_app, name="fleet")

AddressOption = Annotated[str | None, typer.Option(
    "--address", help="Ray cluster: auto, ray://HOST:10001, HOST:6379.  [dim]default: start Ray here[/]")]


BuildsOption = Annotated[
    str | None,
    typer.Option(
        "--builds",
        help="Builds of the timeline: 2.13.0..2.15.0, 2.15.0,nightly, 2.14.0.. (to the newest).  [dim]default: the "
             "installed build[/]",
    ),
]
DevicesOption = Annotated[str | None, typer.Option(
    "--device", callback=checked_device,
    help="cpu or cuda (ROCm too).  [dim]default: the cluster's GPUs, or else its CPUs[/]")]
MachinesOption = Annotated[list[str] | None, typer.Option(
    "--machines", help="Kinds of machines, by glob: 'nvidia-*'. Repeatable.")]
VariantsOption = Annotated[list[str] | None, typer.Option(
    "--variant", help="Variant of the builds: cu130, rocm7.2, cpu; the first that fits a device is used. Repeatable.")]
PatienceOption = Annotated[float, typer.Option(
    "--patience", help="Wait this many minutes for a device that can run the remaining cases.", min=0.0)]


@fleet_app.command()
def run(
    builds: BuildsOption = None,
    profile: ProfileOption = "quick",
    implementation: ImplementationOption = None,
    scheme: SchemeOption = None,
    workload: WorkloadOption = None,
    address: AddressOption = None,
    device: DevicesOption = None,
    machines: MachinesOption = None,
    variant: VariantsOption = None,
    impls: ImplsOption = None,
    results: ResultsOption = Path("results"),
    timeline: TimelineOption = Path(".timeline"),
    timeout: CaseTimeoutOption = 180.0,
    timing: TimingOption = True,
    retry: RetryOption = False,
    patience: PatienceOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Measure builds on every device of a cluster. Records are those of `fpxbench run`.

    Devices of one kind share the work. A run that was interrupted continues with the same command.

    Exit status: 0 if every case was measured; 1 if some were not; 2 for a usage error, or a cluster that cannot be
    reached; 130 after Ctrl-C.
    """
    from fpxbench.fleet import cluster
    from fpxbench.fleet.driver import Driver, Request
    from fpxbench.fleet.fleet_messages import SweepOptions
    from fpxbench.fleet.fleet_progress import FleetProgress, rendered

    known_builds = Timeline(timeline)
    request = Request(
        entries=_entries(builds, known_builds), results=results, device=cast("DeviceType | None", device),
        machines=tuple(machines or ()), variants=tuple(variant or ()), retry=retry, patience_s=patience * 60,
        options=SweepOptions(
            profile=profile, implementation=tuple(implementation or ()), scheme=tuple(scheme or ()),
            workload=tuple(workload or ()), impls=tuple(str(path.resolve()) for path in impls or ()), timeout_s=timeout,
            timing=timing),
    )
    Store(results).make_folder()
    cluster.connect(address)
    try:
        # Ray prints a page about each node that ends, and standard output is for the result.
        with FleetFolder(results).log() as log, redirect_stdout(log), FleetProgress(err) as progress:
            state = Driver(request, known_builds, progress.say, progress.show).run()
    finally:
        cluster.disconnect()
    if as_json:
        print(state.model_dump_json())
    else:
        out.print(rendered(state, running=False))
        _print_reasons(state)
        out.print(f"records: {results}   next: fpxbench report --results {results}", markup=False, style="dim")
    _write_asv(results, known_builds, [results / cell.file for cell in state.cells if cell.file])
    if state.ended != "complete":
        raise typer.Exit(130 if state.ended == "interrupted" else 1)


@fleet_app.command()
def status(results: ResultsOption = Path("results"), as_json: JsonOption = False) -> None:
    """Show the progress of the latest fleet run into a results folder."""
    from fpxbench.fleet.fleet_progress import rendered

    folder = FleetFolder(results_folder(results))
    state = folder.read()
    if state is None:
        raise UsageError(f"no fleet has run into {results}: `fpxbench fleet run --results {results}`")
    running = folder.running()
    if as_json:
        print(json.dumps(state.model_dump(mode="json") | {"running": running}))
        return
    out.print(rendered(state, running=running))
    _print_reasons(state)
    if running:
        out.print(f"running on {state.host} (process {state.pid}), as of {state.at}", markup=False, style="dim")
    elif not state.ended:
        out.print(f"the driver on {state.host} ended without a message at {state.at} or later; the same "
                  "`fpxbench fleet run` continues", markup=False, style="yellow")
    else:
        out.print(f"ended {state.at}", markup=False, style="dim")


@fleet_app.command()
def nodes(address: AddressOption = None, as_json: JsonOption = False) -> None:
    """List the nodes of a cluster: devices, their machine names in the results, and the version of fpxbench."""
    from fpxbench.fleet import cluster

    cluster.connect(address)
    try:
        asked = [(node, cluster.ask_version(node)) for node in cluster.nodes()]
        found = [_node_row(node, call) for node, call in asked]
    finally:
        cluster.disconnect()
    if as_json:
        print(json.dumps(found))
        return
    table = new_table("node", ">GPUs", ">CPUs", "machines", "fpxbench")
    for row in found:
        shown = row["fpxbench"] or row["error"] or "none"
        table.add_row(*map(escape, (f"{row['host']} ({row['node'][:8]})", str(row["gpus"]), str(row["cpus"]),
                                    row["machines"] or row["accelerator"],
                                    shown if row["usable"] else f"{shown} (another than the driver's)")))
    print_table(table)


def _node_row(node: Node, call: Call) -> dict[str, Any]:
    from fpxbench import __version__
    from fpxbench.fleet import cluster
    from fpxbench.fleet.fleet_messages import source_digest

    try:
        told = cluster.read_version(cluster.result(call, NODE_ANSWERS_WITHIN_S))
    except cluster.WorkerEnded as error:
        told = {"error": f"does not answer: {error}"}
    return {
        "node": node.id, "host": node.host, "gpus": node.gpus, "cpus": node.cpus,
        "accelerator": node.accelerator_type, "machines": told.get("machines", ""),
        "fpxbench": told.get("version", ""), "source": told.get("source", ""), "error": told.get("error", ""),
        "usable": (told.get("version"), told.get("source")) == (__version__, source_digest()),
    }


@fleet_app.command()
def asv(results: ResultsOption = Path("results"), timeline: TimelineOption = Path(".timeline")) -> None:
    """Write asv's result files from the records of every machine."""
    written = _write_asv(results_folder(results), Timeline(timeline))
    out.print(f"{counted(written, 'file')}   next: asv publish", style="dim")


def _write_asv(results: Path, timeline: Timeline, files: list[Path] | None = None) -> int:
    from fpxbench.integrations.asv_results import write_results

    return write_results(results, timeline, files)


def _entries(builds: str | None, timeline: Timeline) -> list[Entry]:
    from fpxbench.fleet.builds import builds_named

    if builds is not None:
        return builds_named(builds, timeline)
    try:
        installed = installed_build()
    except NoPyTorch as error:
        raise UsageError(f"--builds names no build, and {error}") from None
    timeline.add([installed])
    return [timeline.find(installed.key)]


def _print_reasons(state: FleetState) -> None:
    """Print why cases have no record."""
    for cell in state.cells:
        if cell.failure:
            out.print(f"{cell.machine}, {cell.build}: {cell.failure}", markup=False, style="red")
        for case, reason in list(cell.given_up.items())[:20]:
            out.print(f"{cell.machine}, {cell.build}: {case}: {reason}", markup=False, style="red")
    for message in state.spreads:
        out.print(message, markup=False, style="dim")

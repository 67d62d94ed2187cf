"""`fpxbench inspect`: recover which maps an implementation applies."""

from __future__ import annotations

import secrets
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fpxbench.cli.common import DeviceOption, ImplsOption, JsonOption, UsageError, call_in_child, err, new_app, out
from fpxbench.diagnosis.blackbox.inspection import Inspection
from fpxbench.diagnosis.experiment import Experiment
from fpxbench.records.verdict import SIGNS, Status, with_log
from fpxbench.sweep.messages import FileInspectRequest

app = new_app()

SHAPE = 64, 4096, 4096
"""M, N and K unless asked for: every weight of a layer in 64 products."""
ROWS_SHOWN = 16
_HEADINGS = {"table": ("code", "definition", "effective"), "scales": ("scale stored", "definition", "effective"),
             "blocks": ("weight", "its scale", "effective"), "order": ("weight", "definition", "effective")}


SubjectArgument = Annotated[str, typer.Argument(
    metavar="IMPLEMENTATION",
    help="An implementation, or package.module:factory, which turns a torch.nn.Linear into a module.")]
SchemeArgument = Annotated[str, typer.Argument(metavar="SCHEME", help="mxfp4, e4m3fn-row, e3m2-g128, …")]
ShapeOption = Annotated[str | None, typer.Option(
    "--workload", "-w", help="A workload's shape: llama2-7b.o, canary.ragged.")]
NOption = Annotated[int | None, typer.Option("--n", min=1, help=f"Output features.  [dim]default: {SHAPE[1]}[/]")]
KOption = Annotated[int | None, typer.Option("--k", min=1, help=f"Input features.  [dim]default: {SHAPE[2]}[/]")]
MOption = Annotated[int | None, typer.Option(
    "--m", min=1,
    help=f"Rows of the activation, which is the number of columns read at once.  [dim]default: {SHAPE[0]}[/]")]
WeightOption = Annotated[str | None, typer.Option(
    "--weights", metavar="FILE[:NAME]", help="Quantize this weight, [N, K], in place of N(0, 1).")]
ActivationsOption = Annotated[str | None, typer.Option(
    "--activations", metavar="FILE[:NAME]", help="Multiply rows of this tensor [..., K].")]
SeedOption = Annotated[int | None, typer.Option(
    "--seed", help="Seed of weights and activations.  [dim]default: a new one, which is printed[/]")]


@app.command()
def inspect(
    subject: SubjectArgument,
    scheme: SchemeArgument,
    workload: ShapeOption = None,
    n: NOption = None,
    k: KOption = None,
    m: MOption = None,
    weights: WeightOption = None,
    activations: ActivationsOption = None,
    activation: Annotated[str, typer.Option("--activation", help="bf16 or fp16.")] = "bf16",
    device: DeviceOption = None,
    impls: ImplsOption = None,
    seed: SeedOption = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Time limit in seconds.", min=0.1)] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Recover by experiment what an implementation computes: decode table, scales, code order.

    Only its products are looked at, not its code. Differences from the definition are printed, and the fault is named.

    Exit status: 0 if everything is right; 1 if not; 2 for a usage error.
    """
    if activation not in ("bf16", "fp16"):
        raise UsageError(f"--activation {activation!r}: choose bf16 or fp16")
    if workload is not None and (n is not None or k is not None):
        raise UsageError("--workload brings its own N and K: leave out --n and --k")
    if weights is not None and (workload or n or k):
        raise UsageError("--weights brings its own N and K: leave out --n, --k and --workload")
    if activations is not None and (workload or k):
        raise UsageError("--activations brings its own K: leave out --k and --workload")
    request = FileInspectRequest(
        weights=weights, activations=activations,
        subject=subject, scheme=scheme, workload=workload, n=n or SHAPE[1], k=k or SHAPE[2], m=m or SHAPE[0],
        given=bool(workload or n or k or m), activation=activation, device=device,
        seed=secrets.randbelow(1 << 31) if seed is None else seed,
        impls=[str(path.resolve()) for path in impls or ()],
    )
    inspection = _inspected(request, timeout)
    for line in inspection.not_loaded:
        err.print(line, markup=False, style="yellow")
    if as_json:
        print(inspection.model_dump_json(indent=2))
    else:
        _print(inspection, weights or "N(0, 1)")
    if not inspection.right:
        raise typer.Exit(1)


def _inspected(request: FileInspectRequest, timeout: float) -> Inspection:
    with err.status(f"inspecting {request.subject} on {request.scheme} …"):
        outcome = call_in_child("fpxbench.sweep.inspect_files:inspect_files", request, timeout_s=timeout)
    if outcome.value is None:
        return Inspection(
            **request.model_dump(exclude={"device", "workload", "given", "impls", "weights", "activations"}),
            device=request.device or "",
            verdict=outcome.failure,
        )
    inspection = outcome.read(Inspection)
    if not inspection.right:
        inspection.verdict = with_log(inspection.verdict, outcome.log_tail)
    return inspection


def _print(inspection: Inspection, what: str) -> None:
    verdict = inspection.verdict
    colour = "green" if inspection.right else "dim" if verdict.status in (Status.UNSUPPORTED, Status.MISSING) else "red"
    out.print(f"[{colour}]{SIGNS[verdict.status]} {escape(verdict.headline)}[/]: {escape(verdict.summary)}")
    for experiment in inspection.experiments:
        sign = {True: "[green]✓[/]", False: "[red]✗[/]", None: "[yellow]·[/]"}[experiment.right]
        out.print(f"  {sign} [bold]{experiment.name}[/]: {escape(experiment.message)}")
        if experiment.differences:
            _print_differences(experiment)
    if inspection.weights_read:
        wrong = f"{inspection.weights_wrong:,} of " if inspection.weights_wrong else "all "
        out.print(
            f"  [bold]weight[/]: {escape(what)}, [{inspection.n}, {inspection.k}], {inspection.activation} in rows of "
            f"{inspection.m}: {wrong}{inspection.weights_read:,} weights read "
            f"{'wrongly' if inspection.weights_wrong else 'as defined'}",
            style="dim",
        )
    if verdict.log_tail and not inspection.right:
        out.print(verdict.log_tail.rstrip(), markup=False, style="dim")
    out.print(
        f"{inspection.subject} {inspection.scheme} on {inspection.device or 'the device'}: {inspection.seconds:.1f} s, "
        f"--seed {inspection.seed}",
        markup=False,
        style="dim",
    )


def _print_differences(experiment: Experiment) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2))
    for heading in _HEADINGS[experiment.name]:
        table.add_column(heading)
    for difference in experiment.differences[:ROWS_SHOWN]:
        table.add_row(escape(difference.entry), escape(difference.definition), escape(difference.effective))
    out.print(table)
    if len(experiment.differences) > ROWS_SHOWN:
        out.print(f"    … and {len(experiment.differences) - ROWS_SHOWN} more", style="dim")

"""`fpxbench checkpoint`: what is in a file of quantized weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from fpxbench.checkpoint.tensor_entry import ITEM_BITS
from fpxbench.cli.common import JsonOption, UsageError, call_in_child, err, new_app, new_table, out
from fpxbench.counted import counted

app = new_app()

TIMEOUT_S = 3600.0
SHOWN = 20


@app.command()
def checkpoint(
    path: Annotated[Path, typer.Argument(help="A safetensors or GGUF file, or a folder of them with its config.json.")],
    layer: Annotated[
        list[str] | None, typer.Option("--layer", help="Glob over layers: '*.down_proj'. Repeatable.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="The unquantized original, to measure each layer's loss.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read every chosen layer completely.")] = False,
    convert: Annotated[
        str | None, typer.Option("--convert", metavar="DIALECT", help="Write the layers in another dialect.")
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Write the layers as fp32.")] = False,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="With --convert: round a reciprocal that fp32 cannot represent.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The safetensors file to write.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="DIR", help="Write an HTML page of the findings to this folder.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--results", metavar="DIR", help="Store the findings in this folder, for `fpxbench report`."),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Time limit in seconds.", min=0.1)] = TIMEOUT_S,
    as_json: JsonOption = False,
) -> None:
    """Identify the quantization of a checkpoint's weights, and check it for faults.

    Reads all headers, and the codes and scales of a few layers, so that a large checkpoint takes seconds. Reports
    values that no quantizer writes, and which conventions the numbers follow.

    Exit status: 0; 1 if there is a problem; 2 for a usage error.
    """
    if convert and dequantize:
        raise UsageError("--convert and --dequantize write one file each: give one of them")
    if convert or dequantize:
        if output is None:
            raise UsageError("--output FILE.safetensors: where to write to")
        _write(path, layer or [], convert, nearest, output, timeout)
        return
    report = _called(
        "fpxbench.checkpoint.layer_examination:examine",
        {"path": str(path.absolute()), "layers": layer or [], "deep": deep,
         "against": str(against.absolute()) if against else None},
        timeout,
    )
    _store(report, html, results)
    if as_json:
        import json

        print(json.dumps(report))
    else:
        _print(report, against is not None)
    if report["problems"] or any(
        each["problems"] or any(found["fits_better"] for found in each["evidence"]) for each in report["layers"]
    ):
        raise typer.Exit(1)


def _store(report: dict[str, Any], html: Path | None, results: Path | None) -> None:
    """Write the page and the stored findings that were asked for."""
    if html is None and results is None:
        return
    from fpxbench.checkpoint.checkpoint_report import CheckpointReport
    from fpxbench.checkpoint.stored_reports import store_report
    from fpxbench.reports.checkpoint.checkpoint_page import write_checkpoint_page

    for what, folder, write in (("page", html, write_checkpoint_page), ("stored", results, store_report)):
        if folder is not None:
            err.print(f"{what}: {write(CheckpointReport.model_validate(report), folder)}", markup=False)


def _called(function: str, request: dict[str, Any], timeout: float) -> Any:
    import json

    with err.status(f"reading {request['path']} …"):
        outcome = call_in_child(function, request, timeout_s=timeout)
    if outcome.value is None:
        raise UsageError(f"{request['path']}: {outcome.failure.summary}\n{outcome.log_tail[-800:]}".rstrip())
    return json.loads(outcome.value)


def _write(path: Path, layers: list[str], convert: str | None, nearest: bool, output: Path, timeout: float) -> None:
    if output.is_dir() or not output.absolute().parent.is_dir():     # before all layers are decoded
        raise UsageError(f"--output {output}: " + ("is a folder; give a file in it" if output.is_dir() else
                                                   f"there is no folder {output.absolute().parent}"))
    done = _called("fpxbench.checkpoint.writing:write", {
        "path": str(path.absolute()), "layers": layers, "dialect": convert, "nearest": nearest,
        "output": str(output.absolute())}, timeout)
    for refusal in done["refusals"][:SHOWN]:
        err.print(f"not written: {refusal}", markup=False, style="yellow")
    out.print(
        f"{counted(done['written'], 'layer')} written to "
        f"{output}" if done["written"] else "no layer was written", markup=False
    )
    if done["refusals"] or not done["written"]:
        raise typer.Exit(1)


def _print(report: dict[str, Any], compared: bool) -> None:
    declared = f"; the config declares {', '.join(report['declared'])}" if report["declared"] else ""
    files = counted(report["files"], "file")
    out.print(
        f"{report['path']}: {files}, {report['tensors']} tensors, {_size(report['nbytes'])}{declared}", markup=False
    )
    table = new_table("dialect", "scheme", "layers", "shapes", "bytes", "bits per weight")
    for (dialect, scheme), layers in _grouped(report["layers"]).items():
        weights = sum(each["n"] * each["k"] * each["experts"] for each in layers)
        nbytes = sum(each["nbytes"] for each in layers)
        table.add_row(escape(dialect), escape(scheme), str(len(layers)), escape(_shapes(layers)), _size(nbytes),
                      f"{8 * nbytes / weights:.2f}")
    for dtype, nbytes in report["plain"].items():
        what = "not quantized" if dtype in ITEM_BITS else "of no supported dialect"
        table.add_row("", f"{what}: {escape(dtype)}", "", "", _size(nbytes), "")
    out.print(table)
    several = {other for each in report["layers"] for other in each["others"]}
    if several:
        out.print(
            f"The tensors fit {', '.join(sorted(several))} as well: only the config distinguishes these dialects.",
            markup=False,
        )
    if compared:
        _print_losses(report["layers"])
    problems = [*report["problems"], *(problem for each in report["layers"] for problem in each["problems"])]
    for problem in problems[:SHOWN]:
        out.print(f"[red]✗[/] {escape(problem)}")
    if len(problems) > SHOWN:
        out.print(f"[red]✗[/] {len(problems) - SHOWN} more (--json has all)")
    _print_evidence(report)


def _print_evidence(report: dict[str, Any]) -> None:
    read = [each for each in report["layers"] if each["histogram"]]
    if not read:
        out.print("No codes were read, so their conventions were not checked.")
        return
    found: dict[tuple[str, ...], list[tuple[str, dict[str, Any]]]] = {}
    for each in read:
        for evidence in each["evidence"]:
            which = tuple(evidence[key] for key in ("convention", "read_as", "fits_better", "leans_to"))
            found.setdefault(which, []).append((each["name"], evidence))
    for (convention, read_as, better, leaning), cases in found.items():
        name, evidence = min(cases, key=lambda case: case[1]["sureness"])
        sure = evidence["sureness"] >= 0.75
        sureness = f"probability {evidence['sureness']:.3f}" if sure else "undetermined"
        sign = "[red]✗[/]" if better else "[green]✓[/]" if sure and not leaning else "·"
        reading = f"{better}, not {read_as}" if better else read_as
        if sure and leaning:
            reading += f", though {leaning} fits better, but not significantly"
        out.print(f"{sign} {escape(convention)}: {escape(reading)} ({sureness} in {escape(name)}, the least sure of"
                  f" {len(cases)}): {escape(evidence['message'])}")
    out.print(f"Codes of {len(read)} of {counted(len(report['layers']), 'layer')} read; of the others, only"
              " the headers.")


def _print_losses(layers: list[dict[str, Any]]) -> None:
    table = new_table("layer", "SQNR, dB", "quantizer that explains the codes")
    for each in layers[:SHOWN]:
        loss = "exact" if each["exact"] else f"{each['sqnr_db']:.2f}" if each["sqnr_db"] is not None else "–"
        table.add_row(escape(each["name"]), loss, escape(each["explained_by"] or "none of ours"))
    out.print(table)


def _grouped(layers: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in layers:
        groups.setdefault((each["dialect"], each["scheme"] or f"{each['stored_as']}, of no scheme"), []).append(each)
    return groups


def _shapes(layers: list[dict[str, Any]]) -> str:
    counts = Counter((each["experts"], each["n"], each["k"]) for each in layers)
    shapes = [
        f"{count} × [{f'{experts}, ' if experts > 1 else ''}{n}, {k}]"
        for (experts, n, k), count in counts.most_common(3)
    ]
    return ", ".join(shapes) + (", …" if len(counts) > 3 else "")


def _size(nbytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1000
    return ""

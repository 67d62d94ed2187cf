"""Measure a model under one scheme and implementation: quality first, then speed. Called in a watched child."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fpxbench.checking.device_lock import device_lock
from fpxbench.checking.energy import energy_joules
from fpxbench.implementation import discover, find
from fpxbench.model import quality, quality_statistics, sources, step_profile, token_speed
from fpxbench.model.generate_messages import SHIPPED_TEXT, GenerateSettings, Prepared, RowRequest
from fpxbench.model.generate_record import (
    BASELINES,
    Estimate,
    LayerDiagnosis,
    PlannedRow,
    RowResult,
    Speed,
    TextQuality,
    traffic_of,
)
from fpxbench.model.merged_projections import merge_projections_, projection_groups
from fpxbench.model.operator import AUTO, USUAL, resolve
from fpxbench.model.quantize_model import quantize_
from fpxbench.model.stored_checkpoint import load_stored_
from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict
from fpxbench.stats import median_interval

DECODE_CHECKED = 16
"""Tokens decoded one at a time over the cache, to compare with the exactly decoded model."""
CHECKED_TOKENS = 4 * DECODE_CHECKED
"""Tokens of that text in all; those before the decoded ones are the prompt."""
WHERE_TOKENS = 32
REPEATS = 3
"""Timed generations, after one for warm-up."""
ENERGY_SPAN_S = 2.0
"""How long to generate when measuring energy: the counter updates every 100 ms at worst, 5% of this."""
GIBBERISH_TOKENS = 16
"""Length of the sample of a wrong row, which is not timed."""


# Before the rows.


def prepare(settings: GenerateSettings, work: Path) -> Prepared:
    """Load the model once and store what every row needs: the tokens, the reference logits on them, and their noise.

    Raise ValueError for what the user has to correct.
    """
    _, failures = discover(settings.impls)
    source = sources.find_source(settings.model)
    rows = plan_rows(settings, next(iter(source.stored), None))
    config = sources.load_config(source, settings.layers)
    described = sources.describe(source, config)
    sources.check_memory(described, settings.device)
    tokenizer = sources.load_tokenizer(source)
    model = sources.load_model(source, config, settings.device, settings.seed)
    texts = texts_of(settings, tokenizer, config)
    prompt = _prompt(settings, tokenizer, config)
    folder = Path()
    if source.gguf:
        folder = work / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    stored: dict[str, Any] = {"texts": texts, "prompt": prompt, "plain": {}, "noise": {}}
    for name, tokens in texts.items():
        plain = quality.logits(model, tokens)
        bad = quality.first_nonfinite(plain)
        if bad is not None:
            raise ValueError(f"the logits of the unquantized {settings.model} are not finite at step {bad + 1} of the"
                             f" text {name!r}: there is no reference")
        with quality.reordered(model):
            other = quality.logits(model, tokens)
        due = quality.targets(model, tokens)
        stored["plain"][name] = plain
        stored["noise"][name] = quality_statistics.divergence(quality.compare(plain, other, due).kl.numpy())
    groups = projection_groups(model) if settings.merge_projections else []
    rows = [row.model_copy(update={"merged": bool(groups)}) for row in rows]
    decoder = token_speed.Decoder(model, prompt.shape[1] + settings.new_tokens)
    chosen, _, _ = token_speed.generate(decoder, prompt[:1], settings.new_tokens)
    torch.save(stored | {"noise": {name: each.model_dump() for name, each in stored["noise"].items()}},
               work / "prepared.pt")
    return Prepared(model=described, rows=rows, folder=folder, prompt_tokens=prompt.shape[1], merged=groups,
                    sample=_decoded(tokenizer, chosen[0]), not_loaded=[str(failure) for failure in failures])


def plan_rows(settings: GenerateSettings, stored: str | None = None) -> list[PlannedRow]:
    """Return the rows: baselines; the codes of a model that is already quantized (scheme `stored`); then every scheme
    with every implementation, unsupported ones with the reason.

    Raise ValueError for an unknown scheme or implementation.
    """
    chosen_schemes = schemes_of(settings.schemes)
    known, failures = discover(settings.impls)
    for name in settings.implementations:
        if name not in (AUTO, USUAL):
            find(name, known, failures)
    rows = []
    for name in dict.fromkeys([*BASELINES, *chosen_schemes]):
        if not scheme_named(name).quantized:
            rows.append(PlannedRow(scheme=name, implementation="plain"))
            continue
        # A baseline is measured with the fastest implementation, whichever the user chose for other schemes.
        rows += _rows_of(name, settings.implementations if name in chosen_schemes else [AUTO], settings.device)
        if name == BASELINES[-1] and stored is not None:
            rows += _rows_of(stored, settings.implementations, settings.device, stored=True)
    compiled = [row.model_copy(update={"compiled": True}) for row in rows if not row.refused]
    return [*(row for row in rows if row.refused or "eager" in settings.modes),
            *(compiled if "compiled" in settings.modes else [])]


def _rows_of(name: str, implementations: list[str], device: str, *, stored: bool = False) -> list[PlannedRow]:
    """Return one row per implementation; ``auto`` and ``usual`` may name the same one."""
    found: dict[str, PlannedRow] = {}
    for implementation in implementations:
        try:
            chosen = resolve(implementation, scheme_named(name), device, opaque=not stored)[0]
            found[chosen] = PlannedRow(scheme=name, implementation=chosen, stored=stored)
        except ValueError as error:
            found[implementation] = PlannedRow(scheme=name, implementation=implementation, stored=stored,
                                               refused=str(error))
    return list(found.values())


def schemes_of(asked: list[str]) -> list[str]:
    """Return the weight-only schemes that names and globs match; all that profiles sweep if `asked` is empty.

    Raise ValueError for an unknown name, and for a scheme that rounds activations too.
    """
    known = [name for name in SCHEMES if scheme_named(name).quantized and scheme_named(name).activation is None]
    found = []
    for name in asked or ["*"]:
        found += [each for each in known if fnmatchcase(each, name)] or [scheme_named(name).name]
    for name in found:
        if not scheme_named(name).quantized and name not in BASELINES:
            raise ValueError(f"{name} quantizes nothing: the unquantized model is the row {BASELINES[0]}, which is"
                             " always measured")
        if scheme_named(name).activation is not None:
            raise ValueError(f"{name} rounds activations too; models are compared under weight-only schemes, such as"
                             f" {name.partition('+')[0]}")
    return list(dict.fromkeys(found))


def texts_of(settings: GenerateSettings, tokenizer: Any, config: Any) -> dict[str, Tensor]:
    """Return the token ids [T] of each text to compare on, by name. Raise ValueError for an unusable text."""
    if tokenizer is None:
        if settings.text is not None:
            raise ValueError(f"--text {settings.text}: {settings.model} has random weights and no tokenizer")
        return {"random tokens": quality.random_text(config.vocab_size, settings.text_tokens, settings.seed)}
    found = {}
    for path in (SHIPPED_TEXT, *([settings.text] if settings.text is not None else [])):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"--text {path}: not UTF-8 text") from None
        tokens = tokenizer(text, return_tensors="pt").input_ids[0][:settings.text_tokens]
        if len(tokens) < 32:
            raise ValueError(f"--text {path}: {len(tokens)} tokens are too few to compare on; give 32 or more")
        found[path.name] = tokens
    return found


def _prompt(settings: GenerateSettings, tokenizer: Any, config: Any) -> Tensor:
    if tokenizer is None:
        tokens = quality.random_text(config.vocab_size, settings.prompt_tokens, settings.seed + 1)[None]
    else:
        tokens = tokenizer(settings.prompt, return_tensors="pt").input_ids
        if not tokens.shape[1]:
            raise ValueError("--prompt is empty: give some words to continue")
    context = getattr(config, "max_position_embeddings", None)
    if context and tokens.shape[1] + settings.new_tokens > context:
        raise ValueError(f"the prompt's {tokens.shape[1]} tokens and {settings.new_tokens} new ones exceed the"
                         f" {context} positions of {settings.model}: shorten --prompt or --new-tokens")
    return tokens.expand(settings.batch, -1).contiguous()


def _decoded(tokenizer: Any, tokens: Tensor) -> str:
    return tokenizer.decode(tokens.tolist()) if tokenizer is not None else ""


# One row.


class _Row(NamedTuple):
    """A row's model, and the reference that it is compared with."""

    request: RowRequest
    model: nn.Module
    stored: dict[str, Any]
    tokenizer: Any

    @property
    def quantized(self) -> bool:
        return self.request.row.scheme != "bf16"

    def decoder(self, *, compiled: bool = False) -> token_speed.Decoder:
        """Return the forward pass over a cache long enough for the checks and the timing."""
        length = max(self.stored["prompt"].shape[1] + self.request.settings.new_tokens, CHECKED_TOKENS)
        return token_speed.Decoder(self.model, length, compiled=compiled)

    def noise(self, text: str) -> Any:
        return quality.Divergence.model_validate(self.stored["noise"][text])


def measure(request: RowRequest) -> RowResult:
    """Quantize the model, compare it with the reference, and time it if it is right."""
    discover(request.settings.impls)
    settings, planned = request.settings, request.row
    folder = str(request.prepared.folder)
    source = sources.find_source(settings.model)
    if source.gguf:
        source = sources.Source(source.name, "folder", folder)
    config = sources.load_config(source, settings.layers)
    model = sources.load_model(source, config, settings.device, settings.seed)
    row = _Row(request, model, torch.load(request.work / "prepared.pt"), sources.load_tokenizer(source))
    result = RowResult(implementation=planned.implementation, verdict=Verdict(status=Status.OK))
    groups = request.prepared.merged
    if planned.stored:      # the checkpoint's codes are joined unchanged, where their scales allow it
        done = load_stored_(model, Path(source.path), planned.implementation, partly=True)
        done.left |= merge_projections_(model, groups)
    else:
        merge_projections_(model, groups)
        done = quantize_(model, planned.scheme, planned.implementation) if row.quantized else None
    if done is not None:
        result.quantized, result.left = str(done), dict(list(done.left.items())[:1000])
    decoder = row.decoder(compiled=planned.compiled)
    _judge(row, result, decoder)
    if result.verdict.status is Status.OK:
        _time(row, result, decoder)
    else:
        tokens, _, _ = token_speed.generate(row.decoder(), row.stored["prompt"][:1],
                                             min(GIBBERISH_TOKENS, settings.new_tokens))
        result.sample = _decoded(row.tokenizer, tokens[0])
    return result


def _judge(row: _Row, result: RowResult, decoder: token_speed.Decoder) -> None:
    """Fill in the quality and the verdict."""
    meaningful = row.request.prepared.model.kind != "random"
    for name, tokens in row.stored["texts"].items():
        plain, due, noise = row.stored["plain"][name], quality.targets(row.model, tokens), row.noise(name)
        if not row.quantized:
            result.quality.append(quality.plain_quality(name, plain, due, noise, meaningful=meaningful))
            if row.request.row.merged and not _merged_alike(row, result, name):
                return
            continue
        with quality.decoded_weights(row.model):
            oracle = quality.logits(row.model, tokens)
        seen = quality.logits(row.model, tokens)
        bad = quality.first_nonfinite(seen)
        if bad is not None and quality.first_nonfinite(oracle) is None:
            _blame(row, result, Verdict(
                status=Status.NONFINITE, summary=f"logits are not finite at step {bad + 1} of the text {name!r}, where"
                                                 " the same codes, decoded exactly, give numbers"))
            return
        block = quality.text_quality(name, plain, oracle, seen, due, noise, meaningful=meaningful)
        result.quality.append(block)
        if quality_statistics.is_wrong(block.kl_kernel, noise):
            _blame(row, result, gibberish(block))
            return
    _check_decode(row, result, decoder)
    if result.verdict.status is Status.OK and row.quantized:
        found = quality.wrong_decode(row.model)
        if found is not None:
            result.diagnosis = found
            result.verdict = Verdict(status=Status.WRONG, kind=found.kind, summary=_in_layer(found),
                                     evidence={"seen_by": "weights read out of one layer's products"})
    if row.quantized and row.request.settings.where and not result.layers:
        result.layers = _layers(row)


def _merged_alike(row: _Row, result: RowResult, text: str) -> bool:
    """Return whether merging projections left the unquantized model's predictions unchanged; fill in the verdict if
    not."""
    tokens, plain, noise = row.stored["texts"][text], row.stored["plain"][text], row.noise(text)
    merged = quality.compare(plain, quality.logits(row.model, tokens), quality.targets(row.model, tokens)).kl
    found = quality_statistics.divergence(merged.numpy())
    if quality_statistics.is_wrong(found, noise):
        result.verdict = Verdict(
            status=Status.WRONG, kind=Kind.GIBBERISH,
            summary=f"with merged projections, KL divergence {found.mean.value:.3g} from the original model, where"
                    f" rounding explains {quality_statistics.threshold(noise):.2g}; --no-merge-projections keeps it")
    return result.verdict.status is Status.OK


def gibberish(block: TextQuality) -> Verdict:
    """Return the verdict on a kernel that diverges from the exactly decoded model by more than rounding explains."""
    kernel, share = block.kl_kernel.mean, block.kl_format.mean
    return Verdict(
        status=Status.WRONG, kind=Kind.GIBBERISH,
        summary=f"KL divergence {kernel.value:.3g} from the same codes decoded exactly, where rounding explains"
                f" {block.threshold:.2g}; the format's own loss is {share.value:.3g}",
        evidence={"kl_kernel": repr(kernel.value), "threshold": repr(block.threshold),
                  "kl_format": repr(share.value), "text": block.text},
    )


def _layers(row: _Row) -> list:
    tokens = next(iter(row.stored["texts"].values()))[:WHERE_TOKENS]
    return quality.layer_differences(row.model, tokens[None])


def _blame(row: _Row, result: RowResult, verdict: Verdict) -> None:
    """Find the first layer that is wrong, and diagnose it."""
    result.layers = _layers(row)
    tensors = {name: tensor for name, _, _, tensor in quality.quantized_parameters(row.model)}
    first = next((layer.layer for layer in result.layers if layer.leaves), next(iter(tensors)))
    result.diagnosis = quality.diagnose_layer(first, tensors[first])
    result.verdict = verdict.model_copy(update={
        "summary": f"{verdict.summary}; {_in_layer(result.diagnosis)}",
        "evidence": verdict.evidence | {"first_layer": first, "layer_kind": str(result.diagnosis.kind or "")}})


def _in_layer(diagnosis: LayerDiagnosis) -> str:
    kind = f"{diagnosis.kind}: " if diagnosis.kind else ""
    return f"in {diagnosis.layer} {kind}{diagnosis.message}"


def _check_decode(row: _Row, result: RowResult, decoder: token_speed.Decoder) -> None:
    """Compare decoding one token at a time, for each sequence of the batch and compiled if the row is, with the exactly
    decoded model.

    A kernel may be right for many tokens at once and wrong for the few of a timed step.
    """
    if not row.quantized and not decoder.compiled:
        return
    batch = row.request.settings.batch
    name, tokens = next(iter(row.stored["texts"].items()))
    tokens = tokens[:CHECKED_TOKENS].expand(batch, -1)
    due = torch.zeros(batch * DECODE_CHECKED, dtype=torch.long)
    with ExitStack() as stack:
        if row.quantized:
            stack.enter_context(quality.decoded_weights(row.model))
        plain = row.decoder()
        oracle = token_speed.decode_logits(plain, tokens, DECODE_CHECKED)
        with quality.reordered(row.model):
            other = token_speed.decode_logits(plain, tokens, DECODE_CHECKED)
    seen = token_speed.decode_logits(decoder, tokens, DECODE_CHECKED)
    bad = quality.first_nonfinite(seen)
    how = "compiled, one token at a time" if decoder.compiled else "one token at a time"
    how += f" to each of {batch} sequences" if batch > 1 else ""
    result.not_captured = decoder.not_captured
    if bad is not None:
        _blame(row, result, Verdict(status=Status.NONFINITE, summary=f"given {how}, logits are not finite"))
        return
    kernel = quality_statistics.divergence(quality.compare(oracle, seen, due).kl.numpy())
    noise = quality_statistics.divergence(quality.compare(oracle, other, due).kl.numpy())
    largest = max(noise, row.noise(name), key=lambda each: each.mean.high)
    if quality_statistics.is_wrong(kernel, largest):
        verdict = Verdict(
            status=Status.WRONG, kind=Kind.GIBBERISH,
            summary=f"given {how}, KL divergence {kernel.mean.value:.3g} from the same codes decoded exactly, where"
                    f" rounding explains {quality_statistics.threshold(largest):.2g}; given at once it is right")
        if row.quantized:
            _blame(row, result, verdict)
        else:
            result.verdict = verdict


def _time(row: _Row, result: RowResult, decoder: token_speed.Decoder) -> None:
    """Fill in speed and traffic."""
    request, settings = row.request, row.request.settings
    prompt, device = row.stored["prompt"], settings.device
    token_speed.generate(decoder, prompt, min(3, settings.new_tokens))     # compiles, tunes, fills caches
    firsts: list[float] = []
    steps: list[float] = []
    with device_lock(device, f"{settings.model} {request.row.scheme}"), token_speed.peak_memory(device) as peak:
        for _ in range(REPEATS):
            tokens, first_s, steps_s = token_speed.generate(decoder, prompt, settings.new_tokens)
            firsts.append(first_s)
            steps += steps_s
        waited = token_speed.generate(decoder, prompt, settings.new_tokens, waiting=True)[2] if device == "cuda" else []
        joules = joules_per_token(
            lambda: token_speed.generate(decoder, prompt, settings.new_tokens)[0].numel(), device)
    result.sample = _decoded(row.tokenizer, tokens[0])
    median, low, high = median_interval(steps)
    first = Estimate(**dict(zip(("value", "low", "high"), median_interval(firsts), strict=True)))
    result.speed = Speed(step_s=steps, tokens_per_s=settings.batch / median, first_token_s=first,
                         tokens_per_s_ci95=(settings.batch / high, settings.batch / low),
                         prefill_tokens_per_s=prompt.numel() / first.value,
                         waiting_tokens_per_s=settings.batch / median_interval(waited)[0] if waited else None,
                         method=decoder.method)
    result.traffic, result.flags = traffic_of(
        token_speed.stored_bytes(row.model), token_speed.step_bytes(row.model, settings.batch), median,
        request.machine, peak[0] if peak else None, joules)
    with device_lock(device, f"{settings.model} {request.row.scheme}"):
        result.step = step_profile.parts_of(step_profile.traced_step(decoder, settings.batch))


def joules_per_token(generate: Callable[[], int], device: str, clock: Callable[[], float] = perf_counter,
                     ) -> float | None:
    """Return the device's energy per token of `generate`, which returns the number of tokens it generated.

    `generate` is called for `ENERGY_SPAN_S`. None if the device has no energy counter, or it does not advance.
    """
    before = energy_joules(device)
    if before is None:
        return None
    started, tokens = clock(), 0
    while clock() - started < ENERGY_SPAN_S:
        tokens += generate()
    after = energy_joules(device)
    return (after - before) / tokens if after is not None and after > before else None

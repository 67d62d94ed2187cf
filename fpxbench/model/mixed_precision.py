"""Measure mixed precision by layer under a budget of bits, against uniform schemes. Called in a watched child."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fpxbench.model import generate_measurement, quality, quality_statistics, sources
from fpxbench.model.generate_messages import GenerateSettings
from fpxbench.model.generate_record import Estimate
from fpxbench.model.quantize_model import linear_weights
from fpxbench.model.recommendation import Mixed, Uniform, allocate, check_budget
from fpxbench.numbers.scheme import scheme_named


def measure_mixed(settings: GenerateSettings, budget_bits: float, tokens: int) -> Mixed:
    """Return the measured mixed precision within `budget_bits` per quantized weight.

    Weights are decoded exactly: only formats are compared, so a wrong kernel cannot affect the choice. Each layer's KL
    divergence is measured with all other layers in 16 bits. Raise ValueError for a budget that no scheme meets.
    """
    source = sources.find_source(settings.model)
    config = sources.load_config(source, settings.layers)
    sources.check_memory(sources.describe(source, config), settings.device, factor=2.0)     # itself, and all rounded
    model = sources.load_model(source, config, settings.device, settings.seed)
    text = next(iter(generate_measurement.texts_of(settings, sources.load_tokenizer(source), config).values()))[:tokens]
    return mixed(model, text, generate_measurement.schemes_of(settings.schemes), budget_bits)


def mixed(model: nn.Module, text: Tensor, schemes: list[str], budget_bits: float) -> Mixed:
    """Return the same for a model in memory and token ids [T]; the model's weights are restored afterwards."""
    layers = linear_weights(model)
    plain, due = quality.logits(model, text), quality.targets(model, text)

    def kl_of(chosen: dict[str, str]) -> Tensor:
        kept = {name: layers[name].data for name in chosen}
        try:
            for name, scheme in chosen.items():
                layers[name].data = rounded(kept[name], scheme)
            return quality.compare(plain, quality.logits(model, text), due).kl
        finally:
            for name, values in kept.items():
                layers[name].data = values

    weights = sum(weight.numel() for weight in layers.values())
    bits = {name: {scheme: scheme_named(scheme).bits_per_weight(*weight.shape) * weight.numel() for scheme in schemes}
            for name, weight in layers.items()}
    check_budget(bits, budget_bits * weights, weights)      # before measuring each layer, which takes minutes
    alone = {name: {scheme: float(kl_of({name: scheme}).mean()) for scheme in schemes} for name in layers}
    chosen = allocate(alone, bits, budget_bits * weights)
    uniform = [Uniform(scheme=scheme, kl=_mean(kl_of(dict.fromkeys(layers, scheme))),
                       bits=sum(options[scheme] for options in bits.values()) / weights) for scheme in schemes]
    return Mixed(budget_bits=budget_bits, kl=_mean(kl_of(chosen)), schemes=chosen, uniform=uniform, tokens=len(due),
                 bits=sum(bits[name][scheme] for name, scheme in chosen.items()) / weights)


def rounded(values: Tensor, scheme: str) -> Tensor:
    """Return `values` [N, K] quantized and dequantized under a scheme, in their own dtype."""
    chosen = scheme_named(scheme)
    with torch.no_grad():
        return chosen.dequantize(*chosen.quantize(values)).to(values.dtype)


def _mean(kl: Tensor) -> Estimate:
    return quality_statistics.divergence(kl.numpy()).mean

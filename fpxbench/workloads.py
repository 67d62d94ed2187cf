"""Workloads: the N and K of real models' linear layers, named after them (``llama2-7b.qkv``).

Shapes are derived from transformers' config classes, with the hyperparameters that each model was published with, so
that nothing is fetched. ``canary`` workloads are small shapes on which known mistakes show.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

TOKENS = (1, 4, 16, 64, 512, 4096)
"""M: how many tokens are multiplied at once."""


@dataclass(frozen=True)
class Workload:
    """A linear layer ``[M, K] @ [N, K].T``; `m` lists the token counts it is run with."""

    name: str
    n: int
    k: int
    m: tuple[int, ...] = TOKENS
    about: str = ""

    @property
    def is_canary(self) -> bool:
        return self.name.startswith("canary.")


# model: (config class, hyperparameters as published with the weights)
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-7b": ("LlamaConfig", dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                                      num_key_value_heads=32, vocab_size=32000)),
    "llama3-8b": ("LlamaConfig", dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                                      num_key_value_heads=8, vocab_size=128256)),
    "llama3-70b": ("LlamaConfig", dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                                       num_key_value_heads=8, vocab_size=128256)),
    "qwen2.5-7b": ("Qwen2Config", dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                                       num_key_value_heads=4, vocab_size=152064)),
    "mixtral-8x7b": ("MixtralConfig", dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                                           num_key_value_heads=8, vocab_size=32000)),
}

CANARIES = (
    Workload("canary.seed", 32, 32, (1,), "the shape of pytorch/ao issue #228's reproduction"),
    Workload("canary.codes", 32, 512, (1,), "every code of every format, at M = 1"),
    Workload("canary.ragged", 77, 203, (3, 33), "M, N and K that no block size divides"),
)


def _layers(model: str) -> list[Workload]:
    class_name, published = _MODELS[model]
    config = getattr(importlib.import_module("transformers"), class_name)(**published)
    head = config.hidden_size // config.num_attention_heads
    attention = config.num_attention_heads * head
    expert = "expert_" if hasattr(config, "num_local_experts") else ""
    shapes = {
        "k": (config.num_key_value_heads * head, config.hidden_size),
        "qkv": (attention + 2 * config.num_key_value_heads * head, config.hidden_size),
        "o": (config.hidden_size, attention),
        f"{expert}gate_up": (2 * config.intermediate_size, config.hidden_size),
        f"{expert}down": (config.hidden_size, config.intermediate_size),
    }
    return [Workload(f"{model}.{layer}", n, k, about=f"{model}, {class_name}") for layer, (n, k) in shapes.items()]


@cache
def workloads() -> dict[str, Workload]:
    """All workloads by name, canaries first. Imports transformers (seconds)."""
    found = [*CANARIES, *(layer for model in _MODELS for layer in _layers(model))]
    return {workload.name: workload for workload in found}


def workload_named(name: str) -> Workload:
    """The workload of that name. Raises ValueError naming the nearest ones."""
    known = workloads()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ValueError(f"no workload {name!r}; did you mean {' or '.join(near) if near else ' or '.join(list(known)[:4])}?")

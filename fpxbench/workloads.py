"""Workloads: the N and K of real models' linear layers, named after them (``llama2-7b.qkv``).

Shapes come from transformers' config classes with the hyperparameters that each model was published with; nothing is
downloaded. They are kept in the folder for temporary files, since importing transformers takes longer than importing
PyTorch. ``canary`` workloads are small shapes on which known faults show.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from fpxbench.did_you_mean import did_you_mean
from fpxbench.records.case import Case, Routing
from fpxbench.whole_file import write_whole

TOKENS = (1, 4, 16, 64, 512, 4096)
"""M: the number of tokens multiplied at once."""
TOKENS_OF_EXPERTS = (1, 16, 64, 512)
ROUTINGS_OF_MODELS = (Routing.UNIFORM, Routing.SKEWED)
"""Those in which models' experts are measured. Canaries have the others too."""


FROM_CHECKPOINT, FROM_FILE = "checkpoint.", "own."
"""What names of workloads begin with whose weights a file holds: quantized ones, and those to be quantized."""


def ranks_in(names: Iterable[str]) -> tuple[int, ...]:
    """Return the tensor-parallel sizes in names of workloads, or in globs over them: 8 of ``llama3-70b.down.tp8``."""
    return tuple(sorted({int(size) for name in names for size in re.findall(r"\.tp([1-9]\d{0,3})", name)}))


def is_from_file(workload: str) -> bool:
    """Return whether the weight of a workload of that name is a file's, and not made from a seed."""
    return workload.startswith((FROM_CHECKPOINT, FROM_FILE))


class WeightContents(StrEnum):
    """What the weight of a workload holds."""

    NORMAL = "normal"
    """N(0, 1)."""
    CODES = "codes"
    """The values on which encoders and decoders differ: every code, every midpoint of two, under scales of 1."""
    VALUES = "values"
    """Rows and activations as models have them: zeros, constants, heavy tails, outlier channels, tiny and huge."""
    SCALES = "scales"
    """Every scale code of the scheme's scale format that a finite weight meets."""


class Split(StrEnum):
    """Which dimension of a layer tensor parallelism divides among its ranks."""

    N = "n"
    """Output features: column-parallel (qkv, gate and up)."""
    K = "k"
    """Input features: row-parallel (o, down)."""
    NONE = ""
    """The layer is small, and every rank holds all of it."""


@dataclass(frozen=True)
class Workload:
    """A linear layer ``[M, K] @ [N, K].T``, with the token counts `m` to run.

    With `experts`, the weight is [E, N, K], and each token is multiplied by `experts_per_token` of them, which
    `routing` spreads.
    """

    name: str
    n: int
    k: int
    m: tuple[int, ...] = TOKENS
    about: str = ""
    contents: WeightContents = WeightContents.NORMAL
    split: Split = Split.NONE
    experts: int | None = None
    experts_per_token: int | None = None
    routing: Routing | None = None

    def case(self, implementation: str, scheme: str, m: int, activation: Literal["bf16", "fp16"] = "bf16") -> Case:
        """Return the case of an implementation and a scheme with M tokens."""
        return Case(implementation=implementation, scheme=scheme, workload=self.name, m=m, n=self.n, k=self.k,
                    activation=activation, experts=self.experts, experts_per_token=self.experts_per_token,
                    routing=self.routing)

    @property
    def is_canary(self) -> bool:
        return is_canary(self.name)

    def of_rank(self, size: int) -> Workload:
        """Return what the first of `size` ranks of tensor parallelism holds: N or K over `size`, rounded up."""
        if self.split is Split.N:
            return replace(self, name=f"{self.name}.tp{size}", n=-(-self.n // size))
        return replace(self, name=f"{self.name}.tp{size}", k=-(-self.k // size))


# model: (config class, hyperparameters as published with the weights)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-7b": ("LlamaConfig", dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                                      num_key_value_heads=32, vocab_size=32000)),
    "llama3-8b": ("LlamaConfig", dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                                      num_key_value_heads=8, vocab_size=128256)),
    "llama3-70b": ("LlamaConfig", dict(hidden_size=8192, intermediate_size=28672, num_attention_heads=64,
                                       num_key_value_heads=8, vocab_size=128256)),
    "llama4-scout": ("Llama4TextConfig", dict(hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384,
                                              num_attention_heads=40, num_key_value_heads=8, head_dim=128,
                                              num_local_experts=16)),
    "qwen2.5-7b": ("Qwen2Config", dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                                       num_key_value_heads=4, vocab_size=152064)),
    "qwen3-8b": ("Qwen3Config", dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32,
                                     num_key_value_heads=8, head_dim=128)),
    "qwen3-32b": ("Qwen3Config", dict(hidden_size=5120, intermediate_size=25600, num_attention_heads=64,
                                      num_key_value_heads=8, head_dim=128)),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", dict(hidden_size=2048, moe_intermediate_size=768, num_attention_heads=32,
                                             num_key_value_heads=4, head_dim=128, num_experts=128)),
    "qwen3-235b-a22b": ("Qwen3MoeConfig", dict(hidden_size=4096, moe_intermediate_size=1536, num_attention_heads=64,
                                               num_key_value_heads=4, head_dim=128, num_experts=128)),
    "mixtral-8x7b": ("MixtralConfig", dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                                           num_key_value_heads=8, vocab_size=32000)),
    "mistral-small-24b": ("MistralConfig", dict(hidden_size=5120, intermediate_size=32768, num_attention_heads=32,
                                                num_key_value_heads=8, head_dim=128)),
    "gemma3-12b": ("Gemma3TextConfig", dict(hidden_size=3840, intermediate_size=15360, num_attention_heads=16,
                                            num_key_value_heads=8, head_dim=256)),
    "phi-4": ("Phi3Config", dict(hidden_size=5120, intermediate_size=17920, num_attention_heads=40,
                                 num_key_value_heads=10)),
    "gpt-oss-20b": ("GptOssConfig", dict(hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
                                         num_key_value_heads=8, head_dim=64, num_local_experts=32)),
    "gpt-oss-120b": ("GptOssConfig", dict(hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
                                          num_key_value_heads=8, head_dim=64, num_local_experts=128)),
    "deepseek-v3": ("DeepseekV3Config", dict(hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
                                             num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512,
                                             qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)),
}

CANARIES = (
    Workload("canary.seed", 32, 32, (1,), "the shape of pytorch/ao issue #228's reproduction"),
    Workload("canary.codes", 32, 512, (1,), "every code of every format, at M = 1", WeightContents.CODES),
    Workload("canary.values", 32, 128, (6,), "weights and activations as in models, with zeros and outliers",
             WeightContents.VALUES),
    Workload("canary.scales", 128, 64, (1,), "every scale code of every scale format", WeightContents.SCALES),
    Workload("canary.ragged", 77, 203, (3, 33), "M, N and K that are not multiples of any block size"),
    Workload("canary.blocks", 256, 384, (4,), "rows of three scales in blocks of 128; cuBLAS reads rows of four"),
    Workload("canary.experts.uniform", 40, 160, (9,), "6 experts, 2 a token", experts=6, experts_per_token=2,
             routing=Routing.UNIFORM),
    Workload("canary.experts.skewed", 37, 75, (9,), "5 experts, 3 a token, N and K that no block size divides",
             experts=5, experts_per_token=3, routing=Routing.SKEWED),
    Workload("canary.experts.empty", 40, 160, (9,), "experts without tokens: the first, one amid others, the last",
             experts=6, experts_per_token=2, routing=Routing.EMPTY),
    Workload("canary.experts.one", 40, 160, (9,), "one of 6 experts has all tokens", experts=6, experts_per_token=2,
             routing=Routing.ONE),
)

_CONTENTS = {canary.name: canary.contents for canary in CANARIES}


def is_canary(workload: str) -> bool:
    """Return whether a workload of that name is a small shape that is checked and not timed."""
    return workload.startswith("canary.")


def contents_of(workload: str) -> WeightContents:
    """Return what the weight of a workload holds, by the workload's name; any that is no canary holds N(0, 1)."""
    return _CONTENTS.get(workload, WeightContents.NORMAL)


def model_config(model: str, **further: Any) -> Any:
    """Return the transformers config of a model of `MODELS`, with further fields than those that workloads need."""
    class_name, published = MODELS[model]
    return getattr(importlib.import_module("transformers"), class_name)(**published, **further)


def _kept_layers() -> list[Workload]:
    """Return the layers of all models, from a file that an earlier process left for this transformers."""
    kept = TypeAdapter(list[Workload])
    digest = hashlib.sha256(Path(__file__).read_bytes() + importlib.metadata.version("transformers").encode())
    file = Path(tempfile.gettempdir()) / f"fpxbench-workloads-{os.getuid()}" / f"{digest.hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError):
        if file.stat().st_uid == os.getuid():
            return kept.validate_json(file.read_bytes())
    layers = [layer for model in MODELS for layer in _layers(model)]
    with contextlib.suppress(OSError):
        file.parent.mkdir(mode=0o700, exist_ok=True)
        write_whole(file, kept.dump_json(layers))
    return layers


def _layers(model: str) -> list[Workload]:
    config = model_config(model)
    shapes = {**_attention(config), **_feed_forward(config)}
    layers = [Workload(f"{model}.{layer}", n, k, about=f"{model}, {type(config).__name__}", split=split)
              for layer, (n, k, split) in shapes.items()]
    return layers + [experts for layer in layers if ".expert_" in layer.name for experts in _experts(layer, config)]


def _experts(expert: Workload, config: Any) -> list[Workload]:
    """Return the layer of all experts, from that of one, in each routing: ``gpt-oss-20b.experts_down.uniform``."""
    count = next(getattr(config, field) for field in _EXPERT_COUNTS if hasattr(config, field))
    per_token = config.num_experts_per_tok
    name = expert.name.replace(".expert_", ".experts_")
    return [replace(expert, name=f"{name}.{routing}", m=TOKENS_OF_EXPERTS, experts=count, experts_per_token=per_token,
                    routing=routing, about=f"{expert.about}: {count} experts, {per_token} a token")
            for routing in ROUTINGS_OF_MODELS]


def _attention(config: Any) -> dict[str, tuple[int, int, Split]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hasattr(config, "kv_lora_rank"):     # multi-head latent attention: queries and keys through a low rank
        query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        return {
            "qkv_a": (config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim, hidden, Split.NONE),
            "q_b": (query, config.q_lora_rank, Split.N),
            "kv_b": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank, Split.N),
            "o": (hidden, heads * config.v_head_dim, Split.K),
        }
    head = getattr(config, "head_dim", None) or hidden // heads
    key = config.num_key_value_heads * head
    return {
        "k": (key, hidden, Split.N),
        "qkv": (heads * head + 2 * key, hidden, Split.N),
        "o": (hidden, heads * head, Split.K),
    }


_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Fields of configs that say how many experts a layer has."""


def _feed_forward(config: Any) -> dict[str, tuple[int, int, Split]]:
    hidden = config.hidden_size
    expert = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    sizes = {}
    if any(hasattr(config, field) for field in _EXPERT_COUNTS):
        sizes["expert_"] = expert
        dense = getattr(config, "intermediate_size_mlp", None)
        if hasattr(config, "n_routed_experts"):     # the first layers of DeepSeek-V3 have no experts
            dense = config.intermediate_size
        if dense:
            sizes[""] = dense
    else:
        sizes[""] = config.intermediate_size
    return {f"{prefix}{layer}": shape for prefix, size in sizes.items() for layer, shape in (
        ("gate_up", (2 * size, hidden, Split.N)), ("down", (hidden, size, Split.K)))}


@cache
def workloads(ranks: tuple[int, ...] = ()) -> dict[str, Workload]:
    """Return all workloads by name, canaries first.

    ranks : sizes of tensor parallelism; each adds a model's layers as one rank holds them (``llama3-70b.down.tp8``)
    """
    layers = _kept_layers()
    found = [*CANARIES, *layers,
             *(layer.of_rank(size) for size in ranks for layer in layers if layer.split is not Split.NONE)]
    return {workload.name: workload for workload in found}


def workload_named(name: str) -> Workload:
    """Return the workload of that name. Raise ValueError naming the nearest ones."""
    known = workloads(ranks_in((name,)))
    if name in known:
        return known[name]
    hint = did_you_mean(name, known, f"`fpxbench list workloads` shows the {len(known)} there are", cutoff=0.4)
    raise ValueError(f"no workload {name!r}; {hint}")

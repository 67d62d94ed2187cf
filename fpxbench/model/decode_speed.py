"""Generate tokens with a static KV cache, prefill and decode apart, and time both."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.sources import PreTrained

Step = Callable[[Tensor, Any], Tensor]
"""From the last tokens [B, T] and the cache to logits [B, V]."""


def step_of(model: PreTrained, *, compiled: bool = False) -> Step:
    """Return one forward pass over a cache. Compiled, it is one graph, and on a GPU a CUDA graph."""
    # transformers 5.2x renamed the argument.
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"

    def step(tokens: Tensor, cache: Any) -> Tensor:
        return model(tokens, **{name: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]

    if not compiled:
        return step
    on_gpu = next(model.parameters()).device.type == "cuda"
    return torch.compile(step, fullgraph=True, mode="reduce-overhead" if on_gpu else None)


def new_cache(model: PreTrained, length: int) -> Any:
    """Return an empty static KV cache for `length` tokens."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


@torch.no_grad()
def decode_logits(model: PreTrained, tokens: Tensor, steps: int, decode: Step | None = None) -> Tensor:
    """Return the logits [steps, V] after each of the last `steps` tokens of [1, T], given one at a time over a cache.
    """
    prefill = step_of(model)
    decode = decode or prefill
    cache = new_cache(model, tokens.shape[1])
    tokens = tokens.to(next(model.parameters()).device)
    head = tokens.shape[1] - steps
    prefill(tokens[:, :head], cache)
    return torch.cat([decode(tokens[:, at:at + 1], cache).clone().cpu() for at in range(head, tokens.shape[1])])


@torch.no_grad()
def generate(model: PreTrained, prompt: Tensor, new_tokens: int, decode: Step | None = None,
             ) -> tuple[Tensor, float, list[float]]:
    """Return greedily chosen tokens [B, new_tokens] after `prompt` [B, P], seconds to the first, and of each step."""
    prefill = step_of(model)
    decode = decode or prefill
    device = next(model.parameters()).device
    prompt = prompt.to(device)
    cache = new_cache(model, prompt.shape[1] + new_tokens)
    _wait(device)
    started = time.perf_counter()
    chosen = [prefill(prompt, cache).argmax(-1, keepdim=True)]
    _wait(device)
    first_s = time.perf_counter() - started
    steps_s = []
    for _ in range(new_tokens - 1):
        started = time.perf_counter()
        chosen.append(decode(chosen[-1], cache).argmax(-1, keepdim=True))
        _wait(device)
        steps_s.append(time.perf_counter() - started)
    return torch.cat(chosen, dim=1).cpu(), first_s, steps_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def stored_bytes(model: PreTrained) -> int:
    """Return the bytes of all parameters as stored, each counted once."""
    return sum({id(parameter): _bytes(parameter) for parameter in model.parameters()}.values())


def step_bytes(model: PreTrained, batch: int) -> int:
    """Return the bytes of weights that one decode step of `batch` sequences reads.

    Of embeddings that are a row for each sequence, unless they are the head's weight too; of experts the share that
    `batch` tokens use if each chooses others.
    """
    config = model.config
    head = model.get_output_embeddings()
    head_weight = head.weight if head is not None else None
    per_token = getattr(config, "num_experts_per_tok", None) or 1
    found: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            size = _bytes(parameter)
            if isinstance(module, nn.Embedding) and parameter is not head_weight:
                size = min(size, batch * size // parameter.shape[0])
            elif parameter.dim() == 3:
                size = size * min(parameter.shape[0], batch * per_token) // parameter.shape[0]
            found[id(parameter)] = max(size, found.get(id(parameter), 0))
    return sum(found.values())


def _bytes(parameter: Tensor) -> int:
    data = parameter.data
    return data.nbytes_stored if isinstance(data, FloatTensor) else data.nbytes


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """Put into a list the most bytes in use within: of the device, or of this process on a CPU.

    Nothing is put in where the kernel does not let a process reset its own peak.
    """
    found: list[int] = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield found
        found.append(torch.cuda.max_memory_allocated())
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield found
        return
    yield found
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            found.append(int(line.split()[1]) * 1024)


def energy_joules(device: str) -> float | None:
    """Return the device's energy counter: NVML's of the GPU, RAPL's of the first CPU package; None where there is none.
    """
    if device != "cuda":
        try:
            return int(Path("/sys/class/powercap/intel-rapl:0/energy_uj").read_text()) / 1e6
        except OSError:
            return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
    except pynvml.NVMLError:
        return None

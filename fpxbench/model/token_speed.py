"""Generate tokens with a static KV cache, and time prefill and decode separately."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpxbench.model.float_tensor import FloatTensor
from fpxbench.model.held_linear import HeldLinear
from fpxbench.model.sources import PreTrained

WARM_STEPS = 3
"""Steps before capture: the first compiles, and allocates what is kept between calls."""


class Decoder:
    """A model's forward pass over a static KV cache: `prefill` eager, `decode` compiled if `compiled`.

    On a GPU the compiled step is captured once as a CUDA graph and replayed, without Python overhead: checking guards
    takes longer than reading the weights of a small model. Sliding-window caches change control flow from step to step,
    so PyTorch decides what to capture there (``reduce-overhead``).

    Each batch size has one cache, of `length` tokens, which is emptied and reused: compiled code is bound to the
    cache's shape, and a CUDA graph to its addresses.

    not_captured : why capturing a step failed, in one line; "" otherwise
    overlaps : whether the compiled step's kernels are launched before the one before has ended
    """

    def __init__(self, model: PreTrained, length: int, *, compiled: bool = False) -> None:
        self.model, self.length, self.compiled = model, length, compiled
        self.device: torch.device = next(model.parameters()).device
        self._caches: dict[int, Any] = {}
        # transformers 5.2x renamed the argument.
        self._argument = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        self.not_captured = ""
        self._step: Callable[[Tensor, Any], Tensor] = self.prefill
        self._captured: dict[int, Callable[[Tensor], Tensor]] = {}
        self.overlaps = False
        if compiled:
            how: dict[str, Any] = {"options": overlap_options(self.device)}
            if self.device.type == "cuda" and not self.captures:
                how = {"mode": "reduce-overhead"}
            self.overlaps = bool(how.get("options"))
            self._step = torch.compile(self.prefill, fullgraph=True, dynamic=False, **how)

    @property
    def method(self) -> int:
        """`Speed.method` of this decoder's steps."""
        if self.device.type != "cuda":
            return 1
        return 3 if self.overlaps else 2

    @property
    def captures(self) -> bool:
        """Whether this class captures compiled steps, instead of PyTorch."""
        return self.compiled and self.device.type == "cuda" and not slides(self.model.config)

    def prefill(self, tokens: Tensor, cache: Any) -> Tensor:
        """Return the logits [B, V] after the cache's contents and tokens [B, T], and add the tokens to the cache."""
        return self.model(tokens, **{self._argument: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]

    def decode(self, tokens: Tensor, cache: Any) -> Tensor:
        """Return the same as `prefill` for one token per sequence [B, 1], in memory that the next call may reuse."""
        replay = self._captured.get(len(tokens))
        return self._step(tokens, cache) if replay is None else replay(tokens)

    def replays(self, batch: int) -> bool:
        """Return whether the step for `batch` sequences has been captured."""
        return batch in self._captured

    def make_ready(self, batch: int) -> None:
        """Compile and capture the step for `batch` sequences, if steps are captured and this one has not been."""
        if not self.captures or self.not_captured or batch in self._captured:
            return
        cache = self.empty_cache(batch)
        tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.prefill(tokens, cache)     # allocates the cache
        for _ in range(WARM_STEPS):
            self._step(tokens, cache)
        try:
            self._captured[batch] = captured(self._step, tokens, cache)
        except RuntimeError as error:
            self.not_captured = str(error).strip().partition("\n")[0][:300] or type(error).__name__

    def empty_cache(self, batch: int) -> Any:
        """Return the static KV cache for `batch` sequences, emptied."""
        from transformers import StaticCache

        if batch not in self._caches:
            self._caches[batch] = StaticCache(config=self.model.config, max_cache_len=self.length)
        self._caches[batch].reset()
        return self._caches[batch]


def overlap_options(device: torch.device) -> dict[str, Any]:
    """Return the Inductor options for programmatic dependent launch: kernels are launched before the previous one has
    ended, and wait for it on the device. Empty except on NVIDIA GPUs from sm_90 on."""
    import torch._inductor.config as inductor

    if (device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0)
            or not hasattr(inductor.triton, "enable_pdl")):
        return {}
    return {"triton.enable_pdl": True}


def slides(config: Any) -> bool:
    """Return whether any layer of a model has sliding-window attention."""
    return any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()) or bool(
        getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None))


def captured(step: Callable[[Tensor, Any], Tensor], tokens: Tensor, cache: Any) -> Callable[[Tensor], Tensor]:
    """Capture ``step(tokens, cache)`` as a CUDA graph; return a function that replays it for given tokens.

    Raise RuntimeError if the step cannot be captured, for example because it synchronizes.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        logits = step(tokens, cache)

    def replay(given: Tensor) -> Tensor:
        tokens.copy_(given)
        graph.replay()
        return logits
    return replay


@torch.no_grad()
def decode_logits(decoder: Decoder, tokens: Tensor, steps: int) -> Tensor:
    """Return the logits [B * steps, V] after each of the last `steps` tokens of [B, T], decoded one at a time over a
    cache, sequence by sequence."""
    decoder.make_ready(len(tokens))
    cache = decoder.empty_cache(len(tokens))
    tokens = tokens.to(decoder.device)
    head = tokens.shape[1] - steps
    decoder.prefill(tokens[:, :head], cache)
    found = [decoder.decode(tokens[:, at:at + 1], cache).clone().cpu() for at in range(head, tokens.shape[1])]
    return torch.stack(found, dim=1).flatten(0, 1)


@torch.no_grad()
def generate(decoder: Decoder, prompt: Tensor, new_tokens: int, *, waiting: bool = False
             ) -> tuple[Tensor, float, list[float]]:
    """Return the greedy continuation [B, new_tokens] of `prompt` [B, P], the seconds to its first token, and of each
    step.

    On a GPU, steps are enqueued without waiting for the tokens before, and timed by events, so that the time in which
    an idle device begins a graph does not count. With `waiting`, each is launched when the one before has ended, and
    timed by the host's clock.
    """
    device = decoder.device
    waiting = waiting or device.type != "cuda"
    prompt = prompt.to(device)
    decoder.make_ready(len(prompt))
    cache = decoder.empty_cache(len(prompt))
    _wait(device)
    started = time.perf_counter()
    chosen = [decoder.prefill(prompt, cache).argmax(-1, keepdim=True)]
    _wait(device)
    first_s = time.perf_counter() - started
    moments = [_moment(device, waiting)]
    for _ in range(new_tokens - 1):
        chosen.append(decoder.decode(chosen[-1], cache).argmax(-1, keepdim=True))
        moments.append(_moment(device, waiting))
    _wait(device)
    return torch.cat(chosen, dim=1).cpu(), first_s, [_seconds(*pair) for pair in pairwise(moments)]


def _moment(device: torch.device, waiting: bool) -> Any:
    """Return this moment, for `_seconds`: by the host's clock once the device is idle, or by an event among what is
    enqueued."""
    if waiting:
        _wait(device)
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(start: Any, end: Any) -> float:
    return float(end - start if isinstance(start, float) else start.elapsed_time(end) / 1e3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def stored_bytes(model: PreTrained) -> int:
    """Return the bytes of all parameters as stored, each counted once."""
    return sum({id(parameter): _bytes(parameter) for parameter in model.parameters()}.values()) + _held_bytes(model)


def step_bytes(model: PreTrained, batch: int) -> int:
    """Return the bytes of weights that one decode step of `batch` sequences reads.

    An embedding that is not also the head's weight counts one row per sequence; experts count the share that `batch`
    tokens use if each token chooses different ones.
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
    return sum(found.values()) + _held_bytes(model)


def _held_bytes(model: nn.Module) -> int:
    return sum(module.held.nbytes_stored for module in model.modules() if isinstance(module, HeldLinear))


def _bytes(parameter: Tensor) -> int:
    data = parameter.data
    return data.nbytes_stored if isinstance(data, FloatTensor) else data.nbytes


@contextlib.contextmanager
def peak_memory(device: str) -> Iterator[list[int]]:
    """Yield a list that gets the peak bytes in use within the context: of the device, or of this process on a CPU.

    It stays empty if the operating system does not let a process reset its own peak.
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

"""Profile a captured decode step: its kernels in order, and the time between them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import dropwhile
from typing import NamedTuple

import torch

from fpxbench.checking.effects import trace_events
from fpxbench.model.generate_record import KernelTime, StepParts
from fpxbench.model.token_speed import Decoder

STEPS = 3
"""Traced replays, after one that is discarded because the profiler starts during it."""
MOST_KERNELS = 100
"""How many kernels a record keeps, the longest-running ones."""

_ATTENTION = re.compile(r"fmha|flash|attention|sdpa", re.IGNORECASE)
_COPY = re.compile(r"mem(cpy|set)", re.IGNORECASE)
_LOOP = re.compile(r"triton_(poi|red|per)_")
_SUMMED_PRODUCT = re.compile(r"triton_(red|per)_(?!.*rsqrt).*(?<![a-z])(add)?mm(?![a-z])")
"""A product of few rows, which Inductor may compute as a reduction; not a norm that was fused with one (rsqrt)."""
_OTHER = re.compile(r"at::native|at_cuda_detail|simt_sgemm", re.IGNORECASE)
"""PyTorch's own kernels, and the rotary embedding's product in fp32."""


class KernelSpan(NamedTuple):
    """One launch of a kernel in a trace."""

    name: str
    start_us: float
    end_us: float


@torch.no_grad()
def traced_step(decoder: Decoder, batch: int) -> list[list[KernelSpan]]:
    """Return the kernels of several replays of a decoder's step for `batch` sequences; [] if it is not captured."""
    if not decoder.replays(batch):
        return []
    cache = decoder.empty_cache(batch)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=decoder.device)
    return traced_kernels(lambda: decoder.decode(tokens, cache))


def traced_kernels(replay: Callable[[], object], steps: int = STEPS) -> list[list[KernelSpan]]:
    """Return the kernels of each of `steps` replays on the GPU, in the order in which they began."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps + 1):
            torch.cuda.synchronize()
            replay()
        torch.cuda.synchronize()
    spans = sorted((KernelSpan(each["name"], each["ts"], each["ts"] + each["dur"]) for each in trace_events(profiler)
                    if each.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")), key=lambda span: span.start_us)
    count, rest = divmod(len(spans), steps + 1)
    if not count or rest:
        return []       # the profiler lost some events, or sees no device
    return [of_graph(spans[step * count:(step + 1) * count]) for step in range(1, steps + 1)]


def of_graph(spans: Sequence[KernelSpan]) -> list[KernelSpan]:
    """Return a replay's kernels without the leading copy of the tokens: the gap between it and the graph is overhead of
    Python and the profiler, hidden when a step is launched while the one before it runs."""
    return list(dropwhile(lambda span: _COPY.match(span.name), spans))


def parts_of(steps: Sequence[Sequence[KernelSpan]]) -> StepParts | None:
    """Return the mean time of each part of a step; None without traced steps.

    A kernel that overlaps the previous one counts from that one's end, so that the parts add up to the step.
    """
    if not steps or not steps[0]:
        return None
    parts = dict.fromkeys(("products", "attention", "between", "gaps"), 0.0)
    kernels: dict[str, list[float]] = {}
    for spans in steps:
        end = spans[0].start_us
        for span in spans:
            alone = max(0.0, span.end_us - max(span.start_us, end))
            parts["gaps"] += max(0.0, span.start_us - end)
            parts[kind_of(span.name)] += alone
            kernels.setdefault(span.name, []).append(alone)
            end = max(end, span.end_us)
    every = [KernelTime(name=name[:200], count=max(1, round(len(times) / len(steps))), us=sum(times) / len(steps))
             for name, times in kernels.items()]
    return StepParts(**{f"{part}_us": us / len(steps) for part, us in parts.items()},
                     kernels=sorted(every, key=lambda kernel: -kernel.us)[:MOST_KERNELS])


def kind_of(name: str) -> str:
    """Return the part that a kernel of this name belongs to: ``products``, ``attention`` or ``between``.

    ``between`` are Inductor's loops and reductions, copies, and PyTorch's own kernels; any other kernel counts as a
    product.
    """
    if _LOOP.match(name):
        return "products" if _SUMMED_PRODUCT.match(name) else "between"
    if _ATTENTION.search(name):
        return "attention"
    return "between" if _COPY.match(name) or _OTHER.search(name) else "products"

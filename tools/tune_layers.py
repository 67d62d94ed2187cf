"""Choose the tiles of a decoder's four products together, as they follow each other in a model.

Run it on an NVIDIA GPU from sm_90 on: ``python tools/tune_layers.py --m 1 --own tiles.json``.

A product tuned by itself (``fpxbench run --tune``) does not show how it overlaps with its neighbours. Here
query-key-value, output, gate-up and down of `LAYERS` decoder layers, with an elementwise kernel after each that
overlaps as Inductor's do, are one captured graph. One product's tile after another is exchanged for each candidate, and
the graph is timed; the best few are timed again, interleaved with the tile in use. A candidate with a wrong product
ends the run, and so does one that makes the chain's result wrong. The result is written to `--own`, a table that
FPX_TILES can name, and printed beside the same chain of dense bf16 products.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpxbench.impls import _fragment, _tiles, _tuning
from fpxbench.impls._tiles import AnyTile, Tile
from fpxbench.impls.triton_fused import TritonFused, device_of
from fpxbench.numbers.formats import Format
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight

SHAPES = {"llama2-7b": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
          "llama3-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
          "llama3-70b.tp2": ((10240, 8192), (8192, 8192), (28672, 8192), (8192, 14336))}
"""N and K of the merged products, in their order. Of Llama 3 70B, gate-up and down are halves: those of one GPU of
two."""
LAYERS = 4
MOST_IN_FLIGHT = 4
"""Tiles of 8 x 128 weights that a thread's registers hold ahead."""
ROUNDS = 2
FINALISTS = 6
LEAST_GAIN = 0.002
"""Of the chain's time. A smaller gain is noise."""
MOST_DIFFERENCE = 1e-2
"""Of a product, relative: it is rounded to bf16 (4e-3 at most)."""
MOST_CHAINED = 0.1
"""The same for the chain's result: rounding in 16 products gives 0.014, one stale input 1.4."""


def candidates(m: int, bits: int) -> list[AnyTile]:
    """Return the tiles to try: for up to 8 tokens every sensible one, else those of ``--tune``, and up to 16 some more.
    Those of the stream kernel are tried with each overlap, the others with ``late`` alone: with ``early`` they are
    slower where the next kernel is a product like them."""
    found: list[AnyTile] = []
    if m <= 16:
        shapes = ((1, 2), (1, 4), (1, 8), (2, 2), (2, 4), (4, 2))
        found = [Tile(8 if m <= 8 else 16, groups, n, k, depth, m > 8)
                 for groups, depth, (n, k) in itertools.product((1, 2, 4) if m <= 8 else (1, 2), (1, 2), shapes)
                 if groups * depth <= MOST_IN_FLIGHT]
    if m > 8:
        found += _tuning.candidates(m, bits, "none", device())
    return [replace(tile, overlap=overlap) for tile in dict.fromkeys(found)
            for overlap in (("late",) if isinstance(tile, Tile) else ("early", "late"))]


@cache
def device() -> _tiles.TileDevice:
    found = device_of(torch.device("cuda")) if torch.cuda.is_available() else None
    if found is None:
        sys.exit("no GPU here that the fragment kernels run on")
    return found


def bits_of(scheme: str) -> int:
    codes = scheme_named(scheme).format
    if not isinstance(codes, Format):
        sys.exit(f"{scheme}: the fragment kernels multiply no codebooks")
    return codes.bits


class Chain:
    """The products of `LAYERS` decoder layers, each with weights of its own."""

    def __init__(self, shapes: tuple[tuple[int, int], ...], scheme: str, m: int) -> None:
        self.shapes, self.m, self.implementation = shapes, m, TritonFused()
        self.bits = bits_of(scheme)
        self.weights: list[list[QuantizedWeight]] = [
            [self.implementation.quantize(torch.randn(n, k, device="cuda"), scheme_named(scheme)) for n, k in shapes]
            for _ in range(LAYERS)]
        self.tiles = [_tiles.pick(m, n, k, self.bits, "none", device()) for n, k in shapes]
        self.inputs = [torch.randn(m, k, device="cuda", dtype=torch.bfloat16) for _, k in shapes]
        self.first = self.inputs[0].clone()
        self._calls(lambda layer, at: (self.inputs[at].float() @ self.weights[layer][at].dequantize().float().T
                                       ).bfloat16())
        self.expected = self.inputs[0].float()

    def graph(self, tiles: list[AnyTile]) -> torch.cuda.CUDAGraph:
        """Return the chain with these tiles, captured. Exit if its result is not that of exactly decoded weights: a
        product is wrong, or reads its input before the kernel before it has written it."""
        graph = captured(lambda: self._calls(
            lambda layer, at: self.implementation.matmul_with(self.inputs[at], self.weights[layer][at], tiles[at])))
        self.inputs[0].copy_(self.first)
        for later in self.inputs[1:]:
            later.fill_(float("nan"))
        graph.replay()
        error = (self.inputs[0].float() - self.expected).norm() / self.expected.norm()
        if not error < MOST_CHAINED:
            sys.exit(f"{tiles}: the chain's result is wrong by {error:.2g}")
        return graph

    def dense_graph(self) -> torch.cuda.CUDAGraph:
        self.dense = [[torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for n, k in self.shapes]
                      for _ in range(LAYERS)]       # kept: the captured graph reads them
        return captured(lambda: self._calls(lambda layer, at: self.inputs[at] @ self.dense[layer][at].T))

    def _calls(self, product: Callable[[int, int], Tensor]) -> None:
        for layer, at in itertools.product(range(LAYERS), range(len(self.shapes))):
            between(product(layer, at), self.inputs[(at + 1) % len(self.shapes)], self.shapes[at][1] ** -0.5)

    def tune(self) -> None:
        """Exchange one product's tile after another, as long as the chain becomes faster."""
        left = [self._candidates(at) for at in range(len(self.shapes))]
        for number, at in itertools.product(range(ROUNDS), range(len(self.shapes))):
            times = {tile: microseconds(self.graph(self._with(at, tile)), 6) for tile in left[at]}
            left[at] = sorted(left[at], key=times.__getitem__)[:len(times) // 3]
            best = left[at][:FINALISTS]
            compared = interleaved([self.graph(self._with(at, tile)) for tile in (self.tiles[at], *best)], 30)
            fastest = min(range(len(best)), key=lambda index: compared[index + 1])
            gain = 1 - compared[fastest + 1] / compared[0]
            say(f"round {number + 1}, {self.shapes[at]}: {gain:+.1%} of the chain by {best[fastest]}")
            if gain > LEAST_GAIN:
                self.tiles[at] = best[fastest]

    def _with(self, at: int, tile: AnyTile) -> list[AnyTile]:
        return [*self.tiles[:at], tile, *self.tiles[at + 1:]]

    def _candidates(self, at: int) -> list[AnyTile]:
        """Return the candidates that the device has room for. Exit if one's product is wrong."""
        found = []
        x, weight = self.inputs[at], self.weights[0][at]
        reference = x.float() @ weight.dequantize().float().T
        for tile in candidates(self.m, self.bits):
            if fits(self.implementation, x, weight, tile):
                error = (self.implementation.matmul_with(x, weight, tile).float() - reference).norm() / reference.norm()
                if not error < MOST_DIFFERENCE:
                    sys.exit(f"{tile} is wrong by {error:.2g}")
                found.append(tile)
        return found


@triton.jit
def _between_kernel(source, target, width, stride, factor, BLOCK: tl.constexpr):
    """Scale, overlapping with the kernels before and after as Inductor's do."""
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.extra.cuda.gdc_wait()
    value = tl.load(source + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
    tl.extra.cuda.gdc_launch_dependents()
    tl.store(target + row * width + column, (value * factor).to(tl.bfloat16), mask=column < width)


def between(source: Tensor, target: Tensor, factor: float) -> None:
    """Fill the next product's input [M, K] with the first K columns of the previous output, scaled by `factor` to keep
    magnitudes constant. This is linear, so rounding errors do not grow along the chain."""
    m, width = target.shape
    _between_kernel[(m, triton.cdiv(width, 1024))](source, target, width, source.stride(0), factor, BLOCK=1024,
                                                   launch_pdl=True)


def fits(implementation: TritonFused, x: Tensor, weight: QuantizedWeight, tile: AnyTile) -> bool:
    """Multiply by a tile, and return whether the device has the registers and shared memory for it."""
    from triton.runtime.errors import OutOfResources

    try:
        implementation.matmul_with(x, weight, tile)
    except OutOfResources:
        return False
    return True


def captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph, samples: int) -> float:
    """Return the median time of a replay."""
    return interleaved([graph], samples)[0]


def interleaved(graphs: list[torch.cuda.CUDAGraph], samples: int) -> list[float]:
    """Return each graph's median time of a replay, one after the other in each sample."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[list[float]] = [[] for _ in graphs]
    for graph, found in itertools.chain(*([*zip(graphs, times, strict=True)] for _ in range(samples))):
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) * 1e3)
    return [statistics.median(found) for found in times]


def compile_part(scheme: str, models: list[str], ms: list[int], part: int, parts: int) -> None:
    """Compile every `parts`-th candidate, into Triton's cache. N is not a compile-time constant of the kernels, so few
    rows of the weight will do."""
    implementation = TritonFused()
    for k in sorted({k for model in models for _, k in SHAPES[model]}):
        weight = implementation.quantize(torch.randn(256, k, device="cuda"), scheme_named(scheme))
        for m in ms:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            for tile in candidates(m, bits_of(scheme))[part::parts]:
                fits(implementation, x, weight, tile)


_BEGAN = time.monotonic()


def say(line: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=["llama2-7b"])
    parser.add_argument("--scheme", nargs="+", default=["e4m3fn-row", "e3m2-row", "mxfp4"])
    parser.add_argument("--m", nargs="+", type=int, default=[1], help="tokens")
    parser.add_argument("--own", type=Path, help="write the tiles to this table")
    parser.add_argument("--only-time", action="store_true", help="time the layers with the tiles in use")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if device().arch < _fragment.LEAST_DEPENDENT:
        sys.exit("products overlap from sm_90 on; here use `fpxbench run --tune`")
    cores = len(os.sched_getaffinity(0))
    if options.own is not None:
        os.environ[_tiles.OWN_TABLE] = str(options.own)
    for scheme in options.scheme:
        if options.part is not None:
            compile_part(scheme, options.model, options.m, options.part, cores)
            continue
        if not options.only_time:
            command = [sys.executable, *sys.argv, "--scheme", scheme, "--part"]
            running = [subprocess.Popen([*command, str(part)]) for part in range(cores)]
            if any([process.wait() for process in running]):
                sys.exit("a candidate did not compile")
            say(f"{scheme}: compiled")
        for model, m in itertools.product(options.model, options.m):
            tune_layers(model, scheme, m, options.own, options.only_time)


def tune_layers(model: str, scheme: str, m: int, own: Path | None, only_time: bool) -> None:
    """Tune one model's layers, print the result and add it to the table `own`."""
    chain = Chain(SHAPES[model], scheme, m)
    before, dense = chain.graph(list(chain.tiles)), chain.dense_graph()
    if not only_time:
        chain.tune()
    us = [time / LAYERS for time in interleaved([dense, before, chain.graph(chain.tiles)], 50)]
    say(f"{model}, {scheme}, M = {m}: a layer takes {us[1]:.1f} us before and {us[2]:.1f} after, dense {us[0]:.1f}: "
        f"{us[0] / us[1]:.2f} and {us[0] / us[2]:.2f} times dense")
    for (n, k), tile in zip(chain.shapes, chain.tiles, strict=True):
        say(f"  {n} x {k}: {tile}")
        if own is not None:
            _tiles.save(_tiles.TileEntry(device().arch, _tiles.width_of(chain.bits), n, k, _tiles.m_class(m), tile))


if __name__ == "__main__":
    main()

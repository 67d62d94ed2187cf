"""The operations that each Triton build compiles for each architecture, and their probes.

`OPERATIONS` is the registry. The child process receives plain requests (`child/compiling.py` documents them).
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpxbench.numbers.dtypes import DTYPE_NAMES
from fpxbench.numbers.formats import format_named
from fpxbench.targets.architectures import Architecture

KERNELS = Path(__file__).with_name("child") / "kernels.py"

TRITON_DTYPES: dict[str, str] = {
    name: names.triton_short for name, names in DTYPE_NAMES.items() if (names.triton_short or "").startswith("fp8")
}
"""Formats with a Triton dtype, and its name."""

SMALL_FORMATS = ("e3m2", "e2m3", "e2m1")
FLOATS = ("bf16", "fp16", "fp32")
ROUNDINGS = ("rtne", "rtz")

Request = dict[str, Any]


@dataclass(frozen=True)
class ProbeSpec:
    """One kernel with its format and options, to be compiled for any architecture."""

    operation: str
    format: str
    detail: str
    """The other options, readable, unique within operation and format."""
    options: dict[str, Any] = field(hash=False)
    """What the operation builds the request from."""

    @property
    def id(self) -> str:
        return f"{self.operation}/{self.format}/{self.detail}"

    def request(self, architecture: Architecture) -> Request:
        """Return the child's request for that architecture."""
        return OPERATIONS[self.operation].request(self, architecture) | architecture.target


@dataclass(frozen=True)
class Operation:
    name: str
    title: str
    about: str
    probes: Callable[[], Iterator[ProbeSpec]]
    request: Callable[[ProbeSpec, Architecture], Request]
    needs_torch: bool = False
    """Whether the child needs PyTorch; a Triton that was fetched alone has none, and is left out."""


# Conversions: 4 elements per thread of one warp, so that the hardware can convert several at once.

CONVERTED_BY_A_THREAD = 4


def _conversion(kernel: str, source: str, out: str, architecture: Architecture, **constants: Any) -> Request:
    block = CONVERTED_BY_A_THREAD * int(architecture.target["warp_size"])
    return _request(kernel, {"source": f"*{source}", "out": f"*{out}"}, {"BLOCK": block, **constants}, {"num_warps": 1})


def _request(kernel: str, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any],
             file: Path = KERNELS) -> Request:
    """Return a request whose pointers and sizes are multiples of 16."""
    return {"file": str(file), "kernel": kernel, "signature": signature, "constants": constants, "options": options,
            "divisible": sorted(signature)}


def _decodes() -> Iterator[ProbeSpec]:
    for fmt, out in itertools.product(TRITON_DTYPES, FLOATS):
        yield ProbeSpec("decode", fmt, out, {"out": out})


def _decode(spec: ProbeSpec, architecture: Architecture) -> Request:
    request = _conversion("convert", TRITON_DTYPES[spec.format], spec.options["out"], architecture)
    return request | {"assembly": True, "sass": True}


def _encodes() -> Iterator[ProbeSpec]:
    for fmt, source, rounding in itertools.product(TRITON_DTYPES, FLOATS, ROUNDINGS):
        yield ProbeSpec("encode", fmt, f"{source}-{rounding}", {"source": source, "rounding": rounding})


def _encode(spec: ProbeSpec, architecture: Architecture) -> Request:
    source, rounding = spec.options["source"], spec.options["rounding"]
    return _conversion("encode", source, TRITON_DTYPES[spec.format], architecture,
                       ROUNDING=rounding) | {"assembly": True}


def _integer_decodes() -> Iterator[ProbeSpec]:
    for fmt, out in itertools.product(SMALL_FORMATS, FLOATS):
        yield ProbeSpec("integer_decode", fmt, out, {"out": out})


def _integer_decode(spec: ProbeSpec, architecture: Architecture) -> Request:
    fmt, out = format_named(spec.format), spec.options["out"]
    half = out == "fp16"
    mantissa_bits, bias = (10, 15) if half else (7, 127)
    request = _conversion("decode_by_integers", "u8", out, architecture, BITS=fmt.bits,
                          MANTISSA_SHIFT=mantissa_bits - fmt.mantissa_bits,
                          HALF=half, FACTOR=2.0 ** (bias - fmt.bias))
    return request | {"assembly": True, "sass": True}


# Stores of quantized values, in every tile that Inductor tries for a two-dimensional pointwise kernel.

STORED_FORMATS = ("e4m3fn", "e5m2")
STORE_TILES = ((32, 32), (64, 64), (256, 16), (16, 256), (256, 1), (1, 256))
"""YBLOCK and XBLOCK. Source: `triton_heuristics.pointwise` of PyTorch 2.13."""
STORE_WARPS = (1, 2, 4, 8)
"""What Inductor's coordinate descent tries; a thread has at most 32 elements."""


def _quantize_stores() -> Iterator[ProbeSpec]:
    for fmt, way, (y, x), warps in itertools.product(STORED_FORMATS, ("addresses", "trans"), STORE_TILES, STORE_WARPS):
        if 1 <= y * x // (32 * warps) <= 32:
            yield ProbeSpec("quantize_store", fmt, f"{way}-y{y}-x{x}-w{warps}",
                            {"trans": way == "trans", "yblock": y, "xblock": x, "num_warps": warps})


def _quantize_store(spec: ProbeSpec, architecture: Architecture) -> Request:
    fp8, options = f"*{TRITON_DTYPES[spec.format]}", spec.options
    signature = {"source": "*bf16", "scale": "*fp32", "out": fp8, "transposed": fp8, "ynumel": "i32", "xnumel": "i32"}
    constants = {"YBLOCK": options["yblock"], "XBLOCK": options["xblock"], "HIGH": format_named(spec.format).max,
                 "TRANS": options["trans"]}
    request = _request("quantize_store", signature, constants, {"num_warps": options["num_warps"]})
    return request | {"assembly": True, "needs": ["PropagateNan"]}


# Products.

TILE_OPTIONS: dict[str, Sequence[Any]] = {
    "block_k": (16, 32, 64, 128, 256), "num_stages": (1, 2, 3, 4), "num_warps": (1, 2, 4, 8), "layout": ("nk", "kn"),
    "x": ("bf16", "fp16"),
}


def covering(
    options: dict[str, Sequence[Any]], together: Sequence[tuple[str, str]], allowed: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Return few allowed combinations of options that contain every value, and of pairs in `together` every
    combination.

    Greedy and deterministic.
    """
    rows = [row for values in itertools.product(*options.values())
            if allowed(row := dict(zip(options, values, strict=True)))]

    def met(row: dict[str, Any]) -> set[tuple]:
        return set(row.items()) | {(a, row[a], b, row[b]) for a, b in together}

    left, chosen = set().union(*map(met, rows)), []
    while left:
        best = max(rows, key=lambda row: len(met(row) & left))
        left -= met(best)
        chosen.append(best)
    return chosen


def _fits(tile: dict[str, Any]) -> bool:
    """Return whether a tile of 64 × 16 × BLOCK_K has enough warps not to spill."""
    return tile["block_k"] <= 64 * tile["num_warps"]


TILES = covering(TILE_OPTIONS, [("block_k", "layout"), ("block_k", "x"), ("num_stages", "layout")], _fits)
"""Tiles in which every BLOCK_K occurs with both layouts and both activations, and every number of stages with both
layouts.
"""

FEW_TILES = [tile for tile in TILES if tile["num_warps"] == 4]


def _dequantized_dots() -> Iterator[ProbeSpec]:
    for fmt in (*TRITON_DTYPES, *SMALL_FORMATS):
        for tile in TILES if fmt in TRITON_DTYPES else FEW_TILES:
            detail = f"{tile['x']}-{tile['layout']}-k{tile['block_k']}-s{tile['num_stages']}-w{tile['num_warps']}"
            yield ProbeSpec("dequantized_dot", fmt, detail, tile)


def _dequantized_dot(spec: ProbeSpec, architecture: Architecture) -> Request:
    tile, fmt = spec.options, format_named(spec.format)
    native = spec.format in TRITON_DTYPES
    weight = TRITON_DTYPES[spec.format] if native else "u8"
    constants = {
        "BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": tile["block_k"], "K_FIRST": tile["layout"] == "nk",
        "BITS": 0 if native else fmt.bits,
        "MANTISSA_SHIFT": {"bf16": 7, "fp16": 10}[tile["x"]] - fmt.mantissa_bits,
    }
    signature = {"x": f"*{tile['x']}", "weight": f"*{weight}", "scale": "*fp32", "out": f"*{tile['x']}", "K": "i32"}
    return _request("dequantized_dot", signature, constants,
                    {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]})


FP8_PAIRS = (*((fmt, fmt) for fmt in TRITON_DTYPES), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn"), ("e4m3fnuz", "e5m2fnuz"))


def _fp8_dots() -> Iterator[ProbeSpec]:
    for (a, b), block_k in itertools.product(FP8_PAIRS, (32, 64)):
        yield ProbeSpec("fp8_dot", f"{a}×{b}", f"k{block_k}", {"a": a, "b": b, "block_k": block_k})


def _fp8_dot(spec: ProbeSpec, architecture: Architecture) -> Request:
    options = spec.options
    signature = {"a": f"*{TRITON_DTYPES[options['a']]}", "b": f"*{TRITON_DTYPES[options['b']]}", "out": "*fp32"}
    # No larger: without fp8 hardware LLVM takes minutes for AMD at 64 × 64 × 128, as each thread decodes many codes.
    return _request("fp8_dot", signature, {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": options["block_k"]},
                    {"num_warps": 4})


SCALED_OPERANDS = {"e4m3": "fp8e4nv", "e5m2": "fp8e5", "e2m1": "u8", "bf16": "bf16", "fp16": "fp16"}
"""Operands of `tl.dot_scaled` by its own names, and the pointer's type."""


def _scaled_dots() -> Iterator[ProbeSpec]:
    for a, b in itertools.product(SCALED_OPERANDS, repeat=2):
        if not (a in FLOATS and b in FLOATS):
            yield ProbeSpec("dot_scaled", f"{a}×{b}", "k128", {"a": a, "b": b})


def _scaled_dot(spec: ProbeSpec, architecture: Architecture) -> Request:
    a, b = spec.options["a"], spec.options["b"]
    # Blackwell multiplies by scales in tiles of 128 rows; elsewhere everything is decoded first, at a cost that grows
    # with the tile.
    rows = 128 if architecture.generation == "Blackwell" else 32
    signature = {"a": f"*{SCALED_OPERANDS[a]}", "a_scale": "*u8", "b": f"*{SCALED_OPERANDS[b]}", "b_scale": "*u8",
                 "out": "*fp32"}
    constants = {
        "A": a, "B": b, "A_PACKED": 2 if a == "e2m1" else 1, "B_PACKED": 2 if b == "e2m1" else 1,
        "A_SCALED": a not in FLOATS, "B_SCALED": b not in FLOATS, "BLOCK_M": rows, "BLOCK_N": 32, "BLOCK_K": 128,
    }
    return _request("scaled_dot", signature, constants, {"num_warps": 4}) | {"needs": ["dot_scaled"]}


# The suite's own kernels, imported when needed: listing them needs PyTorch.


def _suite_probes() -> Iterator[ProbeSpec]:
    from fpxbench.targets.suite import probes

    return probes()


def _suite_request(spec: ProbeSpec, architecture: Architecture) -> Request:
    from fpxbench.targets.suite import request

    return request(spec, architecture)


# Such a product as PyTorch's own compiler writes it.


def _inductor_probes() -> Iterator[ProbeSpec]:
    from fpxbench.targets.inductor_probes import probes

    return probes()


def _inductor_request(spec: ProbeSpec, architecture: Architecture) -> Request:
    from fpxbench.targets.inductor_probes import request

    return request(spec, architecture)


def _inductor_stores() -> Iterator[ProbeSpec]:
    from fpxbench.targets.inductor_probes import store_probes

    return store_probes()


def _inductor_store(spec: ProbeSpec, architecture: Architecture) -> Request:
    from fpxbench.targets.inductor_probes import store_request

    return store_request(spec, architecture)


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("decode", "decode", "an fp8 dtype of Triton's to a 16- or 32-bit float", _decodes, _decode),
        Operation("encode", "encode",
                  "a float to an fp8 dtype of Triton's, rounded to nearest even (rtne) or towards zero (rtz)", _encodes,
                  _encode),
        Operation("quantize_store", "quantize + store twice", "scale, clamp and fp8 cast, stored as is and transposed, "
                  "in every tile of torch.compile's Inductor", _quantize_stores, _quantize_store),
        Operation("integer_decode", "decode by integers",
                  "FP6 and FP4 codes, a byte each, by integer operations and a power of two",
                  _integer_decodes, _integer_decode),
        Operation("dequantized_dot", "fused dequantize + dot",
                  "tl.dot of 16-bit activations with weights upcast in the same kernel",
                  _dequantized_dots, _dequantized_dot),
        Operation("fp8_dot", "fp8 × fp8 dot", "tl.dot of two fp8 operands", _fp8_dots, _fp8_dot),
        Operation("dot_scaled", "tl.dot_scaled", "tl.dot_scaled with E8M0 block scales (OCP MX)", _scaled_dots,
                  _scaled_dot),
        Operation("triton_fused", "triton_fused", "this suite's own kernels: packed weights of every scheme",
                  _suite_probes, _suite_request),
        Operation("inductor", "torch.compile",
                  "(x @ w.to(x.dtype)) * s as torch.compile's Inductor writes it, 16-bit x and scales",
                  _inductor_probes, _inductor_request, needs_torch=True),
        Operation("inductor_store", "torch.compile, quantize", "fp8 codes and a transposed copy of them, as Inductor "
                  "writes it, in all its configurations", _inductor_stores, _inductor_store, needs_torch=True),
    )
}


def probes_like(globs: Sequence[str]) -> list[ProbeSpec]:
    """Return the probes whose id matches any of the globs (``decode``, ``*/e4m3fnuz``, ``encode/e5m2/*-rtz``).

    A prefix suffices (``decode``); no globs select everything. Raises ValueError for a glob that matches nothing.
    """
    every = [spec for operation in _operations_of(globs) for spec in operation.probes()]
    chosen: dict[str, ProbeSpec] = {}
    for glob in globs or ["*"]:
        matching = [q for q in every if fnmatch.fnmatchcase(q.id, glob) or fnmatch.fnmatchcase(q.id, f"{glob}/*")]
        if not matching:
            raise ValueError(f"no operation {glob!r}: one of {', '.join(OPERATIONS)}, with a format and more after "
                             "slashes, as in decode/e4m3fn")
        chosen |= {spec.id: spec for spec in matching}
    return [spec for spec in every if spec.id in chosen]


def _operations_of(globs: Sequence[str]) -> list[Operation]:
    """Return the operations that the globs may match: listing the others could import PyTorch for nothing."""
    firsts = [glob.split("/")[0] for glob in globs]
    matching = [operation for name, operation in OPERATIONS.items()
                if not firsts or any(fnmatch.fnmatchcase(name, first) for first in firsts)]
    return matching or list(OPERATIONS.values())

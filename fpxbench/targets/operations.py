"""What is asked of each Triton build on each architecture: operations, and the probes that each is made of.

A registry: an operation is an `Operation` in `OPERATIONS`, and whatever it compiles crosses to the child as a plain request
(`child/compiling.py` says what is in one).
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
"""Formats that Triton has a dtype for, and its name there."""

SMALL_FORMATS = ("e3m2", "e2m3", "e2m1")
FLOATS = ("bf16", "fp16", "fp32")
ROUNDINGS = ("rtne", "rtz")

Request = dict[str, Any]


@dataclass(frozen=True)
class ProbeSpec:
    """A probe before it is asked: which kernel is compiled, for any architecture."""

    operation: str
    format: str
    detail: str
    """What is left of the options, readable, unique within operation and format."""
    options: dict[str, Any] = field(hash=False)
    """What the operation needs in order to build the request."""

    @property
    def id(self) -> str:
        return f"{self.operation}/{self.format}/{self.detail}"

    def request(self, architecture: Architecture) -> Request:
        """What the child is asked for on that architecture."""
        return OPERATIONS[self.operation].request(self, architecture) | architecture.target


@dataclass(frozen=True)
class Operation:
    name: str
    title: str
    about: str
    questions: Callable[[], Iterator[ProbeSpec]]
    request: Callable[[ProbeSpec, Architecture], Request]
    needs_torch: bool = False
    """Whether the child takes PyTorch for it: a Triton that was fetched alone is not asked."""


# Conversions: 4 elements a thread of one warp, so that what the hardware converts at once comes at once.

CONVERTED_BY_A_THREAD = 4


def _conversion(kernel: str, source: str, out: str, architecture: Architecture, **constants: Any) -> Request:
    block = CONVERTED_BY_A_THREAD * int(architecture.target["warp_size"])
    return _request(kernel, {"source": f"*{source}", "out": f"*{out}"}, {"BLOCK": block, **constants}, {"num_warps": 1})


def _request(kernel: str, signature: dict[str, str], constants: dict[str, Any], options: dict[str, Any], file: Path = KERNELS) -> Request:
    """Every pointer, and every size among the arguments, is a multiple of 16."""
    return {"file": str(file), "kernel": kernel, "signature": signature, "constants": constants, "options": options,
            "divisible": sorted(signature)}


def _decodes() -> Iterator[ProbeSpec]:
    for fmt, out in itertools.product(TRITON_DTYPES, FLOATS):
        yield ProbeSpec("decode", fmt, out, {"out": out})


def _decode(question: ProbeSpec, architecture: Architecture) -> Request:
    request = _conversion("convert", TRITON_DTYPES[question.format], question.options["out"], architecture)
    return request | {"assembly": True, "sass": True}


def _encodes() -> Iterator[ProbeSpec]:
    for fmt, source, rounding in itertools.product(TRITON_DTYPES, FLOATS, ROUNDINGS):
        yield ProbeSpec("encode", fmt, f"{source}-{rounding}", {"source": source, "rounding": rounding})


def _encode(question: ProbeSpec, architecture: Architecture) -> Request:
    source, rounding = question.options["source"], question.options["rounding"]
    return _conversion("encode", source, TRITON_DTYPES[question.format], architecture, ROUNDING=rounding) | {"assembly": True}


def _integer_decodes() -> Iterator[ProbeSpec]:
    for fmt, out in itertools.product(SMALL_FORMATS, FLOATS):
        yield ProbeSpec("integer_decode", fmt, out, {"out": out})


def _integer_decode(question: ProbeSpec, architecture: Architecture) -> Request:
    fmt, out = format_named(question.format), question.options["out"]
    half = out == "fp16"
    mantissa_bits, bias = (10, 15) if half else (7, 127)
    request = _conversion("decode_by_integers", "u8", out, architecture, BITS=fmt.bits, MANTISSA_SHIFT=mantissa_bits - fmt.mantissa_bits,
                          HALF=half, FACTOR=2.0 ** (bias - fmt.bias))
    return request | {"assembly": True, "sass": True}


# Products.

TILE_OPTIONS: dict[str, Sequence[Any]] = {
    "block_k": (16, 32, 64, 128, 256), "num_stages": (1, 2, 3, 4), "num_warps": (1, 2, 4, 8), "layout": ("nk", "kn"), "x": ("bf16", "fp16"),
}


def covering(
    options: dict[str, Sequence[Any]], together: Sequence[tuple[str, str]], allowed: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Few allowed choices of all options, in which every value is met, and of options named `together` every two: greedy, and
    the same every time."""
    rows = [row for values in itertools.product(*options.values()) if allowed(row := dict(zip(options, values, strict=True)))]

    def met(row: dict[str, Any]) -> set[tuple]:
        return set(row.items()) | {(a, row[a], b, row[b]) for a, b in together}

    left, chosen = set().union(*map(met, rows)), []
    while left:
        best = max(rows, key=lambda row: len(met(row) & left))
        left -= met(best)
        chosen.append(best)
    return chosen


def _fits(tile: dict[str, Any]) -> bool:
    """Whether a tile of 64 × 16 × BLOCK_K has warps enough that nobody would say it was asking for spills."""
    return tile["block_k"] <= 64 * tile["num_warps"]


TILES = covering(TILE_OPTIONS, [("block_k", "layout"), ("block_k", "x"), ("num_stages", "layout")], _fits)
"""Of the ways to choose a tile, so many that every BLOCK_K meets both layouts and both activations, and every number of
stages both layouts."""

FEW_TILES = [tile for tile in TILES if tile["num_warps"] == 4]


def _dequantized_dots() -> Iterator[ProbeSpec]:
    for fmt in (*TRITON_DTYPES, *SMALL_FORMATS):
        for tile in TILES if fmt in TRITON_DTYPES else FEW_TILES:
            detail = f"{tile['x']}-{tile['layout']}-k{tile['block_k']}-s{tile['num_stages']}-w{tile['num_warps']}"
            yield ProbeSpec("dequantized_dot", fmt, detail, tile)


def _dequantized_dot(question: ProbeSpec, architecture: Architecture) -> Request:
    tile, fmt = question.options, format_named(question.format)
    native = question.format in TRITON_DTYPES
    weight = TRITON_DTYPES[question.format] if native else "u8"
    constants = {
        "BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": tile["block_k"], "K_FIRST": tile["layout"] == "nk", "BITS": 0 if native else fmt.bits,
        "MANTISSA_SHIFT": {"bf16": 7, "fp16": 10}[tile["x"]] - fmt.mantissa_bits,
    }
    signature = {"x": f"*{tile['x']}", "weight": f"*{weight}", "scale": "*fp32", "out": f"*{tile['x']}", "K": "i32"}
    return _request("dequantized_dot", signature, constants, {"num_warps": tile["num_warps"], "num_stages": tile["num_stages"]})


FP8_PAIRS = (*((fmt, fmt) for fmt in TRITON_DTYPES), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn"), ("e4m3fnuz", "e5m2fnuz"))


def _fp8_dots() -> Iterator[ProbeSpec]:
    for (a, b), block_k in itertools.product(FP8_PAIRS, (32, 64)):
        yield ProbeSpec("fp8_dot", f"{a}×{b}", f"k{block_k}", {"a": a, "b": b, "block_k": block_k})


def _fp8_dot(question: ProbeSpec, architecture: Architecture) -> Request:
    options = question.options
    signature = {"a": f"*{TRITON_DTYPES[options['a']]}", "b": f"*{TRITON_DTYPES[options['b']]}", "out": "*fp32"}
    # No larger: where there is no fp8 hardware, LLVM's time for AMD grows steeply with what a thread has to decode (minutes at 64 × 64 × 128).
    return _request("fp8_dot", signature, {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": options["block_k"]}, {"num_warps": 4})


SCALED_OPERANDS = {"e4m3": "fp8e4nv", "e5m2": "fp8e5", "e2m1": "u8", "bf16": "bf16", "fp16": "fp16"}
"""What `tl.dot_scaled` takes, by its own names, and the type of the pointer."""


def _scaled_dots() -> Iterator[ProbeSpec]:
    for a, b in itertools.product(SCALED_OPERANDS, repeat=2):
        if not (a in FLOATS and b in FLOATS):
            yield ProbeSpec("dot_scaled", f"{a}×{b}", "k128", {"a": a, "b": b})


def _scaled_dot(question: ProbeSpec, architecture: Architecture) -> Request:
    a, b = question.options["a"], question.options["b"]
    # Blackwell multiplies by scales itself, in tiles of 128 rows; elsewhere all is decoded first, at a cost by the tile.
    rows = 128 if architecture.generation == "Blackwell" else 32
    signature = {"a": f"*{SCALED_OPERANDS[a]}", "a_scale": "*u8", "b": f"*{SCALED_OPERANDS[b]}", "b_scale": "*u8", "out": "*fp32"}
    constants = {
        "A": a, "B": b, "A_PACKED": 2 if a == "e2m1" else 1, "B_PACKED": 2 if b == "e2m1" else 1,
        "A_SCALED": a not in FLOATS, "B_SCALED": b not in FLOATS, "BLOCK_M": rows, "BLOCK_N": 32, "BLOCK_K": 128,
    }
    return _request("scaled_dot", signature, constants, {"num_warps": 4}) | {"needs": ["dot_scaled"]}


# The suite's own kernels: what they are compiled for is PyTorch's business to find out, and only when asked.


def _suite_questions() -> Iterator[ProbeSpec]:
    from fpxbench.targets.suite import questions

    return questions()


def _suite_request(question: ProbeSpec, architecture: Architecture) -> Request:
    from fpxbench.targets.suite import request

    return request(question, architecture)


# What PyTorch's own compiler makes of such a product.


def _inductor_questions() -> Iterator[ProbeSpec]:
    from fpxbench.targets.inductor_probes import questions

    return questions()


def _inductor_request(question: ProbeSpec, architecture: Architecture) -> Request:
    from fpxbench.targets.inductor_probes import request

    return request(question, architecture)


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("decode", "decode", "an fp8 dtype of Triton's to a 16- or 32-bit float", _decodes, _decode),
        Operation("encode", "encode", "a float to an fp8 dtype of Triton's, rounded to nearest even (rtne) or towards zero (rtz)", _encodes, _encode),
        Operation("integer_decode", "decode by integers", "FP6 and FP4 codes, a byte each, by integer operations and a power of two",
                  _integer_decodes, _integer_decode),
        Operation("dequantized_dot", "fused dequantize + dot", "tl.dot of 16-bit activations with weights upcast in the same kernel",
                  _dequantized_dots, _dequantized_dot),
        Operation("fp8_dot", "fp8 × fp8 dot", "tl.dot of two fp8 operands", _fp8_dots, _fp8_dot),
        Operation("dot_scaled", "tl.dot_scaled", "tl.dot_scaled with E8M0 block scales (OCP MX)", _scaled_dots, _scaled_dot),
        Operation("triton_fused", "triton_fused", "this suite's own kernels: packed weights of every scheme", _suite_questions, _suite_request),
        Operation("inductor", "torch.compile", "(x @ w.to(x.dtype)) * s as torch.compile's Inductor writes it, 16-bit x and scales",
                  _inductor_questions, _inductor_request, needs_torch=True),
    )
}


def probes_like(globs: Sequence[str]) -> list[ProbeSpec]:
    """The probes whose id matches any of the globs (``decode``, ``*/e4m3fnuz``, ``encode/e5m2/*-rtz``); all of them for none.

    A glob may stop short: ``decode`` is all of it. Raises ValueError for one that matches nothing.
    """
    every = [question for operation in _wanted(globs) for question in operation.questions()]
    wanted: dict[str, ProbeSpec] = {}
    for glob in globs or ["*"]:
        matching = [q for q in every if fnmatch.fnmatchcase(q.id, glob) or fnmatch.fnmatchcase(q.id, f"{glob}/*")]
        if not matching:
            raise ValueError(f"no operation {glob!r}: known are {', '.join(OPERATIONS)}, with a format and more after slashes, as in decode/e4m3fn")
        wanted |= {question.id: question for question in matching}
    return [question for question in every if question.id in wanted]


def _wanted(globs: Sequence[str]) -> list[Operation]:
    """The operations that the globs may mean, as listing some costs an import of PyTorch."""
    firsts = [glob.split("/")[0] for glob in globs]
    return [operation for name, operation in OPERATIONS.items() if not firsts or any(fnmatch.fnmatchcase(name, first) for first in firsts)] \
        or list(OPERATIONS.values())

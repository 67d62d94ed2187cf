"""Which conversions there are, and which of them share a child process. Imports no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from itertools import groupby, product

from fpxbench.casts.conversion import DTYPES, CastOperation, Conversion, Engine

WIDE = ("fp64", "fp32", "bf16", "fp16")
_TORCH_FLOAT8 = tuple(dtype.name for dtype in DTYPES.values() if dtype.is_float8 and dtype.torch)
_TRITON_FLOAT8 = tuple(dtype.name for dtype in DTYPES.values() if dtype.is_float8 and dtype.triton)
UNSIGNED = ("uint16", "uint32", "uint64")
PARTS = 64
"""The number of calls that convert the 2**32 inputs of fp32."""
_NARROWINGS = [("fp64", "bf16"), ("fp64", "fp16"), ("fp32", "bf16"), ("fp32", "fp16")]


def engines_on(device: str) -> tuple[Engine, ...]:
    """Return the engines of a device. Triton's interpreter stands in for Triton where there is no GPU."""
    return (Engine.EAGER, Engine.COMPILED, Engine.TRITON if device == "cuda" else Engine.TRITON_INTERPRETER)


def conversions(devices: Iterable[str], engines: Sequence[str] = (), globs: Sequence[str] = ()) -> list[Conversion]:
    """Return the conversions of `devices`, narrowed to `engines` and to ids that match one of `globs`
    (``cast/fp32/*``).

    Raises ValueError, listing what exists, if none matches.
    """
    every = [conversion for device in devices for engine in engines_on(device) for conversion in _of(engine, device)]
    chosen = [conversion for conversion in every if (not engines or conversion.engine in engines)
              and (not globs or any(_matches(conversion, glob) for glob in globs))]
    if not chosen:
        asked = " and ".join(
            [f"engine {', '.join(engines)}"] * bool(engines) + [f"conversion {', '.join(globs)}"] * bool(globs)
        )
        raise ValueError(f"no conversion matches {asked}: ids are like {every[0].id}, and engines here are "
                         f"{', '.join(dict.fromkeys(str(conversion.engine) for conversion in every))}")
    return chosen


def can_be_exhaustive(conversion: Conversion) -> bool:
    """Return whether all inputs take minutes, not hours: fp32 to FP8, except in Triton's interpreter (a million a
    second)."""
    return (conversion.operation in (CastOperation.CAST, CastOperation.CAST_RTZ) and conversion.source == "fp32"
            and DTYPES[conversion.target].is_float8 and conversion.engine is not Engine.TRITON_INTERPRETER)


def batches(chosen: Iterable[Conversion]) -> list[list[Conversion]]:
    """Return conversions grouped as they go to a child process: by engine, device, source, and kind of operation."""
    def key(conversion: Conversion) -> tuple[str, ...]:
        bits = conversion.operation.on_bits
        return conversion.engine, conversion.device, "bits" if bits else conversion.operation, conversion.source

    return [list(group) for _, group in groupby(chosen, key)]


def _matches(conversion: Conversion, glob: str) -> bool:
    return fnmatch.fnmatchcase(conversion.id, glob) or fnmatch.fnmatchcase(conversion.id, f"{glob}/*")


def _of(engine: Engine, device: str) -> list[Conversion]:
    def make(operation: CastOperation, pairs: Iterable[tuple[str, str]]) -> list[Conversion]:
        return [
            Conversion(operation=operation, source=source, target=target, engine=engine, device=device)
            for source, target in pairs
        ]

    if engine in (Engine.TRITON, Engine.TRITON_INTERPRETER):
        narrowing = sorted([*product(WIDE, _TRITON_FLOAT8), *_NARROWINGS], key=lambda pair: WIDE.index(pair[0]))
        return [
            *make(CastOperation.CAST, [*narrowing, *product(_TRITON_FLOAT8, WIDE[1:])]),
            *make(CastOperation.CAST_RTZ, narrowing),
        ]
    narrowing = sorted([*product(WIDE, _TORCH_FLOAT8), *_NARROWINGS], key=lambda pair: WIDE.index(pair[0]))
    from_float8 = [
        (source, target) for source in _TORCH_FLOAT8 for target in (*WIDE[1:], *_TORCH_FLOAT8) if target != source
    ]
    made = [
        *make(CastOperation.CAST, [*narrowing, *from_float8]),
        *make(CastOperation.SCALE_THEN_CAST, product(("bf16", "fp16"), _TORCH_FLOAT8)),
    ]
    for dtype in UNSIGNED:
        made += [one for operation in CastOperation if operation.on_bits for one in make(operation, [(dtype, dtype)])]
    # the constants are the same on every device and under the compiler
    if engine is Engine.EAGER and device == "cpu":
        made += make(CastOperation.FINFO, [(name, name) for name in (*WIDE, *_TORCH_FLOAT8)])
    return made

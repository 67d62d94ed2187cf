"""Which conversions there are to try, and which of them go to a child together. Imports no torch."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from itertools import groupby, product

from fpxbench.casts.conversion import DTYPES, Conversion, Engine, Operation

WIDE = ("fp64", "fp32", "bf16", "fp16")
TORCH_FLOAT8 = tuple(dtype.name for dtype in DTYPES.values() if dtype.is_float8 and dtype.torch)
TRITON_FLOAT8 = tuple(dtype.name for dtype in DTYPES.values() if dtype.is_float8 and dtype.triton)
UNSIGNED = ("uint16", "uint32", "uint64")
PARTS = 64
"""In how many calls the 2**32 inputs of fp32 go to a child."""
_NARROWINGS = [("fp64", "bf16"), ("fp64", "fp16"), ("fp32", "bf16"), ("fp32", "fp16")]


def engines_on(device: str) -> tuple[Engine, ...]:
    """What carries conversions out on a device. The interpreter stands in for Triton where there is no GPU."""
    return (Engine.EAGER, Engine.COMPILED, Engine.TRITON if device == "cuda" else Engine.TRITON_INTERPRETER)


def conversions(devices: Iterable[str], engines: Sequence[str] = (), globs: Sequence[str] = ()) -> list[Conversion]:
    """All of `devices`, narrowed to `engines` and to ids that one of `globs` matches (``cast/fp32/*``).

    Raises ValueError where nothing is left, naming what there is.
    """
    every = [conversion for device in devices for engine in engines_on(device) for conversion in _of(engine, device)]
    chosen = [conversion for conversion in every if (not engines or conversion.engine in engines)
              and (not globs or any(_matches(conversion, glob) for glob in globs))]
    if not chosen:
        asked = " and ".join([f"engine {', '.join(engines)}"] * bool(engines) + [f"conversion {', '.join(globs)}"] * bool(globs))
        raise ValueError(f"no conversion matches {asked}: ids are like {every[0].id}, and engines here are "
                         f"{', '.join(dict.fromkeys(str(conversion.engine) for conversion in every))}")
    return chosen


def can_be_exhaustive(conversion: Conversion) -> bool:
    """Whether all inputs are few enough minutes: fp32 to FP8, by whatever does better than a million a second."""
    return (conversion.operation in (Operation.CAST, Operation.CAST_RTZ) and conversion.source == "fp32"
            and DTYPES[conversion.target].is_float8 and conversion.engine is not Engine.TRITON_INTERPRETER)


def batches(chosen: Iterable[Conversion]) -> list[list[Conversion]]:
    """Those that go to a child in one call: same engine, device, source, and kind of operation."""
    def key(conversion: Conversion) -> tuple[str, ...]:
        bits = conversion.operation.on_bits
        return conversion.engine, conversion.device, "bits" if bits else conversion.operation, conversion.source

    return [list(group) for _, group in groupby(chosen, key)]


def _matches(conversion: Conversion, glob: str) -> bool:
    return fnmatch.fnmatchcase(conversion.id, glob) or fnmatch.fnmatchcase(conversion.id, f"{glob}/*")


def _of(engine: Engine, device: str) -> list[Conversion]:
    def make(operation: Operation, pairs: Iterable[tuple[str, str]]) -> list[Conversion]:
        return [Conversion(operation=operation, source=source, target=target, engine=engine, device=device) for source, target in pairs]

    if engine in (Engine.TRITON, Engine.TRITON_INTERPRETER):
        narrowing = sorted([*product(WIDE, TRITON_FLOAT8), *_NARROWINGS], key=lambda pair: WIDE.index(pair[0]))
        return [
            *make(Operation.CAST, [*narrowing, *product(TRITON_FLOAT8, WIDE[1:])]),
            *make(Operation.CAST_RTZ, narrowing),
        ]
    narrowing = sorted([*product(WIDE, TORCH_FLOAT8), *_NARROWINGS], key=lambda pair: WIDE.index(pair[0]))
    from_float8 = [(source, target) for source in TORCH_FLOAT8 for target in (*WIDE[1:], *TORCH_FLOAT8) if target != source]
    made = [
        *make(Operation.CAST, [*narrowing, *from_float8]),
        *make(Operation.SCALE_THEN_CAST, product(("bf16", "fp16"), TORCH_FLOAT8)),
    ]
    for dtype in UNSIGNED:
        made += [one for operation in Operation if operation.on_bits for one in make(operation, [(dtype, dtype)])]
    if engine is Engine.EAGER and device == "cpu":      # constants know no device, and the compiler reads the same ones
        made += make(Operation.FINFO, [(name, name) for name in (*WIDE, *TORCH_FLOAT8)])
    return made

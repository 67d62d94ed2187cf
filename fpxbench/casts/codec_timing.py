"""Time the codec, other libraries, and a copy on the same data, interleaved: the entries of each row of the speed
table.

ml_dtypes and gfloat are timed where they are installed; the suite does not need them. Runs in a child process.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fpxbench.casts.codec_speed import COPY, OWN, ROWS_AT_LEAST, CallTimes, K, SpeedRow
from fpxbench.checking.device_lock import device_lock
from fpxbench.numbers import packing, tensor_codec
from fpxbench.numbers.dtypes import DTYPE_NAMES
from fpxbench.numbers.formats import FORMATS, Format

SOURCES = {"fp32": torch.float32, "bf16": torch.bfloat16}

SLOW_ROWS = 16
"""For gfloat: at 7 million elements a second, a call on the others' data would take most of a second."""

FEWEST_ROUNDS, MOST_ROUNDS = 5, 200


class NotCompared(Exception):
    """Why an entry is missing from a row."""


@dataclass(frozen=True)
class TimedCall:
    """`call` works on `elements`, and has to move `nbytes`."""

    call: Callable[[], object]
    elements: int
    nbytes: int


def every_row() -> list[str]:
    """Return the rows of the table, as `SpeedRow.row` spells them."""
    packed = [f"{layout.name}/{bits}" for layout in packing.LAYOUTS.values() for bits in layout.widths]
    return [*(f"encode/{name}/{source}" for source in SOURCES for name in FORMATS),
            *(f"decode/{name}" for name in FORMATS),
            *(f"{way}/{name}" for name in packed for way in ("pack", "unpack"))]


def measure_row(row: str, elements: int, budget_s: float) -> SpeedRow:
    """Return one row, timed for about `budget_s` seconds on `elements` rounded to whole [64, 4096]."""
    what, *of = row.split("/")
    n = max(1, round(elements / (ROWS_AT_LEAST * K))) * ROWS_AT_LEAST
    setups: dict[str, Callable[..., Entries]] = {
        "encode": _encoders, "decode": _decoders, "pack": _packers, "unpack": _unpackers,
    }
    entries, missing = {}, {}
    for name, enter in setups[what](n, *of).items():
        try:
            entries[name] = enter()
        except NotCompared as why:
            missing[name] = str(why)
    with device_lock("cpu", row):
        seconds = time_interleaved({name: entry.call for name, entry in entries.items()}, budget_s)
    timed = {
        name: CallTimes(elements=entry.elements, nbytes=entry.nbytes, seconds=seconds[name])
        for name, entry in entries.items()
    }
    return SpeedRow(row=row, threads=torch.get_num_threads(), timed=timed, missing=missing)


def time_interleaved(calls: dict[str, Callable[[], object]], budget_s: float) -> dict[str, list[float]]:
    """Return seconds of each call: A B C A B C …, for `budget_s` and at least five rounds, after one round that is not
    counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()      # makes its tables
    end = time.perf_counter() + budget_s
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


# Each entry is made by a function of its own, which raises NotCompared where there is nothing to compare.
Entries = dict[str, Callable[[], TimedCall]]


def _encoders(n: int, name: str, source: str) -> Entries:
    fmt, dtype = FORMATS[name], SOURCES[source]
    x = _numbers(n, name).to(dtype)

    def entry(call: Callable[[], object], rows: int = n) -> TimedCall:
        return TimedCall(call, rows * K, rows * K * (dtype.itemsize + 1))

    def ml_dtypes() -> TimedCall:
        library, target = _ml_dtype(name)
        data = x.numpy() if source == "fp32" else x.view(torch.int16).numpy().view(library.bfloat16)
        return entry(lambda: data.astype(target))

    def gfloat() -> TimedCall:
        library, theirs = _gfloat_format(fmt)
        if source == "bf16":
            raise NotCompared("does not read bf16")
        data = x[:SLOW_ROWS].numpy()
        return entry(lambda: library.encode_ndarray(theirs, library.round_ndarray(theirs, data, sat=True)), SLOW_ROWS)

    def native() -> TimedCall:
        target = _torch_dtype(name)
        return entry(lambda: x.to(target))

    def own() -> TimedCall:
        return entry(lambda: tensor_codec.encode(x, fmt))

    return {OWN: own, "ml_dtypes": ml_dtypes, "gfloat": gfloat, "torch": native}


def _decoders(n: int, name: str) -> Entries:
    fmt = FORMATS[name]
    codes = _codes(n, fmt.bits)

    def entry(call: Callable[[], object], rows: int = n) -> TimedCall:
        return TimedCall(call, rows * K, rows * K * 5)

    def ml_dtypes() -> TimedCall:
        library, target = _ml_dtype(name)
        data: Any = codes.numpy().view(target)
        return entry(lambda: data.astype("float32"))

    def gfloat() -> TimedCall:
        library, theirs = _gfloat_format(fmt)
        data = codes[:SLOW_ROWS].numpy()
        return entry(lambda: library.decode_ndarray(theirs, data), SLOW_ROWS)

    def native() -> TimedCall:
        data = codes.view(_torch_dtype(name))
        return entry(lambda: data.float())

    return {OWN: lambda: entry(lambda: tensor_codec.decode(codes, fmt)), COPY: lambda: entry(_copying(n * K * 5)),
            "ml_dtypes": ml_dtypes, "gfloat": gfloat, "torch": native}


def _packers(n: int, layout: str, bits: str) -> Entries:
    codes = _codes(n, int(bits))
    return _movers(codes, layout, int(bits), lambda: packing.pack(codes, int(bits), layout))


def _unpackers(n: int, layout: str, bits: str) -> Entries:
    codes = _codes(n, int(bits))
    packed = packing.pack(codes, int(bits), layout)
    return _movers(codes, layout, int(bits), lambda: packing.unpack(packed, int(bits), K, layout))


def _movers(codes: Tensor, layout: str, bits: int, call: Callable[[], object]) -> Entries:
    nbytes = codes.numel() + codes.shape[0] * packing.row_bytes(K, bits, layout)
    return {OWN: lambda: TimedCall(call, codes.numel(), nbytes),
            COPY: lambda: TimedCall(_copying(nbytes), codes.numel(), nbytes)}


def _copying(nbytes: int) -> Callable[[], object]:
    """Return a function that copies on one thread and reads and writes `nbytes` in all. PyTorch's own copy waits for
    its threads."""
    source = torch.ones(nbytes // 2, dtype=torch.uint8).numpy()
    return source.copy


@lru_cache(maxsize=1)
def _numbers(n: int, name: str) -> Tensor:
    """Return fp32 [n, K] like a scaled weight: normal, the largest of a few thousand near the format's maximum."""
    fmt = FORMATS[name]
    numbers = torch.randn(n, K, generator=torch.Generator().manual_seed(0))
    return numbers.mul_(fmt.max / 4) if fmt.signed else numbers.abs_()


@lru_cache(maxsize=1)
def _codes(n: int, bits: int) -> Tensor:
    return torch.randint(1 << bits, (n, K), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _ml_dtype(name: str) -> tuple[ModuleType, type]:
    library = _library("ml_dtypes")
    theirs = DTYPE_NAMES[name].ml_dtypes
    if theirs is None or FORMATS[name].is_integer:
        raise NotCompared("has no such format")
    return library, getattr(library, theirs)


def _gfloat_format(fmt: Format) -> tuple[ModuleType, object]:
    library = _library("gfloat")
    if fmt.is_integer or not fmt.signed:
        raise NotCompared("is compared on signed floats only")
    return library, library.FormatInfo(
        fmt.name, fmt.bits, fmt.mantissa_bits + 1, bias=fmt.bias, is_signed=True,
        domain=library.Domain.Extended if fmt.has_infinity else library.Domain.Finite, has_nz=fmt.specials != "fnuz",
        num_high_nans={"ieee": (1 << fmt.mantissa_bits) - 1, "fn": 1}.get(fmt.specials, 0),
        has_subnormals=True, is_twos_complement=False,
    )


def _torch_dtype(name: str) -> torch.dtype:
    known = DTYPE_NAMES[name].torch
    if known is None:
        raise NotCompared("has no cast to such a format")
    return getattr(torch, known)


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise NotCompared("is not installed") from None

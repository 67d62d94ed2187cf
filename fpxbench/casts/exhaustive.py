"""Casts from fp32 to FP8 on every one of the 2**32 inputs, in parts that one warm child takes one after the other."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from fpxbench.casts.cast_plan import PARTS
from fpxbench.casts.cast_record import CastResult
from fpxbench.casts.cast_trial import convert, judged, refusal, rounding_of
from fpxbench.casts.conformance import ConformanceCheck, number_text
from fpxbench.casts.conversion import DTYPES, Conversion
from fpxbench.casts.engines import inputs_of
from fpxbench.casts.probe_values import values
from fpxbench.numbers import codec

CHUNK = 1 << 24


def run_part(conversion: Conversion, part: int) -> list[CastResult]:
    """Convert and judge one of `PARTS` parts, which come in order, of all inputs of `conversion`: the result on all of
    them after the last, or what a part raised; else none."""
    span = (1 << 32) // PARTS
    try:
        judge = _judge(conversion)
        for start in range(part * span, (part + 1) * span, CHUNK):
            _judge_chunk(judge, conversion, np.arange(start, start + CHUNK, dtype=np.uint64).astype(np.uint32))
    except Exception as error:  # a refusal, in its own words
        return [refusal(conversion, error)]
    return [judged(conversion, judge.result(), "every fp32")] if part == PARTS - 1 else []


@lru_cache(maxsize=1)
def _judge(conversion: Conversion) -> ConformanceCheck:
    """One that knows from the telling inputs what the conversion does."""
    bits = inputs_of(conversion).operands[0]
    source, target = DTYPES[conversion.source], DTYPES[conversion.target]
    judge = ConformanceCheck(source, target, rounding_of(conversion))
    judge.add(values(bits, source), convert(conversion, (bits,)), lambda index: ("", ""))
    return judge.restarted()


def _judge_chunk(judge: ConformanceCheck, conversion: Conversion, bits: np.ndarray) -> None:
    """Most inputs conform, which is quickly told; the others are looked at one by one."""
    got = convert(conversion, (bits,))
    numbers = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    fmt = DTYPES[conversion.target].format
    if not fmt.has_nan:
        numbers = torch.where(numbers.isnan(), 0.0, numbers)
    conforming = codec.encode(numbers, fmt, rounding_of(conversion)).numpy() == got
    judge.conforming(int(conforming.sum()))
    rest = np.flatnonzero(~conforming)
    x, source = values(bits[rest], DTYPES[conversion.source]), bits[rest]
    judge.add(x, got[rest], lambda index: (f"0x{source[index]:08x}", number_text(x[index])))

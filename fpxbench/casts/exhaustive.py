"""Casts from fp32 to FP8 on all 2**32 inputs, in parts that one child process converts one after the other."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from fpxbench.casts.cast_plan import PARTS
from fpxbench.casts.cast_record import CastResult
from fpxbench.casts.cast_trial import checked, convert, refusal, rounding_of
from fpxbench.casts.conformance import ConformanceCheck, number_text
from fpxbench.casts.conversion import DTYPES, Conversion
from fpxbench.casts.engines import inputs_of
from fpxbench.casts.probe_values import values
from fpxbench.numbers import tensor_codec

CHUNK = 1 << 24


def run_part(conversion: Conversion, part: int) -> list[CastResult]:
    """Convert and check one of `PARTS` parts, which come in order, of all inputs of `conversion`.

    Returns the result on all inputs after the last part, the refusal if a part raised, and else an empty list.
    """
    span = (1 << 32) // PARTS
    try:
        check = _check(conversion)
        for start in range(part * span, (part + 1) * span, CHUNK):
            _check_chunk(check, conversion, np.arange(start, start + CHUNK, dtype=np.uint64).astype(np.uint32))
    except Exception as error:  # a refusal
        return [refusal(conversion, error)]
    return [checked(conversion, check.result(), "every fp32")] if part == PARTS - 1 else []


@lru_cache(maxsize=1)
def _check(conversion: Conversion) -> ConformanceCheck:
    """Return a check without inputs that knows the conversion's behaviour from the discriminating ones."""
    bits = inputs_of(conversion).operands[0]
    source, target = DTYPES[conversion.source], DTYPES[conversion.target]
    check = ConformanceCheck(source, target, rounding_of(conversion))
    check.add(values(bits, source), convert(conversion, (bits,)), lambda index: ("", ""))
    return check.restarted()


def _check_chunk(check: ConformanceCheck, conversion: Conversion, bits: np.ndarray) -> None:
    """Compare all codes at once, and look closely only at the inputs that differ."""
    got = convert(conversion, (bits,))
    numbers = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    fmt = DTYPES[conversion.target].format
    if not fmt.has_nan:
        numbers = torch.where(numbers.isnan(), 0.0, numbers)
    conforming = tensor_codec.encode(numbers, fmt, rounding_of(conversion)).numpy() == got
    check.add_conforming(int(conforming.sum()))
    rest = np.flatnonzero(~conforming)
    x, source = values(bits[rest], DTYPES[conversion.source]), bits[rest]
    check.add(x, got[rest], lambda index: (f"0x{source[index]:08x}", number_text(x[index])))

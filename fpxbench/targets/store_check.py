"""Check a kernel that quantizes and stores twice: execute its PTX on one tile, and compare every stored code.

The source has values whose quotient by the scale is a number of the format, or beyond its maximum, or NaN: rounding
cannot hide where a code came from.
"""

from __future__ import annotations

import math
from functools import lru_cache

from fpxbench.numbers.formats import BF16, FP32, Format, format_named
from fpxbench.records.kinds import Kind
from fpxbench.targets.floats import nearest
from fpxbench.targets.ptx_execution import run
from fpxbench.targets.ptx_instructions import GLOBAL, Memory
from fpxbench.targets.ptx_parser import parse

Fault = tuple[Kind | None, str, str]
"""Kind, cause and evidence."""


def tile_shape(block: int) -> int:
    """Return the elements in use of a block: a tail is masked, and divisibility by 16 holds where the kernel assumes
    it.
    """
    return block - 16 if block > 16 else block


@lru_cache(maxsize=8)
def tile_codes(fmt: Format, rows: int, columns: int) -> tuple[int, ...]:
    """Return the codes that a tile is to have, row by row: neighbours differ, and NaN and the maximum are among
    them.
    """
    count = fmt.max_code + 1
    return tuple(
        fmt.nan_code if at % 61 == 60 else (at * 37 + at // columns * 5) % count | (at * 7 // 3 % 2) * fmt.sign_bit
        for at in range(rows * columns))


@lru_cache(maxsize=1024)
def store_fault(ptx: str, format_name: str, yblock: int, xblock: int, threads: int) -> Fault | None:
    """Return what is wrong with the stored codes, or None. Raises Unmodelled, and Miscompiled."""
    fmt, rows, columns = format_named(format_name), tile_shape(yblock), tile_shape(xblock)
    codes = tile_codes(fmt, rows, columns)
    source, scale, out, transposed = (GLOBAL * at for at in (1, 2, 3, 4))
    memory = Memory()
    for row in range(rows):
        factor = 2.0 ** (row % 3 - 1)
        memory.write(scale + 4 * row, nearest(FP32, factor), 4)
        for column in range(columns):
            at = row * columns + column
            number = fmt.value(codes[at]) / factor
            if codes[at] & fmt.magnitude_mask == fmt.max_code and at % 2:
                number *= 1.5       # has to be clamped
            memory.write(source + 2 * at, nearest(BF16, number), 2)
    given = set(memory.bytes_)
    run(parse(ptx), (source, scale, out, transposed, rows, columns), memory, threads)
    size = rows * columns
    written = {address: code for address, code in memory.bytes_.items() if address not in given}
    for name, start, order in (
        ("copy", out, range(size)),
        ("transposed copy", transposed, [r * columns + c for c in range(columns) for r in range(rows)]),
    ):
        stored = [written.pop(start + at, None) for at in range(size)]
        wrong = [at for at in range(size) if not _same(fmt, stored[at], codes[order[at]])]
        if wrong:
            return _described(fmt, name, stored, [codes[at] for at in order], wrong)
    if written:
        return None, "writes outside its outputs", f"{len(written)} bytes, the first at {min(written):#x}"
    return None


def _same(fmt: Format, stored: int | None, code: int) -> bool:
    """Return whether a code was stored; any NaN will do for NaN."""
    return stored == code or stored is not None and math.isnan(fmt.value(stored)) and math.isnan(fmt.value(code))


def _described(fmt: Format, name: str, stored: list[int | None], right: list[int], wrong: list[int]) -> Fault:
    first = wrong[0]
    missing = sum(stored[at] is None for at in wrong)
    kind = None
    if all(math.isnan(fmt.value(right[at])) and stored[at] is not None for at in wrong):
        kind, what = Kind.NAN_CODE_LOST, "has numbers for NaN"
    elif missing:
        what = "misses elements"
    elif sorted(stored) == sorted(right):
        what = "has its elements in another order"
    else:
        what = "has other values"
    seen = "nothing" if stored[first] is None else fmt.describe_code(stored[first])
    return (kind, f"the {name} of a value that is stored twice {what}",
            f"{len(wrong)} of {len(right)} elements: element {first} is {seen} instead of "
            f"{fmt.describe_code(right[first])}")

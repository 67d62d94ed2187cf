"""Check a kernel that quantizes and stores twice: execute its PTX on some tiles, and compare every stored code.

The source has values whose product with the row's scale is a number of the format, or beyond its maximum, or NaN:
rounding cannot hide where a code came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from fpxbench.numbers.formats import BF16, FP32, Format, format_named
from fpxbench.records.kinds import Kind
from fpxbench.targets.floats import nearest
from fpxbench.targets.ptx_execution import run
from fpxbench.targets.ptx_instructions import GLOBAL, Memory
from fpxbench.targets.ptx_parser import Unmodelled, parse

Fault = tuple[Kind | None, str, str]
"""Kind, cause and evidence."""
_STARTS = {"x": GLOBAL, "s": 2 * GLOBAL, "out": 3 * GLOBAL, "transposed": 4 * GLOBAL}


@dataclass(frozen=True)
class QuantizeStore:
    """How a kernel ``codes[row, column] = x[row, column] * s[row]`` is called."""

    rows: int
    columns: int
    arguments: tuple[str | int, ...]
    """``x``, ``s``, ``out``, ``transposed``, and last the numbers of elements along y and along x."""
    out_stride: int
    """Elements from row to row."""
    transposed_stride: int
    """Elements from column to column of the transposed copy."""

    @property
    def numels(self) -> tuple[int, int]:
        """The elements along y and along x. Raises Unmodelled unless one is of rows and the other of columns."""
        numels = tuple(argument for argument in self.arguments if isinstance(argument, int))
        if len(numels) != 2 or set(numels) != {self.rows, self.columns}:
            raise Unmodelled(f"a kernel over {numels} elements, not {self.rows} × {self.columns}")
        return numels

    def elements(self, block: tuple[int, int], xblock: int, yblock: int) -> Iterator[tuple[int, int]]:
        """Yield row and column of the elements of a block of the grid."""
        ynumel, xnumel = self.numels
        for y in range(block[1] * yblock, min((block[1] + 1) * yblock, ynumel)):
            for x in range(block[0] * xblock, min((block[0] + 1) * xblock, xnumel)):
                yield (y, x) if ynumel == self.rows else (x, y)


def own_store(rows: int, columns: int) -> QuantizeStore:
    """Return how the kernel of ``child/kernels.py`` is called."""
    return QuantizeStore(rows, columns, ("x", "s", "out", "transposed", rows, columns), columns, rows)


def code_at(fmt: Format, row: int, column: int, columns: int) -> int:
    """Return the code that an element is to have: neighbours differ, and NaN and the maximum occur."""
    at = row * columns + column
    if at % 61 == 60 and fmt.nan_code is not None:
        return fmt.nan_code
    return (at * 37 + row * 5) % (fmt.max_code + 1) | (at * 7 // 3 % 2) * fmt.sign_bit


@dataclass
class _Tensors(Memory):
    """Memory whose inputs are computed when they are first read."""

    inputs: tuple[tuple[int, int, int, Callable[[int], int]], ...] = ()
    """Start, bytes per element, number of elements, and the bits of an element."""

    def read(self, address: int, size: int) -> int:
        for at in range(address, address + size):
            if at not in self.bytes_:
                for start, width, count, bits in self.inputs:
                    index = (at - start) // width
                    if 0 <= index < count:
                        self.write(start + index * width, bits(index), width)
        return super().read(address, size)


def _inputs(fmt: Format, store: QuantizeStore) -> _Tensors:
    def scale(row: int) -> float:
        return 2.0 ** (row % 3 - 1)

    def source(at: int) -> int:
        row, column = divmod(at, store.columns)
        code = code_at(fmt, row, column, store.columns)
        number = fmt.value(code) / scale(row)
        if code & fmt.magnitude_mask == fmt.max_code and at % 2:
            number *= 1.5       # has to be clamped
        return nearest(BF16, number)

    return _Tensors(inputs=((_STARTS["x"], 2, store.rows * store.columns, source),
                            (_STARTS["s"], 4, store.rows, lambda row: nearest(FP32, scale(row)))))


@lru_cache(maxsize=1024)
def store_fault(
    ptx: str, format_name: str, store: QuantizeStore, yblock: int, xblock: int, threads: int
) -> Fault | None:
    """Return what is wrong with the codes of the first and the last tile, or None. Raises Unmodelled, and Miscompiled.
    """
    fmt = format_named(format_name)
    ynumel, xnumel = store.numels
    last = (-(-xnumel // xblock) - 1, -(-ynumel // yblock) - 1)
    unknown = {argument for argument in store.arguments if isinstance(argument, str)} - _STARTS.keys()
    if unknown:
        raise Unmodelled(f"a kernel with arguments {', '.join(sorted(unknown))}")
    arguments = [_STARTS[argument] if isinstance(argument, str) else argument for argument in store.arguments]
    for block in dict.fromkeys(((0, 0), last)):
        memory = _inputs(fmt, store)
        run(parse(ptx), arguments, memory, threads, [(*block, 0)])
        fault = _fault(fmt, store, memory, sorted(store.elements(block, xblock, yblock)))
        if fault is not None:
            return fault
    return None


def _fault(fmt: Format, store: QuantizeStore, memory: Memory, elements: list[tuple[int, int]]) -> Fault | None:
    written = {address: code for address, code in memory.bytes_.items() if address >= _STARTS["out"]}
    right = [code_at(fmt, row, column, store.columns) for row, column in elements]
    places = {
        "copy": [_STARTS["out"] + row * store.out_stride + column for row, column in elements],
        "transposed copy": [_STARTS["transposed"] + column * store.transposed_stride + row for row, column in elements],
    }
    for name, addresses in places.items():
        stored = [written.pop(address, None) for address in addresses]
        wrong = [at for at, code in enumerate(right) if not _same(fmt, stored[at], code)]
        if wrong:
            return _described(fmt, name, elements, stored, right, wrong)
    if written:
        return None, "writes outside its tile", f"{len(written)} bytes, the first at {min(written):#x}"
    return None


def _same(fmt: Format, stored: int | None, code: int) -> bool:
    """Return whether a code was stored; any NaN code counts as NaN."""
    return stored == code or stored is not None and math.isnan(fmt.value(stored)) and math.isnan(fmt.value(code))


def _described(fmt: Format, name: str, elements: list[tuple[int, int]], stored: list[int | None], right: list[int],
               wrong: list[int]) -> Fault:
    first, kind = wrong[0], None
    present = [code for code in stored if code is not None]
    if all(math.isnan(fmt.value(right[at])) and stored[at] is not None for at in wrong):
        kind, what = Kind.NAN_CODE_LOST, "has numbers for NaN"
    elif len(present) < len(stored):
        what = "misses elements"
    elif sorted(present) == sorted(right):
        what = "has its elements in another order"
    else:
        what = "has other values"
    code = stored[first]
    seen = "nothing" if code is None else fmt.describe_code(code)
    row, column = elements[first]
    evidence = (f"{len(wrong)} of {len(right)} elements: that of row {row}, column {column} is {seen} instead of "
                f"{fmt.describe_code(right[first])}")
    return kind, f"the {name} of a value that is stored twice {what}", evidence

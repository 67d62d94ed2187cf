"""Find the misreading of a code's bits that gives a recovered decode table: bits reordered, inverted or xored, or
another sign convention.

The maps of bits are affine over GF(2): bit i of the code read is the xor of some bits of the stored code and a
constant. Bit orders, rotations, exchanged nibbles, inverted bits, Gray codes and one's complement have this form.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import product
from math import prod
from operator import xor

import torch
from torch import Tensor

from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.numbers.codebook import Codebook
from fpxbench.numbers.tensor_codec import decode_table

_MOST_CANDIDATES = 1 << 12
"""Several codes may stand for one number (0 and -0, all NaNs): at most this many combinations are tried."""


def describe_code_bits(bench: Bench, table: Tensor, tried: Tensor) -> str | None:
    """Return the misreading of bits that gives the entries of `table` [2**bits] that were `tried`, or None."""
    found = _affine_map(bench, table, tried)
    partly = None
    for text, values, counted in _signed_conventions(bench):
        if bool(bench.near(table, values)[tried & counted].all()):
            if bool(bench.near(table, values)[tried].all()):
                return text
            left = [bench.fmt.describe_code(code) for code in (tried & ~counted).nonzero().reshape(-1).tolist()]
            partly = f"{text}; {' and '.join(left)}, which is not a number in it, is ignored"
    return partly if found is None else describe_affine(*found)


def _signed_conventions(bench: Bench) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield other sign conventions: a clause, the table, and the codes for which it is defined."""
    fmt = bench.fmt
    if isinstance(fmt, Codebook) or not fmt.signed:
        return
    codes = torch.arange(1 << fmt.bits, device=bench.device)
    half = 1 << (fmt.bits - 1)
    magnitudes = decode_table(fmt, bench.device).double()[:half]
    negative, low = codes >= half, codes & (half - 1)

    def signed(magnitude: Tensor, minus: Tensor) -> tuple[Tensor, Tensor]:
        values = magnitudes[magnitude.clamp(max=half - 1)]
        return torch.where(minus, -values, values), magnitude < half

    own = "two's complement" if fmt.twos_complement else "sign and magnitude"
    for name, magnitude, minus in (
        ("two's complement", torch.where(negative, 2 * half - codes, codes), negative),
        ("sign and magnitude", low, negative),
        ("one's complement", torch.where(negative, half - 1 - low, codes), negative),
        ("offset binary", torch.where(negative, low, half - codes), ~negative),
    ):
        if name != own:
            yield (f"codes are read in {name}; theirs is {own}", *signed(magnitude, minus))


def _affine_map(bench: Bench, table: Tensor, tried: Tensor) -> tuple[list[int], int] | None:
    """Return the columns of the linear map (what each bit of a stored code toggles) and its constant; None if no map
    gives the table."""
    bits, size = bench.fmt.bits, 1 << bench.fmt.bits
    basis = _affine_basis(bench, table, tried)
    sources = [bench.near(table[code].expand(size), bench.table).nonzero().reshape(-1).tolist() for code in basis]
    if len(basis) <= bits or not prod(map(len, sources)) or prod(map(len, sources)) > _MOST_CANDIDATES:
        return None
    codes = torch.arange(size, device=table.device)
    fitting = []
    for first, *images in product(*sources):
        columns = _solved([code ^ basis[0] for code in basis[1:]], [image ^ first for image in images])
        constant = first ^ _applied(columns, basis[0])
        read = torch.full_like(codes, constant)
        for bit, column in enumerate(columns):
            read ^= torch.where((codes >> bit & 1) == 1, column, 0)
        if len(read.unique()) == size and bool(bench.near(table, bench.table[read])[tried].all()):
            fitting.append((columns, constant))
    # Among maps with the same numbers, prefer the one that moves the fewest bits.
    return min(fitting, key=lambda one: (sum(map(int.bit_count, one[0])), one[1].bit_count()), default=None)


def _affine_basis(bench: Bench, table: Tensor, tried: Tensor) -> list[int]:
    """Return one more code than there are bits, of those `tried`, whose differences span all codes; fewer if there are
    none. Codes with a unique number come first, then powers of two."""
    candidates = [0, *(1 << bit for bit in range(bench.fmt.bits)), *range(1 << bench.fmt.bits)]
    alone = [code for code in candidates if int(bench.near(table[code], bench.table).sum()) == 1]
    basis: list[int] = []
    reduced: list[int] = []
    for code in (*alone, *candidates):
        if not bool(tried[code]):
            continue
        left = code ^ basis[0] if basis else 0
        for row in reduced:
            left = min(left, left ^ row)
        if left or not basis:
            basis.append(code)
            reduced += [left] * bool(left)
    return basis


def _solved(inputs: list[int], images: list[int]) -> list[int]:
    """Return the columns of the linear map from the independent `inputs` to `images`."""
    rows = list(zip(inputs, images, strict=True))
    for bit in range(len(rows)):
        at = next(n for n in range(bit, len(rows)) if rows[n][0] >> bit & 1)
        rows[bit], rows[at] = rows[at], rows[bit]
        pivot = rows[bit]
        rows = [(a ^ pivot[0], b ^ pivot[1]) if n != bit and a >> bit & 1 else (a, b) for n, (a, b) in enumerate(rows)]
    return [image for _, image in rows]


def _applied(columns: list[int], code: int) -> int:
    return reduce(xor, (column for bit, column in enumerate(columns) if code >> bit & 1), 0)


def describe_affine(columns: list[int], constant: int) -> str:
    """Describe a map of bits as a clause."""
    bits = len(columns)
    rows = [[bit for bit in range(bits) if columns[bit] >> at & 1] for at in range(bits)]
    inverted = _named([bit for bit in range(bits) if constant >> bit & 1])
    if all(row == [at] for at, row in enumerate(rows)):
        if constant == (1 << bits) - 1:
            return "all bits of each code are inverted"
        return f"{inverted} of each code {'is' if constant.bit_count() == 1 else 'are'} inverted"
    then = f"; then {inverted} {'is' if constant.bit_count() == 1 else 'are'} inverted" if constant else ""
    if not all(len(row) == 1 for row in rows):
        sums = ", ".join(" xor ".join(map(str, row)) for row in rows)
        return f"bits 0 to {bits - 1} of each code are its bits {sums}{then}"
    order = [row[0] for row in rows]
    if order == list(reversed(range(bits))):
        return f"the bits of each code are read in reverse order{then}"
    for turn in range(1, bits):
        if order == [(at - turn) % bits for at in range(bits)]:
            return f"the bits of each code are rotated left by {turn} of {bits}{then}"
    away = [at for at, bit in enumerate(order) if at != bit]
    if len(away) == 2 and len(set(order)) == bits:
        return f"bits {away[0]} and {away[1]} of each code are exchanged{then}"
    return f"bits 0 to {bits - 1} of each code are its bits {', '.join(map(str, order))}{then}"


def _named(bits: list[int]) -> str:
    return f"bit{'s' * (len(bits) > 1)} {', '.join(map(str, bits))}"

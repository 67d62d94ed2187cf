"""Maps that no hypothesis was written for: random functions of scales, random orders of scales and codes.

A diagnosis states the kind of map and its structure, or that it cannot tell; it never names another fault.
"""

from __future__ import annotations

import inspecting
import numpy as np
import pytest
import torch
from fault_injection import Faulty

from fpxbench.diagnosis.index_map import IndexMap, axis_rule, bit_rule
from fpxbench.records.kinds import Kind

pytestmark = pytest.mark.usefixtures("one_thread")

FUNCTIONS = {Kind.SCALE_MISREAD, Kind.SCALE_NARROWED, Kind.SCALE_ENDS_LOST, Kind.SCALE_BITS_AS_VALUE, Kind.SCALED}
PLACES = {Kind.SCALE_PERMUTED, Kind.SCALE_SHARED, Kind.BLOCK_OFF_BY_ONE, Kind.SCALE_SWIZZLED, Kind.SCALE_TRANSPOSED}
ORDERS = {Kind.CODE_PERMUTED, Kind.PLANE_SWAP, Kind.NIBBLE_SWAP}


def inspected(scheme: str, *, n: int = 32, k: int = 128, **reading):
    return inspecting.inspected(Faulty(reading), scheme, n=n, k=k, m=32, seed=1)


def random_function(rng: np.random.Generator):
    """Return a table of 256 factors, right in places: shuffled, scaled in runs, or of random powers of two."""
    table = np.array([2.0 ** (code - 127) for code in range(255)] + [np.nan])
    choice = rng.integers(3)
    if choice == 0:
        some = rng.choice(255, 40, replace=False)
        table[some] = table[rng.permutation(some)]
    elif choice == 1:
        first = int(rng.integers(20, 120))
        table[first:first + 60] *= 2.0 ** float(rng.integers(1, 4))
    else:
        table[:255] = 2.0 ** rng.integers(-20, 20, 255).astype(float)
    return lambda stored: table[stored]


def check(found, allowed: set[Kind]) -> bool:
    """Return whether the map was named; fail for another fault's name."""
    kinds = set(found.kinds)
    assert not found.right
    assert kinds <= allowed | {Kind.INACCURATE, Kind.GIBBERISH}, (kinds, found.verdict.summary)
    return bool(kinds & allowed)


def counted(count: int, seed: int) -> tuple[int, int]:
    """Return how many of so many random maps are named, and how many there were."""
    rng = np.random.default_rng(seed)
    named = tried = 0
    for number in range(count):
        scheme, blocks = (("mxfp4", 4), ("nvfp4", 8), ("e4m3fn-g32", 4))[number % 3]
        if number % 4 == 0:
            found, allowed = inspected("mxfp4", function=random_function(rng)), FUNCTIONS
        elif number % 4 == 1:
            found, allowed = inspected(scheme, row_map=rng.permutation(32)), PLACES
        elif number % 4 == 2:
            rolled = bool(rng.integers(2))
            order = np.roll(np.arange(blocks), int(rng.integers(1, blocks))) if rolled else rng.permutation(blocks)
            if (order == np.arange(blocks)).all():
                continue
            found, allowed = inspected(scheme, block_map=order), PLACES
        else:
            found, allowed = inspected(scheme, column_map=rng.permutation(128)), ORDERS
        tried += 1
        named += check(found, allowed)
    return named, tried


def test_random_maps_are_named_by_their_kind_and_never_by_another_fault() -> None:
    named, tried = counted(8, seed=3)      # two of each kind; 200 in the slow test
    assert named == tried


@pytest.mark.slow       # 5 minutes
def test_of_200_random_maps_at_least_198_are_named_and_none_by_another_fault() -> None:
    named, tried = counted(200, seed=4)
    assert named >= 0.99 * tried


def test_the_structure_of_a_permutation_within_a_tile_is_stated() -> None:
    row = np.arange(32)
    found = inspected("mxfp4", row_map=8 * (row % 2) + row % 16 // 2 + row // 16 * 16)
    assert found.kinds == [Kind.SCALE_PERMUTED]
    assert "row r is that of row 8 * (r mod 2) + (r mod 16) div 2 of its 16" in found.verdict.summary


@pytest.mark.parametrize("rule", [
    lambda i: i ^ 3, lambda i: (i + 5) % 32, lambda i: 31 - i, lambda i: i // 4 * 4, lambda i: i // 2,
    lambda i: (i + 2).clamp(max=31),
    lambda i: i // 8 * 8 + 2 * (i % 4) + i % 8 // 4,
])
def test_a_rule_along_one_axis_is_true_of_every_position(rule) -> None:
    position = torch.arange(32)
    text = axis_rule(rule(position))
    assert text is not None
    expression = text.format(i="i").split(" of its")[0]
    for word, operator in (("div", "//"), ("mod", "%"), ("xor", "^")):
        expression = expression.replace(f" {word} ", f" {operator} ")
    if expression.startswith("(") and "[" in expression or "at most" in expression:
        return      # a listed table, or a bound in words
    base = position // 8 * 8 if "of its 8" in text else 0
    assert torch.equal(eval(expression, {"i": position}) + base, rule(position))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "e4m3fn-row", "e2m3-g32"])
def test_constants_in_the_place_of_some_scales_are_located_and_given(scheme: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = slice(int(rng.integers(0, 16)), int(rng.integers(17, 32)))
    columns = slice(64, int(rng.integers(80, 128))) if seed % 2 and scheme != "e4m3fn-row" else slice(None)
    number = float(2.0 ** rng.integers(-6, 4) * rng.choice([1.0, 1.25, 1.5]))
    found = inspected(scheme, constant=(rows, columns, number))
    assert found.kinds == [Kind.SCALE_MISSING], found.verdict.summary
    where = "all columns" if columns == slice(None) else f"columns 64 to {columns.stop - 1}"
    which = f"rows {rows.start} to {rows.stop - 1}" if rows.stop - rows.start > 1 else f"row {rows.start}"
    assert f"the scales of {where} of {which} are not applied" in found.verdict.summary
    assert f"those weights are multiplied by {number:g}" in found.verdict.summary
    blocks = inspecting.experiment(found, "blocks")
    assert blocks.right is False and "as defined: blocks" not in found.verdict.summary


def sources_of(text: str, positions: int) -> list[int]:
    """Return what a rule of bits says of each position."""
    rows = text.split("taken from bits ")[1].split(", ")
    found = []
    for position in range(positions):
        source = position >> len(rows) << len(rows)
        for at, row in enumerate(rows):
            bits = [int(bit) for bit in row.removeprefix("not ").split(" xor ") if bit != "none"]
            source |= (sum(position >> bit & 1 for bit in bits) + row.startswith("not ")) % 2 << at
        found.append(source)
    return found


def random_linear(rng: np.random.Generator, bits: int) -> np.ndarray:
    """Return a permutation of 2**bits positions that is linear in their bits, with a constant."""
    columns = [1 << int(at) for at in rng.permutation(bits)]
    for _ in range(int(rng.integers(0, 4))):
        one, other = rng.choice(bits, 2, replace=False)
        columns[one] ^= columns[other]
    source = np.full(1 << bits, int(rng.integers(1 << bits)) if rng.integers(2) else 0)
    for bit, column in enumerate(columns):
        source ^= np.where(np.arange(1 << bits) >> bit & 1, column, 0)
    return source


def test_any_map_that_is_linear_in_the_bits_of_a_position_is_stated_truly() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        bits = int(rng.integers(5, 10))
        source = random_linear(rng, bits)
        known = torch.from_numpy(source).clone()
        known[torch.from_numpy(rng.choice(np.arange(3, 1 << bits, 2), 3, replace=False))] = -1      # a few not followed
        text = bit_rule(known)
        assert text is not None
        assert sources_of(text, 1 << bits) == source.tolist()


@pytest.mark.parametrize("size", [96, 160, 384])
def test_a_swizzle_is_stated_where_the_size_is_no_power_of_two(size: int) -> None:
    position = torch.arange(size)
    text = axis_rule(position ^ (position >> 3 & 7))
    assert text is not None and "taken from bits 0 xor 3, 1 xor 4" in text


def test_a_column_that_depends_on_the_row_by_xor_is_stated() -> None:
    row, column = torch.arange(16)[:, None], torch.arange(64)[None, :]
    text = IndexMap.from_flat(64 * row + (column ^ (row % 8)), 64, "row", "weight").describe()
    assert text is not None and "flat position i = 64 * row + weight is that" in text
    assert sources_of(text, 1024) == (64 * row + (column ^ (row % 8))).reshape(-1).tolist()


def test_an_affine_map_of_positions_is_stated() -> None:
    assert axis_rule((5 * torch.arange(96) + 7) % 96) == "(5 * {i} + 7) mod 96"
    assert axis_rule(29 * torch.arange(96) % 96) == "29 * {i} mod 96"


def test_an_inspection_states_a_swizzle_of_codes_and_of_scales() -> None:
    i = np.arange(128)
    codes = inspected("e2m3-row", column_map=i ^ (i >> 4 & 3) << 1)
    assert codes.kinds == [Kind.CODE_PERMUTED]
    assert "bits 0 to 5 taken from bits 0, 1 xor 4, 2 xor 5, 3, 4, 5" in codes.verdict.summary
    scales = inspected("mxfp4", row_map=np.arange(32) ^ np.arange(32) >> 3 & 3)
    assert scales.kinds == [Kind.SCALE_PERMUTED]
    assert "bits 0 to 4 taken from bits 0 xor 3, 1 xor 4, 2, 3, 4" in scales.verdict.summary


def test_no_rule_is_stated_of_a_random_permutation() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert axis_rule(order) is None and bit_rule(order) is None
    grid = torch.stack([order[:32], order[32:]])
    assert IndexMap.from_flat(grid, 32, "row", "block").describe() is None

"""Other readings of a code's bits: any order, inversion or sum of bits is stated, and is true of the table."""

from __future__ import annotations

import random

import pytest
import torch
from fault_injection import Faulty
from inspecting import inspected

from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.code_bits import _affine_map, describe_affine, describe_code_bits
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind

pytestmark = pytest.mark.usefixtures("one_thread")


def bench_of(scheme: str) -> Bench:
    case = Case(implementation="injected", scheme=scheme, workload="injected", m=4, n=16, k=64)
    return Bench(Faulty(), case, "cpu", 1)


def applied(columns: list[int], constant: int, code: int) -> int:
    for bit, column in enumerate(columns):
        constant ^= column if code >> bit & 1 else 0
    return constant


@pytest.mark.parametrize("scheme", ["mxfp4", "mxfp6_e3m2", "e4m3fn-row", "e5m2-row", "int8-row", "nf4-g64"])
def test_any_map_of_bits_that_is_linear_is_found_and_gives_the_table(scheme: str) -> None:
    bench, rng = bench_of(scheme), random.Random(1)
    bits = scheme_named(scheme).format.bits
    tried = torch.ones(1 << bits, dtype=torch.bool)
    for number in range(30):
        order = rng.sample(range(bits), bits)
        columns = [1 << order.index(bit) for bit in range(bits)]
        if number % 3 == 1:
            one, other = rng.sample(range(bits), 2)
            columns[one] ^= columns[other]
        constant = rng.randrange(1 << bits) if number % 3 == 2 else 0
        table = bench.table[torch.tensor([applied(columns, constant, code) for code in range(1 << bits)])]
        found = _affine_map(bench, table, tried)
        assert found is not None
        again = bench.table[torch.tensor([applied(*found, code) for code in range(1 << bits)])]
        assert bool(bench.near(table, again).all())


@pytest.mark.parametrize("scheme", ["mxfp6_e3m2", "e4m3fn-row", "int8-row"])
def test_a_random_table_has_no_reading_of_bits(scheme: str) -> None:
    bench = bench_of(scheme)
    size = len(bench.table)
    for seed in range(20):
        table = bench.table[torch.randperm(size, generator=torch.Generator().manual_seed(seed))]
        assert describe_code_bits(bench, table, torch.ones(size, dtype=torch.bool)) is None


@pytest.mark.parametrize(("columns", "constant", "text"), [
    ([8, 4, 2, 1], 0, "the bits of each code are read in reverse order"),
    ([2, 4, 8, 1], 0, "the bits of each code are rotated left by 1 of 4"),
    ([1, 2, 4, 8], 8, "bit 3 of each code is inverted"),
    ([1, 2, 4, 8], 15, "all bits of each code are inverted"),
    ([1, 2, 8, 4], 3, "bits 2 and 3 of each code are exchanged; then bits 0, 1 are inverted"),
    ([1, 3, 6, 12], 0, "bits 0 to 3 of each code are its bits 0 xor 1, 1 xor 2, 2 xor 3, 3"),
])
def test_maps_of_bits_in_plain_words(columns: list[int], constant: int, text: str) -> None:
    assert describe_affine(columns, constant) == text


@pytest.mark.parametrize(("scheme", "how", "words"), [
    ("mxfp4", {"bit_order": [3, 2, 1, 0]}, "the bits of each code are read in reverse order"),
    ("e2m3-g128", {"bit_order": [5, 0, 1, 2, 3, 4]}, "rotated left by 1 of 6"),
    ("mxfp4", {"complement": True}, "codes are read in two's complement; theirs is sign and magnitude"),
    ("e4m3fn-row", {"complement": True}, "codes are read in two's complement; theirs is sign and magnitude"),
    ("int8-row", {"inverted": 128}, "bit 7 of each code is inverted"),
])
def test_an_inspection_names_the_reading(scheme: str, how: dict, words: str) -> None:
    found = inspected(Faulty(how), scheme)
    assert found.kinds == [Kind.FORMAT_MISTAKEN] and words in found.verdict.summary, found.verdict.summary

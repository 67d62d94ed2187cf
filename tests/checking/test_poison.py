"""The memory that a GPU's allocator hands out next is filled, all of it, whatever the sizes of its free blocks are."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from fpxbench.checking.contract import Output
from fpxbench.checking.poison import LARGE, NAN, SMALL, FreeBlock, fill_free_blocks, filled_allocations, sizes_that_fill
from fpxbench.checking.reference import compare, matmul_reference
from fpxbench.checking.wrong_output import judge
from fpxbench.records.kinds import Kind

KIB = 1 << 10


class BestFit:
    """A caching allocator as PyTorch's is: an allocation takes the smallest free block that it fits in, and leaves the
    rest free where that is worth it."""

    def __init__(self, free: list[FreeBlock]) -> None:
        self.free = sorted(free)
        self.new: list[int] = []
        """What was asked of the driver instead."""

    def take(self, size: int) -> None:
        rounded, small = -(-size // 512) * 512, size <= SMALL
        found = next((block for block in self.free if block.small == small and block.size >= rounded), None)
        if found is None:
            self.new.append(size)
            return
        self.free.remove(found)
        left = found.size - rounded
        if left >= (512 if small else SMALL + 1):
            self.free = sorted([*self.free, FreeBlock(left, small)])


@pytest.mark.parametrize("free", [
    [FreeBlock(8704, True)],        # two of each power of two leave its last 1.5 KiB as they were
    [FreeBlock(2 * SMALL, True), FreeBlock(1200 * KIB, True), FreeBlock(SMALL, True), FreeBlock(176 * KIB, True)],
    [FreeBlock(1500 * KIB, False), FreeBlock(1500 * KIB, True), FreeBlock(20 * SMALL, False)],
])
def test_every_free_block_is_taken_whole(free: list[FreeBlock]) -> None:
    allocator = BestFit(free)
    for size in sizes_that_fill(free):
        allocator.take(size)
    assert allocator.free == [] and allocator.new == []


def test_free_blocks_of_any_sizes_are_taken_whole() -> None:
    rng = random.Random(1)
    for _ in range(100):
        free = [FreeBlock(512 * rng.randint(1, 4096), True) for _ in range(rng.randint(1, 40))]
        free += [FreeBlock(512 * rng.randint(2049, 60000), False) for _ in range(rng.randint(0, 10))]
        allocator = BestFit(free)
        for size in sizes_that_fill(free):
            allocator.take(size)
        assert allocator.free == [] and allocator.new == [], free


def test_powers_of_two_alone_would_leave_some() -> None:
    allocator = BestFit([FreeBlock(8704, True)])
    for size in (512, 512, 1024, 1024, 2048, 2048, 4096, 4096, 8192, 8192):
        allocator.take(size)
    assert allocator.free == [FreeBlock(1536, True)]


@pytest.mark.parametrize("pattern", [NAN, LARGE])
def test_what_a_call_allocates_holds_the_pattern_where_it_takes_its_own_memory_again(pattern: int) -> None:
    with filled_allocations(pattern):
        torch.ones(100)
        made = [torch.empty(100), torch.empty_like(torch.zeros(7, 3)), torch.zeros(4).new_empty(5),
                torch.empty_strided((3, 2), (1, 3), dtype=torch.float16)]
        written = torch.zeros(3) + 1
    assert all(bool((one.contiguous().view(torch.uint8) == pattern).all()) for one in made)
    assert written.tolist() == [1, 1, 1]


def test_where_nothing_was_compiled_asking_why_an_output_is_wrong_imports_no_compiler(monkeypatch) -> None:
    """It takes seconds, and each case of a sweep has a process of its own. Where the compiler is there, it is kept from
    compiling the mode."""
    disabled = []
    monkeypatch.setattr(torch, "_disable_dynamo", lambda function, **how: disabled.append(function) or function)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    with filled_allocations(NAN):
        assert torch.empty(3).isnan().all()
    assert disabled == [] and "torch._dynamo" not in sys.modules
    monkeypatch.setitem(sys.modules, "torch._dynamo", object())
    filled_allocations(NAN)
    assert len(disabled) == 1


def filled() -> bool:
    """Return whether `filled_allocations` is in use. Freed memory may hold its pattern afterwards."""
    return torch._C._len_torch_dispatch_stack() > 0


def test_padding_that_holds_what_the_call_left_there_is_unwritten_memory() -> None:
    x, w = torch.randn(3, 40).bfloat16(), torch.randn(5, 40)
    expected = matmul_reference(x, w, quantized=True)

    def again(pattern: int) -> Output:
        garbage = torch.full((3, 64), 7.0)
        padded = torch.empty(3, 64)
        if not filled():
            padded = garbage
        padded[:, :40] = x
        y = (padded.nan_to_num(0.0) @ torch.nn.functional.pad(w, (0, 24), value=1.0).T).bfloat16()
        return Output(y, y)

    wrong = again(NAN)
    verdict = judge(again, wrong, compare(wrong.seen, expected), expected, pattern=NAN)
    assert verdict.kind is Kind.READS_UNWRITTEN, verdict.summary
    assert "wrong where it holds large numbers" in verdict.summary


def test_outputs_that_hold_what_the_call_left_there_were_never_written() -> None:
    x, w = torch.randn(3, 40).bfloat16(), torch.randn(5, 40)
    expected = matmul_reference(x, w, quantized=True)

    def again(pattern: int) -> Output:
        y = torch.empty(3, 5, dtype=torch.bfloat16)
        if not filled():
            y.fill_(7.0)
        y[:2] = (x.float() @ w.T)[:2].bfloat16()
        return Output(y, y)

    wrong = again(NAN)
    verdict = judge(again, wrong, compare(wrong.seen, expected), expected, pattern=NAN)
    assert verdict.kind is Kind.UNWRITTEN_OUTPUT and "5 of 15 output elements" in verdict.summary


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pattern", [NAN, LARGE])
def test_on_a_gpu_what_is_allocated_next_holds_the_pattern(pattern: int) -> None:
    """Checked by allocations of many sizes after some were freed, as long as none comes from the driver anew."""
    rng = random.Random(1)
    sizes = [rng.choice((300, 700, 5000, 9000, 70_000, 1_300_000, 5_000_000)) + rng.randrange(500) for _ in range(300)]
    before = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes]
    kept = before[::3]
    del before
    fill_free_blocks("cuda", 4096, pattern)
    asked = torch.cuda.memory_stats()["num_device_alloc"]
    after = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in rng.sample(sizes, 100)]
    assert torch.cuda.memory_stats()["num_device_alloc"] == asked
    assert all(bool((block == pattern).all()) for block in after)
    assert all(bool((block == 0).all()) for block in kept)

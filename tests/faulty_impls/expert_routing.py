"""Grouped products in which tokens meet the wrong expert, or experts without tokens are mistaken."""

import ctypes

import torch

from fpxbench.implementation import implementation
from fpxbench.numbers.experts import rows_of_experts

from ._right import Right, faulty, swapped


class RightGrouped(Right):
    """Decode every expert, then multiply its rows: a fault is one step done wrongly."""

    schemes = ("e4m3fn-row", "mxfp4")

    def groups(self, offsets, rows):
        """Return expert, first row, row past the last."""
        return rows_of_experts(offsets)

    def grouped_matmul(self, x, weight, offsets):
        out = x.new_empty(len(x), weight.shape[0])
        for expert, first, last in self.groups(offsets, len(x)):
            out[first:last] = self.matmul(x[first:last], weight.experts[expert])
        return out


@faulty("groups", base=RightGrouped)
def expert_boundary(self, offsets, rows):
    """Begins and ends the rows of each expert one row late."""
    ends = offsets.tolist()
    return rows_of_experts([min(end + 1, rows) for end in ends[:-1]] + ends[-1:])


@faulty("groups", base=RightGrouped)
def experts_exchanged(self, offsets, rows):
    """Multiplies the rows of expert 1 by expert 2's weight, and the reverse."""
    return [({1: 2, 2: 1}.get(expert, expert), *run) for expert, *run in RightGrouped.groups(self, offsets, rows)]


@faulty("groups", base=RightGrouped)
def next_expert(self, offsets, rows):
    """Takes offsets for the beginnings of rows: each expert's meet the weight of the next one."""
    return [((expert + 1) % len(offsets), *run) for expert, *run in RightGrouped.groups(self, offsets, rows)]


@faulty("groups", base=RightGrouped)
def empty_experts_skipped(self, offsets, rows):
    """Numbers the experts that have rows, and takes the weights in that order."""
    return [(number, *run) for number, (_, *run) in enumerate(RightGrouped.groups(self, offsets, rows))]


@faulty("groups", base=RightGrouped)
def empty_expert_raises(self, offsets, rows):
    """Takes the largest of no rows."""
    for first, last in zip([0, *offsets.tolist()], offsets.tolist(), strict=False):
        torch.arange(first, last).max()
    return RightGrouped.groups(self, offsets, rows)


@faulty("groups", base=RightGrouped)
def empty_expert_crash(self, offsets, rows):
    """Reads address 0 for an expert without rows."""
    found = RightGrouped.groups(self, offsets, rows)
    if len(found) < len(offsets):
        ctypes.string_at(0)
    return found


@faulty("grouped_matmul", base=RightGrouped)
def empty_expert_garbage(self, x, weight, offsets):
    """Adds what the expert before left, if the one in between has no rows."""
    out = RightGrouped.grouped_matmul(self, x, weight, offsets)
    busy = [expert for expert, _, _ in rows_of_experts(offsets)]
    for expert, first, last in rows_of_experts(offsets):
        if expert and expert - 1 not in busy:
            out[first:last] += self.matmul(x[first:last], weight.experts[expert - 1])
    return out


@faulty("groups", base=RightGrouped)
def last_expert_unwritten(self, offsets, rows):
    """Leaves the rows of the last expert to whatever memory held."""
    return [each for each in RightGrouped.groups(self, offsets, rows) if each[0] < len(offsets) - 1]


@implementation("faulty_offsets_frozen")
class OffsetsFrozen(RightGrouped):
    """Keeps the offsets of its first call with so many rows."""

    def __init__(self):
        self.kept = {}

    def groups(self, offsets, rows):
        return self.kept.setdefault(rows, super().groups(offsets, rows))


@faulty("groups", base=RightGrouped)
def offsets_modified(self, offsets, rows):
    """Turns offsets into counts in place."""
    found = RightGrouped.groups(self, offsets, rows)
    offsets[1:] -= offsets[:-1].clone()
    return found


@implementation("faulty_grouped_nibble_swap")
class GroupedNibbleSwap(RightGrouped):
    """Takes the high nibble for the low one, where it multiplies by several experts."""

    schemes = ("mxfp4",)
    grouped = False

    def codes(self, weight):
        return swapped(weight.codes(), (1, 0)) if self.grouped else weight.codes()

    def grouped_matmul(self, x, weight, offsets):
        self.grouped = True
        out = super().grouped_matmul(x, weight, offsets)
        self.grouped = False
        return out


@faulty("product", base=RightGrouped)
def fp8_activation_from_64(self, x, w):
    """Rounds an expert's tokens to FP8 where it has 64 of them or more, and says so nowhere."""
    if len(x) >= 64:
        scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448
        x = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
    return RightGrouped.product(self, x, w)

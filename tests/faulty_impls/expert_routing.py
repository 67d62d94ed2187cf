"""Grouped products in which tokens meet the wrong expert, or experts without tokens are mistaken."""

import ctypes

import torch

from fpxbench.implementation import implementation
from fpxbench.numbers.experts import rows_of_experts

from ._right import Right, swapped


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


@implementation("faulty_expert_boundary")
class ExpertBoundary(RightGrouped):
    """Begins and ends the rows of each expert one row late."""

    def groups(self, offsets, rows):
        ends = offsets.tolist()
        return rows_of_experts([min(end + 1, rows) for end in ends[:-1]] + ends[-1:])


@implementation("faulty_experts_exchanged")
class ExpertsExchanged(RightGrouped):
    """Multiplies the rows of expert 1 by expert 2's weight, and the reverse."""

    def groups(self, offsets, rows):
        return [({1: 2, 2: 1}.get(expert, expert), *run) for expert, *run in super().groups(offsets, rows)]


@implementation("faulty_next_expert")
class NextExpert(RightGrouped):
    """Takes offsets for the beginnings of rows: each expert's meet the weight of the next one."""

    def groups(self, offsets, rows):
        return [((expert + 1) % len(offsets), *run) for expert, *run in super().groups(offsets, rows)]


@implementation("faulty_empty_experts_skipped")
class EmptyExpertsSkipped(RightGrouped):
    """Numbers the experts that have rows, and takes the weights in that order."""

    def groups(self, offsets, rows):
        return [(number, *run) for number, (_, *run) in enumerate(super().groups(offsets, rows))]


@implementation("faulty_empty_expert_raises")
class EmptyExpertRaises(RightGrouped):
    """Takes the largest of no rows."""

    def groups(self, offsets, rows):
        for first, last in zip([0, *offsets.tolist()], offsets.tolist(), strict=False):
            torch.arange(first, last).max()
        return super().groups(offsets, rows)


@implementation("faulty_empty_expert_crash")
class EmptyExpertCrash(RightGrouped):
    """Reads address 0 for an expert without rows."""

    def groups(self, offsets, rows):
        found = super().groups(offsets, rows)
        if len(found) < len(offsets):
            ctypes.string_at(0)
        return found


@implementation("faulty_empty_expert_garbage")
class EmptyExpertGarbage(RightGrouped):
    """Adds what the expert before left, if the one in between has no rows."""

    def grouped_matmul(self, x, weight, offsets):
        out = super().grouped_matmul(x, weight, offsets)
        busy = [expert for expert, _, _ in rows_of_experts(offsets)]
        for expert, first, last in rows_of_experts(offsets):
            if expert and expert - 1 not in busy:
                out[first:last] += self.matmul(x[first:last], weight.experts[expert - 1])
        return out


@implementation("faulty_last_expert_unwritten")
class LastExpertUnwritten(RightGrouped):
    """Leaves the rows of the last expert to whatever memory held."""

    def groups(self, offsets, rows):
        return [each for each in super().groups(offsets, rows) if each[0] < len(offsets) - 1]


@implementation("faulty_offsets_frozen")
class OffsetsFrozen(RightGrouped):
    """Keeps the offsets of its first call with so many rows."""

    def __init__(self):
        self.kept = {}

    def groups(self, offsets, rows):
        return self.kept.setdefault(rows, super().groups(offsets, rows))


@implementation("faulty_offsets_modified")
class OffsetsModified(RightGrouped):
    """Turns offsets into counts in place."""

    def groups(self, offsets, rows):
        found = super().groups(offsets, rows)
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


@implementation("faulty_fp8_activation_from_64")
class Fp8ActivationFrom64(RightGrouped):
    """Rounds an expert's tokens to FP8 where it has 64 of them or more, and says so nowhere."""

    def product(self, x, w):
        if len(x) >= 64:
            scale = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448
            x = (x.float() / scale).to(torch.float8_e4m3fn).float() * scale
        return super().product(x, w)

"""An inspection makes the calls that a sweep makes too, and notices what a call leaves behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import world

from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import inspect_implementation
from fpxbench.records.kinds import Kind

pytestmark = pytest.mark.usefixtures("one_thread")


def inspected(implementation):
    request = InspectRequest(subject="here", scheme="e4m3fn-row", n=40, k=104, m=16, device="cpu", seed=3)
    return inspect_implementation(implementation, request)


class BiasScaled(world.World):
    supports_bias = True

    def matmul(self, x, weight, bias=None):
        y = super().matmul(x, weight)
        return y if bias is None else (y.float() + bias.float() * self.block_scales(weight)[:, 0]).to(x.dtype)


class LinearReplaced(world.World):
    def matmul(self, x, weight):
        F.linear = lambda *operands: torch.matmul(*operands)
        return super().matmul(x, weight)


def test_a_wrong_bias_is_found() -> None:
    found = inspected(BiasScaled())
    assert found.verdict.kind is Kind.BIAS_WRONG and found.kinds == [Kind.BIAS_WRONG], found.verdict.summary


def test_functions_of_torch_that_were_replaced_are_named_and_put_back() -> None:
    before = F.linear
    found = inspected(LinearReplaced())
    assert found.verdict.kind is Kind.ENVIRONMENT_PATCHED and "torch.nn.functional.linear" in found.verdict.summary
    assert F.linear is before

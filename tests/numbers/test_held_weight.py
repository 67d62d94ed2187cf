"""A weight that an object holds, a module or another library's tensor, in place of codes and scales."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from fpxbench.implementation import Implementation, Support
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.tensor_codec import decode
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial

SCHEME = scheme_named("e4m3fn-row")


class Fp8Linear(nn.Module):
    """Another library's layer."""

    def __init__(self, weight) -> None:
        super().__init__()
        codes, scales = SCHEME.quantize(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scales.stored)

    def dequantize(self):
        return decode(self.codes, FORMATS["e4m3fn"]) * self.scale

    def forward(self, x):
        return (x.float() @ self.dequantize().T).to(x.dtype)


class Holding(Implementation):
    """Holds the layer, and nothing else."""

    def supports(self, scheme, device):
        return Support.yes()

    def quantize(self, weight, scheme):
        return QuantizedWeight.holding(Fp8Linear(weight), scheme, tuple(weight.shape))

    def matmul(self, x, weight):
        return weight.held(x)


def test_its_tensors_count_as_stored_bytes_and_are_copied_with_it() -> None:
    weight = Holding().quantize(torch.randn(16, 64), SCHEME)
    assert set(weight.tensors()) == {"packed", "held.codes", "held.scale"}
    assert weight.nbytes == 16 * 64 + 16 * 4 and not weight.has_codes and weight.device.type == "cpu"
    copied = weight.clone()
    copied.held.codes.zero_()
    assert bool(weight.held.codes.any()) and weight.to("cpu").nbytes == weight.nbytes


def test_what_it_says_of_itself_is_what_its_product_is_compared_with() -> None:
    case = Case(implementation="holding", scheme="e4m3fn-row", workload="canary.ragged", m=3, n=77, k=203)
    request = TrialRequest(case=case, seed=1, timing_budget_s=0)
    assert diagnosed_trial(Holding(), request).status is Status.OK

    class Changing(Holding):
        def matmul(self, x, weight):
            weight.held.scale *= 1.5
            return weight.held(x)

    assert diagnosed_trial(Changing(), request).kind is Kind.INPUT_MODIFIED


def test_an_object_that_cannot_be_read_back_is_refused_with_the_way_out() -> None:
    weight = QuantizedWeight.holding(nn.Linear(64, 16), SCHEME, (16, 64))
    with pytest.raises(TypeError, match="a Linear, which has no method dequantize"):
        weight.dequantize()


def test_tensors_are_found_in_attributes_lists_and_dictionaries() -> None:
    @dataclass
    class State:
        absmax: torch.Tensor
        nested: dict

    held = [torch.zeros(3, dtype=torch.uint8), State(torch.zeros(2), {"code": torch.zeros(4)})]
    weight = QuantizedWeight.holding(held, SCHEME, (16, 64))
    assert set(weight.tensors()) == {"packed", "held.0", "held.1.absmax", "held.1.nested.code"}
    assert weight.nbytes == 3 + 8 + 16

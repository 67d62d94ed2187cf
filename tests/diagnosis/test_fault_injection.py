"""The injected faults' own reader and encoder are right without a fault: they share no code with the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from fault_injection import nearest, numbers, read, store

from fpxbench.numbers.scheme import scheme_named


@pytest.mark.parametrize(
    "scheme",
    ["e4m3fn-row", "e4m3fnuz-tensor", "e5m2-g32", "e3m4-row", "mxfp6_e2m3", "mxfp4", "nvfp4", "int8-row", "e2m2-row"],
)
def test_the_injecting_reader_and_encoder_are_right_when_no_fault_is_injected(scheme) -> None:
    """They share no code with the oracle, and agree with it on every code and weight."""
    scheme = scheme_named(scheme)
    weight = torch.randn(33, 77, generator=torch.Generator().manual_seed(0))
    stored = store(weight, scheme)
    codes, scales = scheme.quantize(weight)
    right = scheme.dequantize(codes, scales)
    assert torch.equal(stored.dequantize(), right)
    assert torch.allclose(read(stored).float(), right, rtol=1e-6, atol=0)
    table = [scheme.format.value(code) for code in range(1 << scheme.format.bits)]
    assert all(a == b or math.isnan(a) and math.isnan(b) for a, b in zip(numbers(scheme.format), table, strict=True))


def test_nearest_rounds_ties_to_the_even_code() -> None:
    fmt = scheme_named("mxfp4").format
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]).double().numpy()
    assert nearest(midpoints, fmt).tolist() == [0, 2, 2, 4, 4, 6, 6]

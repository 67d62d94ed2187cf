"""Experts are stored as one weight with a dimension more, and each can be taken out."""

import pytest
import torch

from fpxbench.numbers.experts import QuantizedExperts, rows_of_experts
from fpxbench.numbers.quantize import quantize
from fpxbench.numbers.scheme import scheme_named

SCHEMES = ("e4m3fn-row", "mxfp4", "nvfp4", "e3m2-g128", "e4m3fn-b128x128", "nf4-g64", "bf16")


def three(scheme, shape=(24, 96)):
    rng = torch.Generator().manual_seed(1)
    return [quantize(torch.randn(shape, generator=rng), scheme_named(scheme)) for _ in range(3)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_expert_is_the_weight_that_was_stacked_and_shares_memory_with_the_others(scheme):
    weights = three(scheme)
    experts = QuantizedExperts.stack(weights)
    assert (len(experts), experts.shape, experts.nbytes) == (3, (24, 96), 3 * weights[0].nbytes)
    assert torch.equal(experts.dequantize(), torch.stack([weight.dequantize() for weight in weights]))
    for expert, weight in zip(experts, weights, strict=True):
        assert torch.equal(expert.dequantize(), weight.dequantize())
    assert experts.experts[1] is experts[1] and experts[1].packed._base is experts.packed
    copy = experts.clone()
    copy.packed.zero_()
    assert type(copy) is QuantizedExperts and torch.equal(experts[2].packed, weights[2].packed)
    assert not copy[2].packed.any()
    if scheme != "bf16":
        other = experts.relayout("bytes")
        assert other.layout == "bytes" and torch.equal(other.codes(), experts.codes())


def test_experts_that_differ_are_not_stored_together():
    with pytest.raises(ValueError, match=r"mxfp4 \(24, 96\) in planar and nvfp4 \(24, 96\) in planar differ"):
        QuantizedExperts.stack([*three("mxfp4"), *three("nvfp4")])


def test_rows_are_those_between_the_ends():
    assert rows_of_experts(torch.tensor([0, 3, 3, 5, 5])) == [(1, 0, 3), (3, 3, 5)]
    assert rows_of_experts([]) == rows_of_experts([0, 0]) == []

"""How outputs are rounded is told from the outputs alone, and only where it can be."""

import pytest
import torch

from fpxbench.checking.error_statistic import ErrorStatistic
from fpxbench.checking.output_rounding import (
    DIRECTIONS,
    LEAST_OUTPUTS,
    MOST_OUTPUTS,
    NEAREST,
    OutputRounding,
    is_directed,
)
from fpxbench.checking.reference import matmul_reference, ulp


def rounded(exact: torch.Tensor, how: str, dtype: torch.dtype) -> torch.Tensor:
    unit = ulp(exact, dtype)
    steps = exact / unit
    return {NEAREST: steps.round(), "toward zero": steps.trunc(), "up": steps.ceil(), "down": steps.floor(),
            "away from zero": steps.sign() * steps.abs().ceil()}[how].mul(unit).to(dtype)


def direction_of(how: str, dtype: torch.dtype, *, noise: float = 0.0, gain: float = 1.0, m: int = 16) -> str | None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(m, 256, generator=generator).to(dtype)
    weight = torch.randint(-6, 7, (48, 256), generator=generator) / 2.0
    expected = matmul_reference(x, weight.float(), quantized=True)
    sums = expected.product * gain
    sums += noise * ulp(sums, dtype) * torch.randn(sums.shape, generator=generator, dtype=torch.float64)
    statistic = ErrorStatistic()
    statistic.add(rounded(sums, how, dtype), expected)
    return statistic.rounding.direction


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", [NEAREST, *DIRECTIONS])
def test_each_direction_is_told(how: str, dtype: torch.dtype) -> None:
    assert direction_of(how, dtype) == how
    assert direction_of(how, dtype, noise=0.002) == how, "sums in fp32 are exact but for a few thousandths"
    assert is_directed(how) == (how != NEAREST)


@pytest.mark.parametrize("how", [NEAREST, *DIRECTIONS])
@pytest.mark.parametrize("inexact", [{"noise": 0.3}, {"gain": 1 - 2.0**-10}, {"gain": 1 + 2.0**-9}, {"m": 1}])
def test_no_direction_is_told_where_more_was_rounded_or_too_little_was_seen(how: str, inexact: dict) -> None:
    """The weight was rounded on the way, a scale for the whole weight was, or there were 48 outputs."""
    assert direction_of(how, torch.bfloat16, **inexact) is None


def test_a_large_output_is_read_in_part_and_tells_the_same() -> None:
    exact = torch.randn(5 * MOST_OUTPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    count = OutputRounding()
    count.add(rounded(exact, "down", torch.bfloat16).double(), exact, ulp(exact, torch.bfloat16))
    assert count.direction == "down" and LEAST_OUTPUTS < count.outputs <= MOST_OUTPUTS

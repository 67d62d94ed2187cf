"""Stochastic rounding: bit for bit as gfloat, with the exact distribution and the right mean."""

import gfloat
import numpy as np
import pytest
import torch
from codec_by_search import discriminating_numbers
from gfloat.types import RoundMode
from test_formats import gfloat_format

from fpxbench.numbers.codec_definition import rounded_codes
from fpxbench.numbers.formats import FORMATS, format_named
from fpxbench.numbers.tensor_codec import Overflow, Rounding, decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")

FLOATS = ("e4m3fn", "e4m3fnuz", "e5m2", "e3m4", "e3m2", "e2m3", "e2m1", "e4m0", "e1m2")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stochastic(x, fmt, random_bits, seed=0, **how):
    return encode(x, fmt, Rounding.STOCHASTIC, random_bits=random_bits, generator=seeded(seed), **how)


@pytest.mark.parametrize("random_bits", [1, 4, 8, 15, 16, 24])
@pytest.mark.parametrize("name", FLOATS)
def test_the_same_random_integers_round_as_gfloat_rounds_by_them(name, random_bits):
    fmt = format_named(name)
    spread = torch.randn(40_000, dtype=torch.float64, generator=seeded(1))
    numbers = torch.cat(
        [torch.from_numpy(discriminating_numbers(fmt, np.float32)).double(), spread * fmt.max / 2,
         spread * fmt.min_subnormal]
    )
    numbers = numbers[numbers.isfinite()]
    integers = torch.randint(1 << random_bits, numbers.shape, generator=seeded())
    theirs = gfloat.round_ndarray(
        gfloat_format(fmt), numbers.numpy(), RoundMode.Stochastic, True, integers.numpy(), random_bits
    )
    ours = decode(stochastic(numbers, fmt, random_bits), fmt)
    np.testing.assert_array_equal(ours.double().numpy(), theirs)


@pytest.mark.parametrize("name", FLOATS)
def test_of_all_random_integers_the_share_that_rounds_up_is_the_distance_from_the_lower_number(name):
    fmt, random_bits = format_named(name), 6
    numbers = torch.tensor([fmt.value(code) for code in range(fmt.max_code + 1)], dtype=torch.float64)
    sixtyfourths = torch.arange(64, dtype=torch.float64) / 64
    x = numbers[:-1, None] + numbers.diff()[:, None] * sixtyfourths     # [codes, 64], exact
    random = torch.arange(64).expand(len(x), 64, 64)                    # [codes, 64, every random integer]
    for sign in (1, -1):
        codes = rounded_codes(sign * x[:, :, None].expand_as(random), fmt, Rounding.STOCHASTIC, Overflow.SATURATE,
                              random_bits=random_bits, random=random)
        low = torch.arange(len(x))[:, None, None]
        up = (decode(codes, fmt).abs() > numbers[low]).sum(dim=2)
        assert torch.equal(up, torch.arange(64).expand_as(up))


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_mean_of_many_is_the_number_itself(source):
    fmt, draws = FORMATS["e4m3fn"], 1 << 18
    for number in (1.03125, -1.09375, 0.0014, 300.0):
        x = torch.full((draws,), number, dtype=source)
        values = decode(stochastic(x, fmt, 20), fmt).double()
        low, high = values.unique().tolist()
        assert low < x[0] < high
        deviation = (high - low) / 2 / draws**0.5       # of a mean of coins, at most
        assert abs(values.mean() - x[0].double()) < 5 * deviation


def test_with_few_random_bits_the_chance_is_the_nearest_that_they_can_express():
    x = torch.full((1 << 16,), 1 + 0.125 * 0.3)     # three tenths of the way: one quarter, with two bits
    up = (decode(stochastic(x, FORMATS["e4m3fn"], 2), FORMATS["e4m3fn"]) > 1).double().mean()
    assert up == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / (1 << 16)) ** 0.5)


def test_what_is_far_below_the_smallest_number_still_rounds_up_as_rarely_as_it_should():
    fmt = FORMATS["e2m1"]
    x = torch.full((1 << 20,), fmt.min_subnormal * 2.0**-12)
    assert int((stochastic(x, fmt, 32) == 1).sum()) == pytest.approx(256, abs=5 * 16)


@pytest.mark.parametrize("name", FLOATS)
def test_a_number_of_the_format_never_changes(name):
    fmt = format_named(name)
    numbers = torch.tensor([fmt.value(code) for code in range(fmt.max_code + 1)])
    for seed in range(20):
        assert torch.equal(decode(stochastic(numbers, fmt, 3, seed), fmt), numbers)


def test_a_generator_gives_the_same_codes_again_whatever_the_length_of_the_rest():
    x = torch.randn(100_000, generator=seeded(2))
    fmt = FORMATS["e3m2"]
    codes = stochastic(x, fmt, 8)
    assert torch.equal(codes, stochastic(x, fmt, 8))
    assert torch.equal(codes[:1000], stochastic(x[:1000], fmt, 8))
    assert not torch.equal(codes, stochastic(x, fmt, 8, seed=1))


def test_past_the_maximum_the_chance_is_that_of_overflowing():
    fmt = FORMATS["e4m3fn"]
    x = torch.full((1 << 16,), 448.0 + 8)       # a quarter of the way to 480
    codes = stochastic(x, fmt, 8, overflow=Overflow.NAN)
    assert set(codes.tolist()) == {fmt.max_code, fmt.nan_code}
    assert (codes == fmt.nan_code).double().mean() == pytest.approx(0.25, abs=0.01)
    assert set(stochastic(x, fmt, 8).tolist()) == {fmt.max_code}


@pytest.mark.parametrize(("rounding", "random_bits", "says"), [
    (Rounding.STOCHASTIC, None, "needs random_bits from 1 to 32, not None"),
    (Rounding.STOCHASTIC, 0, "needs random_bits from 1 to 32, not 0"),
    (Rounding.STOCHASTIC, 33, "needs random_bits from 1 to 32, not 33"),
    (Rounding.NEAREST_EVEN, 8, "random_bits=8 is for stochastic rounding; nearest_even rounding draws none"),
])
def test_random_bits_that_are_missing_too_many_or_without_use_are_refused(rounding, random_bits, says):
    with pytest.raises(ValueError, match=says):
        encode(torch.ones(2), FORMATS["e2m1"], rounding, random_bits=random_bits)

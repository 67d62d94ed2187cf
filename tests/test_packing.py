"""Codes to bytes and back: no bit lost, none wasted, each where the layout says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpxbench.packing import LAYOUTS, K_MULTIPLE, pack, padded_k, pieces, row_bytes, unpack

pytestmark = pytest.mark.usefixtures("one_thread")


def random_codes(n, k, bits, seed=0):
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(bits=st.integers(1, 8), n=st.integers(1, 5), k=st.integers(1, 200), layout=st.sampled_from(LAYOUTS), seed=st.integers(0, 99))
def test_what_is_packed_is_unpacked(bits, n, k, layout, seed):
    codes = random_codes(n, k, bits, seed)
    packed = pack(codes, bits, layout)
    assert packed.shape == (n, row_bytes(k, bits, layout)) and packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, k, layout), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_code_takes_its_bits_and_no_more(bits):
    assert pack(random_codes(3, 4096, bits), bits).nbytes == 3 * 4096 * bits // 8


@pytest.mark.parametrize(("bits", "cut"), [
    (8, [8]), (7, [4, 2, 1]), (6, [4, 2]), (5, [4, 1]), (4, [4]), (3, [2, 1]), (2, [2]), (1, [1]),
])
def test_a_code_is_cut_into_powers_of_two_widest_first(bits, cut):
    assert [width for _, width in pieces(bits)] == cut
    assert [offset for offset, _ in pieces(bits)] == [sum(cut[:i]) for i in range(len(cut))]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("k", [1, 32, 77, 96])
def test_every_bit_lies_where_the_layout_puts_it(bits, k):
    """The layout's sentence, one code and one bit at a time."""
    codes = random_codes(2, k, bits)
    packed = pack(codes, bits)
    k_pad, start = padded_k(k), 0
    for offset, width in pieces(bits):
        planes = 8 // width
        for column in range(k):
            plane, byte = divmod(column, k_pad // planes)
            field = (packed[:, start + byte] >> (plane * width)) & ((1 << width) - 1)
            assert torch.equal(field, (codes[:, column] >> offset) & ((1 << width) - 1))
        start += k_pad * width // 8


def test_padding_is_zero():
    packed = pack(torch.full((1, 33), 0xFF, dtype=torch.uint8), 8)
    assert packed[0, 33:].tolist() == [0] * (padded_k(33) - 33)


@given(st.integers(1, 10_000))
def test_rows_start_on_whole_words(k):
    assert padded_k(k) % K_MULTIPLE == 0 and 0 <= padded_k(k) - k < K_MULTIPLE
    assert all(row_bytes(k, bits, "planar") % 4 == 0 for bits in range(1, 9))


def test_a_code_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="code 64 does not fit 6 bits"):
        pack(torch.tensor([[3, 64]], dtype=torch.uint8), 6)


def test_a_wrong_dtype_shape_width_or_layout_is_refused():
    codes = random_codes(2, 40, 4)
    with pytest.raises(TypeError, match="torch.int32"):
        pack(codes.int(), 4)
    with pytest.raises(TypeError, match=r"\[80\]"):
        pack(codes.reshape(-1), 4)
    with pytest.raises(ValueError, match="not 9"):
        pack(codes, 9)
    with pytest.raises(ValueError, match="no layout 'blocked': one of planar, bytes"):
        pack(codes, 4, "blocked")


def test_bytes_of_another_shape_are_not_unpacked():
    packed = pack(random_codes(2, 40, 6), 6)
    with pytest.raises(ValueError, match=r"40 codes of 6 bits take uint8 \[N, 48\].*\[2, 47\]"):
        unpack(packed[:, :-1], 6, 40)

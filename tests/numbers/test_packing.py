"""Codes to bytes: no bit lost, none wasted, each at its place in the layout's definition (docs/layouts.md)."""

import hashlib
import re

import pytest
import torch
from hypothesis import given, settings, strategies as st
from layout_definitions import DEFINED, FRAGMENTS, read_by_definition, written_by_definition
from places import DOCS

from fpxbench.checking.inputs import make_weight
from fpxbench.checking.operands import Operands
from fpxbench.diagnosis.products import diagnose_product
from fpxbench.implementation import Implementation
from fpxbench.numbers.packing import (
    K_MULTIPLE,
    LAYOUTS,
    fragment,
    is_layout,
    layout_named,
    pack,
    padded_k,
    pieces,
    row_bytes,
    unpack,
)
from fpxbench.numbers.packing.layout import parts
from fpxbench.numbers.packing.quad_pieces import QUAD_PIECES
from fpxbench.numbers.scheme import scheme_named
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = [(layout.name, bits) for layout in LAYOUTS.values() for bits in layout.widths]


def random_codes(n, k, bits, seed=0):
    return torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def numbered_codes(n, k, bits):
    """Return codes that anybody can make again: 37 i + 11 row."""
    i = torch.arange(n * k)
    return ((i * 37 + i // k * 11) % (1 << bits)).to(torch.uint8).reshape(n, k)


@st.composite
def shapes(draw, layout):
    """Return N and K that the layout takes: any, or multiples of its tile."""
    tile = LAYOUTS[layout].tile
    if tile > 1:
        return tile * draw(st.integers(1, 2)), tile * draw(st.integers(1, 2))
    return draw(st.integers(1, 4)), draw(st.integers(1, 100))


def test_every_layout_has_its_definition_here_and_in_the_docs():
    text = (DOCS / "layouts.md").read_text()
    assert set(DEFINED) == set(LAYOUTS)
    assert set(re.findall(r"^## `(\w+)`", text, re.MULTILINE)) == {*LAYOUTS, "fragment_m3", "fragment_quad_m3"}


@pytest.mark.parametrize(("layout", "bits"), FRAGMENTS)
@pytest.mark.parametrize("shape", [(8, 136), (24, 40)])
def test_the_bytes_of_fragments_are_those_of_the_definition_padding_included(layout, bits, shape):
    codes = random_codes(*shape, bits)
    packed = pack(codes, bits, layout)
    assert torch.equal(packed, written_by_definition(layout, bits, codes))
    foreign = random_codes(*packed.shape, 8)
    assert torch.equal(unpack(foreign, bits, shape[1], layout), read_by_definition(layout, bits, foreign, shape[1]))


def test_the_pieces_of_quad_layouts_use_every_bit_once():
    assert set(QUAD_PIECES) == {(bits, mantissa) for bits in range(1, 9) for mantissa in (None, *range(min(7, bits)))}
    for bits, mantissa_bits in QUAD_PIECES:
        placed = fragment.placed_bits(bits, mantissa_bits)
        stored = []
        for pair in fragment.own_moves(placed):
            masks = [move.mask for move in pair]
            assert sum(masks) == sum(1 << place for place in placed), (bits, mantissa_bits)
            stored += [(move.word, place - move.shift) for move in pair for place in placed if move.mask >> place & 1]
        words = fragment.shared_words(bits)
        assert sorted(stored) == [(word, bit) for word, shared in enumerate(words) for bit in range(shared.bits)]


@pytest.mark.parametrize("name", [f"{kind}_{numbers}" for kind in ("fragment", "fragment_quad")
                                  for numbers in ("int", *(f"m{bits}" for bits in range(7)))])
def test_unpacking_inverts_packing_for_fragments_of_every_width(name, monkeypatch):
    for bits in layout_named(name).widths:
        codes = random_codes(48, 328, bits)
        packed = pack(codes, bits, name)
        assert packed.shape == (48, row_bytes(328, bits, name)) == (48, 384 * bits // 8)
        assert torch.equal(unpack(packed, bits, 328, name), codes)
        with monkeypatch.context() as patch:
            patch.setattr("fpxbench.numbers.packing.layout.CPU_GRAIN", 1)     # in parts of one row of tiles
            assert torch.equal(pack(codes, bits, name), packed) and torch.equal(unpack(packed, bits, 328, name), codes)


def test_fragments_are_layouts_by_name_and_hold_rows_and_columns_in_multiples_of_8():
    assert is_layout("fragment_m6") and not is_layout("fragment_m7") and not is_layout("fragment")
    assert is_layout("fragment_quad_int") and not is_layout("fragment_quad") and not is_layout("quad_m3")
    with pytest.raises(ValueError, match=r"'fragment_m3' supports N and K in multiples of 8, not \[9, 64\]"):
        pack(random_codes(9, 64, 8), 8, "fragment_m3")
    with pytest.raises(ValueError, match="'fragment_m3' supports codes of 4, 5, 6, 7, 8 bits, not 3"):
        pack(random_codes(8, 64, 3), 3, "fragment_m3")


@pytest.mark.parametrize(("layout", "bits"), EVERY)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_the_bytes_are_those_of_the_layouts_definition_padding_included(layout, bits, data):
    shape = data.draw(shapes(layout))
    codes = random_codes(*shape, bits, data.draw(st.integers(0, 99)))
    assert torch.equal(pack(codes, bits, layout), written_by_definition(layout, bits, codes))


@pytest.mark.parametrize(("layout", "bits"), EVERY)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_bytes_are_read_by_the_layouts_definition_whatever_the_padding(layout, bits, data):
    n, k = data.draw(shapes(layout))
    foreign = random_codes(n, row_bytes(k, bits, layout), 8, data.draw(st.integers(0, 99)))
    if layout == "bytes":
        foreign &= (1 << bits) - 1
    assert torch.equal(unpack(foreign, bits, k, layout), read_by_definition(layout, bits, foreign, k))


@pytest.mark.parametrize(("layout", "bits"), EVERY)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_unpacking_inverts_packing(layout, bits, data):
    n, k = data.draw(shapes(layout))
    codes = random_codes(n, k, bits, data.draw(st.integers(0, 99)))
    packed = pack(codes, bits, layout)
    assert packed.shape == (n, row_bytes(k, bits, layout)) and packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, k, layout), codes)


@pytest.mark.parametrize(("layout", "bits"), EVERY)
def test_a_large_weight_is_packed_as_its_parts_are(layout, bits, monkeypatch):
    codes = random_codes(320, 192, bits)
    in_parts = pack(codes, bits, layout)
    monkeypatch.setattr("fpxbench.numbers.packing.layout.CPU_GRAIN", 1 << 30)
    at_once = pack(codes, bits, layout)
    monkeypatch.setattr("fpxbench.numbers.packing.layout.CPU_GRAIN", 600)
    assert torch.equal(pack(codes, bits, layout), at_once) and torch.equal(in_parts, at_once)
    assert torch.equal(unpack(at_once, bits, 192, layout), codes)


@pytest.mark.parametrize(("layout", "bits"), EVERY)
def test_codes_that_lie_anywhere_in_memory_are_packed_and_unpacked(layout, bits):
    codes = random_codes(64, 128, bits)
    transposed = codes.T.contiguous().T
    odd = torch.cat([torch.zeros(1, dtype=torch.uint8), codes.reshape(-1)])[1:].reshape(64, 128)
    packed = pack(codes, bits, layout)
    assert torch.equal(pack(transposed, bits, layout), packed) and torch.equal(pack(odd, bits, layout), packed)
    padded = torch.cat([torch.zeros(64, 1, dtype=torch.uint8), packed], dim=1)
    assert torch.equal(unpack(padded[:, 1:], bits, 128, layout), codes)


@pytest.mark.parametrize(("layout", "bits"), EVERY)
def test_packing_neither_changes_nor_keeps_what_it_is_given(layout, bits):
    codes = random_codes(64, 64, bits)
    before = codes.clone()
    packed = pack(codes, bits, layout)
    read = unpack(packed, bits, 64, layout)
    packed.fill_(0xFF)
    assert torch.equal(codes, before) and torch.equal(read, before)


@pytest.mark.parametrize(("layout", "bits"), EVERY)
@pytest.mark.parametrize("shape", [(0, 64), (64, 0)])
def test_a_weight_without_rows_or_columns_occupies_no_bytes(layout, bits, shape):
    packed = pack(random_codes(*shape, bits), bits, layout)
    assert packed.nbytes == 0 and unpack(packed, bits, shape[1], layout).shape == shape


def test_parts_cover_everything_and_are_no_larger_than_asked():
    assert parts(10, 4, torch.device("cpu")) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert parts(2, 0, torch.device("cpu")) == [slice(0, 1), slice(1, 2)]
    assert parts(10, 4, torch.device("meta")) == [slice(0, 10)]
    assert parts(0, 4, torch.device("meta")) == []


# Bytes that others made.


@pytest.mark.parametrize(("layout", "bits", "shape", "sha256"), [
    # torchao 0.9.0, torchao.dtypes.floatx.floatx_tensor_core_layout.pack_tc_floatx(numbered_codes, bits)
    ("fp6_llm", 6, (64, 64), "a02053e1635cbbc29edea6d9f3e98173aeff1bf8406f0b9cee0bb33261902ff9"),
    ("fp6_llm", 6, (128, 192), "83091eb5564e0a24295b742e02d48894a1a233da3357905910be5e8da0a5c08a"),
    ("fp6_llm", 5, (64, 64), "7801b6b4f8f236208e6f33a04b671ab30e2a5ca47a292d36cbc6ecd2f16031cf"),
])
def test_fp6_llm_is_what_torchao_packs(layout, bits, shape, sha256):
    packed = pack(numbered_codes(*shape, bits), bits, layout)
    assert hashlib.sha256(packed.numpy().tobytes()).hexdigest() == sha256


def test_fp6_llm_begins_its_two_segments_as_torchao_does():
    """The first words of the same, to be read by a person whom the digest does not help."""
    packed = pack(numbered_codes(64, 64, 6), 6, "fp6_llm").reshape(-1)
    assert packed[:16].numpy().tobytes().hex() == "432de987873e2d94947272e9d843432d"
    assert packed[64 * 64 // 4:][:16].numpy().tobytes().hex() == "8008d55d2aa27ff7c44c19916ee6b33b"


@pytest.mark.parametrize(("layout", "bits", "codes", "packed"), [
    # torchao 0.12.0 and 0.14.1, torchao.prototype.mx_formats.kernels.pack_uint6_pytorch
    ("torchao_fp6", 6, [1, 2, 4, 8, 16, 32, 63, 21], [0, 33, 96, 72, 95, 7]),
    # torchao 0.14.1, the same file's pack_uint4, and 0.15.0's
    ("nibbles_high_first", 4, [1, 2, 3, 12], [0x12, 0x3C]),
    ("nibbles_low_first", 4, [1, 2, 3, 12], [0x21, 0xC3]),
    # torchao 0.9.0, torchao.dtypes.uintx.bitpacking.pack, the shards one after the other
    ("planar", 6, [37 * i % 64 for i in range(32)], [
        0, 85, 170, 255, 68, 153, 238, 51, 136, 221, 34, 119, 204, 17, 102, 187, 216, 114, 28, 182, 45, 203, 97, 216]),
    ("planar", 3, [37 * i % 8 for i in range(32)], [0, 85, 170, 255, 0, 85, 170, 255, 170, 85, 170, 85]),
])
def test_a_row_is_what_torchao_packs(layout, bits, codes, packed):
    assert pack(torch.tensor([codes], dtype=torch.uint8), bits, layout).tolist() == [packed]


# Planar rows.


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_code_occupies_its_bits_and_no_more(bits):
    assert pack(random_codes(3, 4096, bits), bits).nbytes == 3 * 4096 * bits // 8


@pytest.mark.parametrize(("bits", "cut"), [
    (8, [8]), (7, [4, 2, 1]), (6, [4, 2]), (5, [4, 1]), (4, [4]), (3, [2, 1]), (2, [2]), (1, [1]),
])
def test_a_code_is_cut_into_powers_of_two_widest_first(bits, cut):
    assert [width for _, width in pieces(bits)] == cut
    assert [offset for offset, _ in pieces(bits)] == [sum(cut[:i]) for i in range(len(cut))]


@given(st.integers(1, 10_000))
def test_planar_rows_start_on_whole_words(k):
    assert padded_k(k) % K_MULTIPLE == 0 and 0 <= padded_k(k) - k < K_MULTIPLE
    assert all(row_bytes(k, bits, "planar") % 4 == 0 for bits in range(1, 9))


# Refusals.


def test_a_code_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="code 64 does not fit 6 bits"):
        pack(torch.tensor([[3, 64]], dtype=torch.uint8), 6)


def test_a_wrong_dtype_shape_width_or_layout_is_refused():
    codes = random_codes(2, 40, 4)
    with pytest.raises(TypeError, match="torch.int32"):
        pack(codes.int(), 4)
    with pytest.raises(TypeError, match=r"\[80\]"):
        pack(codes.reshape(-1), 4)
    with pytest.raises(ValueError, match="'planar' supports codes of 1, 2, 3, 4, 5, 6, 7, 8 bits, not 9"):
        pack(codes, 9)
    with pytest.raises(ValueError, match="no layout 'blocked': one of planar, bytes, "):
        pack(codes, 4, "blocked")


@pytest.mark.parametrize(("layout", "bits", "shape", "sentence"), [
    ("nibbles_low_first", 6, (2, 40), "'nibbles_low_first' supports codes of 4 bits, not 6"),
    ("torchao_fp6", 4, (2, 40), "'torchao_fp6' supports codes of 6 bits, not 4"),
    ("fp6_llm", 8, (64, 64), "'fp6_llm' supports codes of 1, 2, 3, 4, 5, 6, 7 bits, not 8"),
    ("fp6_llm", 6, (64, 96), r"'fp6_llm' supports N and K in multiples of 64, not \[64, 96\]"),
    ("fp6_llm", 6, (77, 128), r"'fp6_llm' supports N and K in multiples of 64, not \[77, 128\]"),
])
def test_a_layout_refuses_what_it_cannot_hold_by_name(layout, bits, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        pack(random_codes(*shape, 4), bits, layout)
    with pytest.raises(ValueError, match=sentence):
        unpack(torch.zeros(shape[0], layout_named(layout).row_bytes(shape[1], bits), dtype=torch.uint8), bits, shape[1],
               layout)


def test_bytes_of_another_shape_are_not_unpacked():
    packed = pack(random_codes(2, 40, 6), 6)
    with pytest.raises(ValueError, match=r"40 codes of 6 bits take uint8 \[N, 48\].*\[2, 47\]"):
        unpack(packed[:, :-1], 6, 40)


# Weights in one layout and another.


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [("mxfp4", "nibbles_low_first"), ("nvfp4", "nibbles_high_first"), ("e3m2-row", "torchao_fp6"),
     ("e2m3-g32", "fp6_llm"), ("e2m2-row", "bitstream"), ("e4m3fn-row", "bytes"), ("e3m2-row", "fragment_m2")],
)
def test_a_weight_means_the_same_in_any_layout(scheme, layout):
    weight = Implementation().quantize(
        torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), scheme_named(scheme)
    )
    exchanged = weight.relayout(layout)
    bits = weight.scheme.format.bits
    assert exchanged.has_codes and torch.equal(exchanged.packed, pack(weight.codes(), bits, layout))
    assert torch.equal(exchanged.dequantize(), weight.dequantize())
    assert torch.equal(exchanged.relayout("planar").packed, weight.packed)


def test_a_weight_that_another_library_stored_is_read_from_its_bytes():
    """Codes low nibble first under E8M0 block scales: 1.0 and -6.0, then zeros, times 2."""
    packed = torch.zeros(1, 16, dtype=torch.uint8)
    packed[0, 0] = 0xF2
    weight = QuantizedWeight(
        scheme_named("mxfp4"), (1, 32), "nibbles_low_first", packed, torch.tensor([[128]], dtype=torch.uint8)
    )
    assert weight.dequantize()[0, :3].tolist() == [2.0, -12.0, 0.0]


def test_a_dense_weight_has_no_layout_to_change():
    dense = Implementation().quantize(torch.ones(2, 32), scheme_named("bf16"))
    with pytest.raises(ValueError, match="a bf16 weight has no codes"):
        dense.relayout("planar")


class ReadsAnotherLayout(Implementation):
    """Stores by `layout` and reads by `read_as`."""

    def __init__(self, layout, read_as):
        self.layout, self.read_as = layout, read_as

    def matmul(self, x, weight):
        misread = QuantizedWeight(
            weight.scheme, weight.shape, self.read_as, weight.packed, weight.scales, weight.tensor_scale
        )
        return (x.float() @ misread.dequantize().T).to(x.dtype)


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4", "e2m1-row"])
@pytest.mark.parametrize(("stored", "read_as"), [
    ("nibbles_low_first", "nibbles_high_first"), ("nibbles_high_first", "nibbles_low_first"),
])
def test_nibbles_read_in_the_other_order_are_diagnosed(scheme, stored, read_as):
    implementation = ReadsAnotherLayout(stored, read_as)
    case = Case(implementation="x", scheme=scheme, workload="canary.ragged", m=16, n=48, k=96)
    original = make_weight(case, 3)
    weight = implementation.quantize(original, scheme_named(scheme))
    diagnosis = diagnose_product(implementation, Operands(case, "cpu", 3, original, weight, weight.dequantize()))
    assert diagnosis.kind is Kind.NIBBLE_SWAP, diagnosis

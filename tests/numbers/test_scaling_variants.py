"""Scales as libraries round and store them: bit for bit theirs, or the difference explained."""

import math
from fractions import Fraction

import pytest
import torch
from places import DOCS

from fpxbench.numbers.codebook import CODEBOOKS, Codebook
from fpxbench.numbers.formats import BF16, FORMATS, FP16
from fpxbench.numbers.scaling import scaling_named
from fpxbench.numbers.scheme import SCHEMES, USED_BY, scheme_named
from fpxbench.numbers.tensor_codec import decode, encode

NAMES = ("tensor", "tensor.static", "row", "row.bf16", "row.fp16", "g128", "g128.bf16", "g64.e8m0", "b128x128",
         "b128x128.e8m0", "b2x65536", "mx", "mx.ceil", "mx.even", "mx.rceil", "nv", "nv.up", "nv.4over6", "nv.div",
         "nv.up.div", "nv.normal", "nv16x16", "nv16x16.4over6")


def weights(n=64, k=512):
    """Return weights of many magnitudes, with powers of two, values just beside them, and rows of one value."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator) * 2.0 ** torch.randint(-20, 20, (n, 1), generator=generator)
    exact = 2.0 ** torch.arange(-8, 8).repeat_interleave(32).float()
    weight[0], weight[1] = exact, torch.nextafter(exact, exact * 2)
    weight[2] = torch.nextafter(exact, exact / 2)
    weight[3] = 6.0
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_it_is_written(name):
    assert scaling_named(name).name == name


@pytest.mark.parametrize(("name", "says"), [
    ("mx.bf16", "mx has no modifier 'bf16': one of ceil, even, rceil"),
    ("nv.up.up", "nv.up.up sets scale_format twice"),
    ("b1x128", "no scaling 'b1x128'"), ("g128.", "g128 has no modifier ''"), ("nv32x32", "no scaling 'nv32x32'"),
])
def test_a_name_that_means_nothing_is_refused_with_what_there_is(name, says):
    with pytest.raises(ValueError, match=says.replace(".", r"\.")):
        scaling_named(name)


TORCHAO = {"floor": "mx", "ceil": "mx.ceil", "even": "mx.even", "rceil": "mx.rceil"}


@pytest.mark.parametrize("mode", TORCHAO)
@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2", "e2m3", "e3m2", "e2m1"])
def test_mx_scales_and_codes_are_torchaos_in_all_four_modes(fmt, mode):
    """Left out: a block of zeros, which torchao gives the scale 2**-127 and fpxbench 1; and under rceil maxima within
    one fp32 step of a power of two times the format's maximum, where torchao rounds a logarithm and not the number."""
    from torchao.prototype.mx_formats import constants, mx_tensor as mx

    dtypes = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e2m3": constants.DTYPE_FP6_E2M3,
              "e3m2": constants.DTYPE_FP6_E3M2, "e2m1": torch.float4_e2m1fn_x2}
    weight = weights()
    stored, elements = mx.to_mx(weight, dtypes[fmt], 32, mx.ScaleCalculationMode(mode))
    scheme = scheme_named(f"{fmt}-{TORCHAO[mode]}")
    codes, scales = scheme.quantize(weight)
    theirs = stored.view(torch.uint8).reshape(scales.stored.shape)
    same = torch.ones_like(theirs, dtype=torch.bool)
    if mode == "rceil":
        ratio = weight.reshape(64, 16, 32).abs().amax(2) / scheme.format.max
        same = (torch.frexp(ratio).mantissa - 0.5).abs() > 1e-6
        assert same.float().mean() > 0.9
    assert torch.equal(theirs[same], scales.stored[same])
    elements = elements.view(torch.uint8).reshape(64, -1)
    if fmt == "e2m1":
        elements = torch.stack([elements & 15, elements >> 4], dim=2).reshape(64, -1)
    same = same.repeat_interleave(32, dim=1)
    assert torch.equal(elements[same], codes[same])


def test_a_reciprocal_global_scale_is_compressed_tensors():
    from compressed_tensors import quantization
    from compressed_tensors.quantization.utils import helpers

    weight = weights()[4:]
    arguments = quantization.QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16,
                                              scale_dtype=torch.float8_e4m3fn)
    theirs = helpers.generate_gparam(weight.amin(), weight.amax())
    blocks = weight.reshape(len(weight), -1, 16)
    block_scales, _ = helpers.calculate_qparams(blocks.amin(2), blocks.amax(2), arguments, global_scale=theirs)
    scales = scaling_named("nv.div").choose(weight, FORMATS["e2m1"])
    assert torch.equal(scales.tensor_scale, theirs.reshape(1))
    ours, stored = scales.stored, block_scales.to(torch.float8_e4m3fn).view(torch.uint8)
    # A block whose scale rounds to zero keeps it here; compressed-tensors stores a small number instead.
    assert torch.equal(ours[ours > 0], stored[ours > 0])


def test_scales_as_e8m0_are_the_smallest_power_of_two_that_saturates_nothing():
    fmt = FORMATS["e4m3fn"]
    weight = weights()
    for name in ("b128x128.e8m0", "g128.e8m0", "mx.rceil"):
        scaling = scaling_named(name)
        scales = scaling.choose(weight, fmt)
        largest = scaling.block_amax(weight)
        for amax, scale in zip(largest.flatten().tolist(), scaling.factors(scales).flatten().tolist(), strict=True):
            exact = Fraction(amax) / Fraction(fmt.max)
            # amax / max is rounded to fp32 before it is rounded up.
            assert exact * (1 - Fraction(1, 1 << 23)) <= Fraction(scale) < 2 * exact * (1 + Fraction(1, 1 << 23))


@pytest.mark.parametrize(("name", "fmt", "dtype"), [
    ("row.bf16", BF16, torch.bfloat16), ("row.fp16", FP16, torch.float16),
])
def test_16_bit_scales_are_rounded_to_nearest_even_by_definition(name, fmt, dtype):
    special = torch.tensor([1e9, 1e-30, 1 + 2.0**-9])
    numbers = torch.cat([torch.rand(1000) * 2.0 ** torch.randint(-14, 10, (1000,)), special])
    stored = scaling_named(name).scale_format.encode(numbers)
    assert stored.dtype == dtype
    largest = fmt.max
    expected = [min(fmt.value(fmt.round(number)), largest) for number in numbers.tolist()]
    assert stored.double().tolist() == expected


def test_blocks_of_two_dimensions_share_a_scale_with_ragged_edges_too():
    weight = torch.ones(5, 7)
    weight[0, 0], weight[3, 2], weight[4, 6] = 2, 4, 8
    scaling = scaling_named("b3x4")
    assert scaling.grid_shape(5, 7) == (2, 2)
    torch.testing.assert_close(scaling.block_amax(weight), torch.tensor([[2.0, 1.0], [4.0, 8.0]]))
    spread = scaling.spread(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 5, 7)
    assert spread.tolist() == [[1.0] * 4 + [2.0] * 3] * 3 + [[3.0] * 4 + [4.0] * 3] * 2


@pytest.mark.parametrize(("scheme", "decibels"), [
    ("e4m3fn-b128x128", 31.5), ("e4m3fn-b128x128.e8m0", 31.5), ("mxfp4.rceil", 18.78), ("mxfp4.ceil", 16.9),
    ("mxfp4.even", 19.0), ("nvfp4.up", 20.0), ("nvfp4.4over6", 21.2), ("nvfp4.div", 20.43),
    ("e2m1-nv16x16", 18.9), ("nf4-g64", 20.7),
])
def test_the_loss_of_a_normal_weight_is_what_it_is(scheme, decibels):
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    scheme = scheme_named(scheme)
    error = weight - scheme.dequantize(*scheme.quantize(weight))
    assert 10 * math.log10(weight.square().sum() / error.square().sum()) == pytest.approx(decibels, abs=0.2)


def test_four_over_six_never_errs_more_than_six_alone():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    chosen = scaling_named("nv.4over6")
    fmt = FORMATS["e2m1"]
    scales = chosen.choose(weight, fmt)
    six = chosen.scales_of(chosen.block_amax(weight), fmt)
    taken_four = scales.stored != six.stored
    assert 0.2 < taken_four.float().mean() < 0.8
    assert (chosen._squared_error(weight, fmt, scales) <= chosen._squared_error(weight, fmt, six)).all()


def test_fused_layers_can_share_a_tensor_scale():
    parts = [torch.randn(16, 32), 4 * torch.randn(16, 32)]
    scaling = scaling_named("nv")
    amax = max(part.abs().amax() for part in parts)
    shared = [scaling.choose(part, FORMATS["e2m1"], shared_amax=amax) for part in parts]
    assert torch.equal(shared[0].tensor_scale, shared[1].tensor_scale)
    assert torch.equal(shared[1].tensor_scale, scaling.choose(torch.cat(parts), FORMATS["e2m1"]).tensor_scale)


# Codebooks.


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_value_of_a_codebook_is_its_own_code_and_numbers_become_the_nearest(name):
    codebook = CODEBOOKS[name]
    values = torch.tensor(codebook.values)
    codes = torch.arange(len(values), dtype=torch.uint8)
    assert torch.equal(decode(codes, codebook), values)
    again = encode(values, codebook)
    assert torch.equal(decode(again, codebook), values) and (again[values != 0] == codes[values != 0]).all()
    numbers = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    nearest = (numbers[:, None] - values.double()).abs().amin(dim=1)
    chosen = (numbers - decode(encode(numbers, codebook), codebook).double()).abs()
    assert torch.equal(chosen, nearest)


def test_a_number_midway_goes_where_the_codebook_says():
    low, zero = (Codebook("t", (-3.0, -1.0, 1.0, 3.0), "", ties=ties) for ties in ("lower", "toward_zero"))
    midway = torch.tensor([-2.0, 2.0])
    assert decode(encode(midway, low), low).tolist() == [-3.0, 1.0]
    assert decode(encode(midway, zero), zero).tolist() == [-1.0, 1.0]


def test_a_table_of_ones_own_is_read_from_a_file(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("-1, -0.25\n0.25 1 2")
    monkeypatch.setenv("FPX_TABLES", str(tmp_path))
    scheme = scheme_named("table:mine-g32")
    assert scheme.format.bits == 3 and scheme.format.values == (-1.0, -0.25, 0.25, 1.0, 2.0)
    codes, scales = scheme.quantize(torch.tensor([[2.0, 1.0, -2.0, 0.1]]))
    assert scheme.dequantize(codes, scales).tolist() == [[2.0, 1.0, -1.0, 0.25]]


@pytest.mark.parametrize(("text", "says"), [
    ("1", "has 1 values"), ("a b", "not a list of numbers"), ("0 0", "nothing but zeros"),
    ("1 inf", "not finite"), (" ".join(["1"] * 300), "has 300 values")])
def test_a_table_that_cannot_be_one_says_why(tmp_path, monkeypatch, text, says):
    (tmp_path / f"bad{abs(hash(text))}.txt").write_text(text)
    monkeypatch.setenv("FPX_TABLES", str(tmp_path))
    with pytest.raises(ValueError, match=says):
        scheme_named(f"table.bad{abs(hash(text))}-row")


# Activations.


def test_activations_are_quantized_by_token_by_group_or_by_a_fixed_scale():
    x = torch.tensor([[1.0, 448.0], [0.5, 1.0]])
    by_token = scheme_named("e4m3fn-row+e4m3fn-row").rounded_activation(x)
    torch.testing.assert_close(by_token, x)
    static = scheme_named("e4m3fn-row+e4m3fn-tensor.static")
    assert static.rounded_activation(torch.tensor([[100.0, 4.0]])).tolist() == [[8.0, 4.0]]
    assert scheme_named("mxfp4+mxfp8_e4m3fn").activation.scaling.block == 32
    assert scheme_named("e4m3fn-b128x128+e4m3fn-g128").activation.scaling.name == "g128"
    assert scheme_named("mxfp4").rounded_activation(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["bf16+e4m3fn-row", "e4m3fn-row+bf16", "e4m3fn-row+e4m3fn-row+e4m3fn-row"])
def test_a_plus_joins_two_quantized_schemes(name):
    with pytest.raises(ValueError, match="must be quantized schemes"):
        scheme_named(name)


@pytest.mark.parametrize("name", USED_BY)
def test_a_scheme_that_is_in_use_is_made_from_its_name_and_quantizes(name):
    scheme = scheme_named(name)
    assert scheme.name == name
    weight = torch.randn(48, 160, generator=torch.Generator().manual_seed(0))
    codes, scales = scheme.quantize(weight)
    assert codes.shape == weight.shape and scales.stored.shape == scheme.scaling.grid_shape(48, 160)
    assert (weight - scheme.dequantize(codes, scales)).square().sum() < 0.05 * weight.square().sum()


def test_the_documented_table_is_what_the_command_lists():
    rows = (
        (DOCS / "schemes.md")
        .read_text()
        .split("<!-- schemes -->")[1]
        .split("<!-- /schemes -->")[0]
        .strip()
        .split("\n")[2:]
    )
    listed = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in listed] == list(dict.fromkeys((*SCHEMES, *USED_BY)))
    for name, bits, scaling, stored, activations, used_by in listed:
        scheme = scheme_named(name)
        assert bits == f"{scheme.bits_per_weight(4096, 4096):.3f}" and used_by == USED_BY.get(name, "")
        assert activations == (scheme.activation.name if scheme.activation else "16 bits")
        if scheme.quantized:
            assert (scaling, stored.split(",")[0]) == (scheme.scaling.name, scheme.scaling.scale_format.format.name)

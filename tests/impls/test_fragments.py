"""triton_fused multiplies fragments exactly, for every code and scale that fits them, and stores the rest otherwise."""

from dataclasses import replace

import pytest
import torch
from core import in_turn

from fpxbench.checking import reference
from fpxbench.implementation import discover
from fpxbench.numbers.formats import FORMATS, format_named
from fpxbench.numbers.packing.fragment import name_for
from fpxbench.numbers.scaling import Scales, scaling_named
from fpxbench.numbers.scheme import SCHEMES, Scheme, scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

TritonFused = discover()[0]["triton_fused"]
from fpxbench.impls import (  # noqa: E402  (discover makes the package)
    _fragment,
    _fragment_weight,
    triton_fused,
)
from fpxbench.impls._tiles import StreamTile, Tile, TileDevice, pick  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT_NAMES = [name for name in FORMATS if name != "e8m0"] + [
    "e1m0", "e1m1", "e2m2", "e3m3", "e1m6", "e4m0", "e3m2ieee", "e6m1", "e6m1ieee", "e7m0fn", "e3m4b5", "e5m2b10ieee",
]


def fragments(codes, scales, scheme, tensor_scale=None):
    layout = name_for(None if scheme.format.twos_complement else scheme.format.mantissa_bits)
    return QuantizedWeight.from_codes(
        codes.to(torch.uint8).to(DEVICE), Scales(scales.to(DEVICE), tensor_scale), scheme, layout)


def product(x, weight, tile=None):
    """Return what the fragment kernel computes on the CPU. Fail if it is not the one that would be used."""
    fused, x = TritonFused(), x.to(DEVICE)
    assert isinstance(fused.configs(x, weight)[0], Tile | StreamTile), "not multiplied from fragments"
    return (fused.matmul(x, weight) if tile is None else fused.matmul_with(x, weight, tile)).cpu()


def assert_right(x, weight, tile=None):
    expected = reference.matmul_reference(x, weight.dequantize().cpu(), quantized=False)
    error = (product(x, weight, tile).double() - expected.product).abs()
    assert bool((error <= expected.tolerance).all()), (
        f"{tile}: off by {(error / expected.tolerance).max():.3g} tolerances")


def spread_over_rows(values, k=32):
    """Return codes [N, k] with N a multiple of 8; the padding is zero."""
    return torch.nn.functional.pad(values, (0, -len(values) % (8 * k))).reshape(-1, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_number_of_every_format_decodes_to_its_definition(name, dtype):
    fmt = format_named(name)
    values = decode_table(fmt)
    codes = spread_over_rows(torch.arange(len(values))[values.isfinite()])
    scheme = Scheme(f"{name}-tensor", fmt, scaling_named("tensor"))
    weight = fragments(codes, torch.ones(1, 1), scheme)
    if dtype == torch.float16 and _fragment_weight.why_not_activation(_fragment_weight.operands(weight), False):
        pytest.skip("planar rows are taken: fp16 does not hold the format")
    x = torch.eye(32).to(dtype)
    assert torch.equal(product(x, weight), values[codes].T.to(dtype))
    assert torch.equal(product(x[8:16], weight), values[codes].T[8:16].to(dtype))      # the kernel for up to 8 rows


def test_a_weight_with_a_code_of_nan_or_infinity_is_multiplied_from_planar_rows_and_keeps_it():
    for name, code in (("e4m3fn", 0x7F), ("e5m2", 0x7C)):
        codes = torch.zeros(8, 32)
        codes[3, 5] = code
        weight = fragments(codes, torch.ones(8, 1), scheme_named(f"{name}-row"))
        x = torch.ones(2, 32, dtype=torch.bfloat16, device=DEVICE)
        fused = TritonFused()
        assert not isinstance(fused.configs(x, weight)[0], Tile | StreamTile)
        y = fused.matmul(x, weight)
        assert not y[:, 3].isfinite().any() and not y[:, [0, 1, 2, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_e8m0_scale_multiplies_exactly(dtype):
    """Each row has scales of its own magnitude, a few neighbours: all under which 6 does not overflow fp32."""
    exponents = torch.arange(250, dtype=torch.uint8).unfold(0, 5, 5)     # 50 rows of 5
    exponents = torch.cat([exponents, torch.full((6, 5), 127, dtype=torch.uint8)])
    codes = torch.zeros(56, 5 * 32)
    codes[:, ::32] = torch.tensor([2.0, 7.0, 9.0, 1.0, 15.0])    # 1, 6, -0.5, 0.5, -6
    weight = fragments(codes, exponents, scheme_named("mxfp4"))
    x = torch.zeros(5, 160, dtype=dtype)
    x[torch.arange(5), torch.arange(5) * 32] = 1
    expected = (x.double() @ weight.dequantize().cpu().double().T).to(dtype)
    assert torch.equal(product(x, weight), expected)


def test_fragments_in_the_order_of_earlier_versions_are_multiplied_from_planar_rows():
    torch.manual_seed(4)
    weight = TritonFused().quantize(torch.randn(8, 128).to(DEVICE), scheme_named("e4m3fn-row"))
    earlier = weight.relayout("fragment_m3")
    assert weight.layout == "fragment_quad_m3" and not torch.equal(earlier.packed, weight.packed)
    x = torch.randn(2, 128).bfloat16().to(DEVICE)
    fused = TritonFused()
    assert not isinstance(fused.configs(x, earlier)[0], Tile | StreamTile)
    expected = reference.matmul_reference(x.cpu(), weight.dequantize().cpu(), quantized=False)
    assert bool(((fused.matmul(x, earlier).cpu().double() - expected.product).abs() <= expected.tolerance).all())


def test_e8m0_scales_up_to_sixty_octaves_apart_fit_a_row_and_others_are_stored_in_planar_rows():
    codes = torch.full((8, 64), 2)
    near, far = torch.tensor([[60, 120]] * 8, dtype=torch.uint8), torch.tensor([[59, 120]] * 8, dtype=torch.uint8)
    x = torch.zeros(1, 64)
    x[0, 3] = 2.0**40
    assert_right(x.bfloat16(), fragments(codes, near, scheme_named("mxfp4")))
    weight = fragments(codes, far, scheme_named("mxfp4"))
    assert _fragment_weight.operands(weight) is None
    original = weight.dequantize()
    assert TritonFused().quantize(original, scheme_named("mxfp4")).layout == "planar"


def test_every_e4m3_scale_of_nvfp4_multiplies_exactly():
    scales = torch.arange(1, 0x7F, dtype=torch.uint8).reshape(-1, 2)     # 63 rows of 2
    scales = torch.cat([scales, torch.ones(1, 2, dtype=torch.uint8)])
    codes = torch.zeros(64, 32)
    codes[:, 0], codes[:, 16] = 7, 9    # 6 and -0.5
    weight = fragments(codes, scales, scheme_named("nvfp4"), torch.full((1,), 0.5, device=DEVICE))
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    x[0, 0] = x[1, 16] = 1
    assert torch.equal(product(x, weight), (x.double() @ weight.dequantize().cpu().double().T).bfloat16())


def test_nvfp4_blocks_of_zeros_fit_and_scales_that_are_negative_nan_or_zero_over_codes_do_not():
    scheme, one = scheme_named("nvfp4"), torch.ones(1, device=DEVICE)
    codes = torch.full((8, 32), 7)
    codes[2, 16:] = 8      # -0
    scales = torch.full((8, 2), 0x38, dtype=torch.uint8)
    scales[2, 1] = 0
    assert_right(torch.randn(3, 32).bfloat16(), fragments(codes, scales, scheme, one))
    for bad, row in ((0x7F, 0), (0xB8, 0), (0, 0)):
        spoiled = scales.clone()
        spoiled[row, 0] = bad
        assert _fragment_weight.operands(fragments(codes, spoiled, scheme, one)) is None


HELD = [name for name in (*SCHEMES, "e2m2-row", "e3m3-g64", "e1m1-row", "e4m3fn-b128x128", "e4m3fn-b128x128.e8m0",
                          "int4-g128.bf16", "nvfp4.div")
        if (scheme := scheme_named(name)).quantized and not _fragment_weight.why_not(scheme)]


@pytest.mark.parametrize(("name", "shape"), in_turn(
    HELD, [(1, 8, 168), (7, 24, 256), (8, 16, 8), (9, 40, 328), (66, 24, 136)], one_in=3))
def test_products_of_ragged_shapes_stay_within_the_derived_tolerance(name, shape):
    (m, n, k), scheme = shape, scheme_named(name)
    torch.manual_seed(m)
    weight = TritonFused().quantize(torch.randn(n, k).to(DEVICE), scheme)
    assert weight.layout.startswith("fragment") and weight.has_codes
    assert_right(torch.randn(m, k).bfloat16(), weight)


@pytest.mark.parametrize(("name", "tile"), in_turn(["e3m2-row", "nvfp4", "e2m1-g32"], [
    Tile(8, 1, 1, 2, 2), Tile(8, 2, 2, 1, 1), Tile(16, 1, 4, 2, 1, True), Tile(16, 2, 1, 1, 2, False),
    Tile(32, 1, 1, 4, 1, True)], one_in=2), ids=str)
def test_every_way_to_divide_the_work_gives_the_product(name, tile):
    torch.manual_seed(5)
    weight = TritonFused().quantize(torch.randn(40, 512).to(DEVICE), scheme_named(name))
    assert_right(torch.randn(11, 512).bfloat16(), weight, tile)


@pytest.mark.parametrize("tile", [Tile(8, 1, 1, 4, 1), Tile(16, 2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("name", ["e4m3fn-row", "mxfp4"])
def test_k_need_not_be_a_multiple_of_what_the_warps_read_at_once(name, tile):
    torch.manual_seed(6)
    weight = TritonFused().quantize(torch.randn(24, 640).to(DEVICE), scheme_named(name))
    x = torch.randn(5, 640).bfloat16()
    assert not _fragment.fitting(tile, x).ordered
    assert_right(x, weight, tile)
    x[2, -1] = float("inf")     # the tile that is read in the place of those past the end
    expected = x[2, -1] * TritonFused().dequantize(weight)[:, -1].cpu()
    assert torch.equal(TritonFused().matmul_with(x.to(DEVICE), weight, tile)[2].cpu().isinf(), expected.isinf())


def test_x_may_lie_anywhere_and_be_multiplied_in_parts(monkeypatch):
    torch.manual_seed(3)
    weight = TritonFused().quantize(torch.randn(16, 256).to(DEVICE), scheme_named("e2m1-row"))
    x = torch.randn(23, 300).half()
    whole = product(x[:, 1:257].contiguous(), weight)
    for lying in (x[:, 1:257], x[:, 1:257].T.contiguous().T):
        assert torch.equal(product(lying, weight), whole)
    monkeypatch.setattr(_fragment, "MOST_ROWS", 8)
    assert torch.equal(product(x[:, 1:257], weight), whole)


def test_the_range_of_bf16_activations_is_kept():
    torch.manual_seed(2)
    for name in ("e5m2-row", "e5m2fnuz-row", "e4m3fn-row", "int8-row"):
        weight = TritonFused().quantize(torch.randn(8, 64).to(DEVICE), scheme_named(name))
        for magnitude in (2.0**100, 2.0**-100):
            x = (torch.randn(3, 64) * magnitude).bfloat16()
            assert_right(x, weight)
            assert bool(product(x, weight).isfinite().all())


def test_what_is_derived_from_a_weight_follows_it():
    """Changed in place, with other scales, or another weight in the same memory: never the old scales."""
    torch.manual_seed(6)
    fused, x = TritonFused(), torch.randn(2, 64).bfloat16().to(DEVICE)
    weight = fused.quantize(torch.randn(8, 64).to(DEVICE), scheme_named("mxfp4"))
    before = fused.matmul(x, weight)
    doubled = replace(weight, scales=weight.scales + 1)
    assert torch.equal(fused.matmul(x, doubled), before * 2) and torch.equal(fused.matmul(x, weight), before)
    weight.scales.add_(1)
    assert torch.equal(fused.matmul(x, weight), before * 2)
    assert len(fused._derived) == 1
    del weight, doubled
    assert len(fused._derived) == 0, "what was derived is kept longer than the weight"


def test_what_fragments_do_not_hold_is_stored_in_planar_rows():
    fused = TritonFused()
    for name, shape in (("e4m3fn-row", (9, 64)), ("e4m3fn-row", (8, 60)), ("e2m1-g16", (8, 64)), ("e3m4-nv", (8, 64))):
        assert fused.quantize(torch.randn(shape).to(DEVICE), scheme_named(name)).layout == "planar"
    assert _fragment_weight.layout_of(scheme_named("e4m3fn-row"), 1 << 16, 1 << 17) is None, "offsets are 32 bits"
    assert _fragment_weight.layout_of(scheme_named("e4m3fn-row"), 1 << 15, 1 << 16) == "fragment_quad_m3"


def test_there_is_one_tile_for_every_case_and_gluon_is_asked_for_on_sm_90_only():
    for arch, stream in ((80, False), (90, True), (90, False), (120, False)):
        for m in (1, 2, 8, 9, 16, 17, 64, 65, 300, 513, 9000):
            for bits in range(1, 9):
                for scaling in ("none", "mx", "nv", "fp32"):
                    tiles = {type(pick(m, n, k, bits, scaling, TileDevice(arch, stream)))
                             for n in (8, 8192, 10000, 99999) for k in (8, 5000, 30000)}
                    if not stream or scaling == "fp32" or m <= 8:
                        assert tiles == {Tile}
                    elif m > 64:
                        assert tiles == {StreamTile}
    assert not _fragment.has_stream(89) and not _fragment.has_stream(100)


def test_one_config_is_listed_for_fragments_and_without_tuning_for_planar_rows(monkeypatch):
    fused = TritonFused()
    x = torch.randn(2, 64).bfloat16().to(DEVICE)
    for shape in ((8, 64), (9, 64)):
        weight = fused.quantize(torch.randn(shape).to(DEVICE), scheme_named("e4m3fn-row"))
        assert len(fused.configs(x, weight)) == 1
    monkeypatch.setenv("FPX_TUNE", "1")
    assert triton_fused.tuning()
    monkeypatch.setenv("FPX_TUNE", "0")
    assert not triton_fused.tuning()

"""triton_fused decodes planar rows exactly, scales rightly and takes any shape: on a GPU, else in the interpreter."""

import math

import pytest
import torch
from core import in_turn

from fpxbench.checking import reference
from fpxbench.implementation import discover
from fpxbench.numbers.formats import FORMATS, format_named
from fpxbench.numbers.scaling import Scales, scaling_named
from fpxbench.numbers.scheme import Scheme, scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),     # NaN codes, in the interpreter
]

TritonFused = discover()[0]["triton_fused"]
from fpxbench.impls import _planar, _triton_modules  # noqa: E402  (discover makes the package of implementations)
from fpxbench.impls._planar import Dot, Matvec  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MATVEC, DOT = Matvec(rows=2, words=128, num_warps=1), Dot(block_m=32, block_n=16, block_k=32, num_warps=4, num_stages=2)
ONE_SCALE = scaling_named("tensor")
FORMAT_NAMES = [name for name in FORMATS if name != "e8m0"] + [
    "e1m0", "e1m1", "e2m2", "e3m3", "e1m6", "e4m0", "e3m2ieee", "e6m1", "e6m1ieee", "e7m0fn", "e3m4b5", "e5m2b10ieee",
]


def weight_of(codes, scales, scheme):
    return QuantizedWeight.from_codes(codes.to(torch.uint8).to(DEVICE), Scales(scales.to(DEVICE)), scheme)


def product(x, weight, config=None):
    """Return what triton_fused computes on the CPU."""
    fused = TritonFused()
    x = x.to(DEVICE)
    return (fused.matmul(x, weight) if config is None else fused.matmul_with(x, weight, config)).cpu()


def assert_right(x, weight, config=None):
    expected = reference.matmul_reference(x.reshape(-1, x.shape[-1]), weight.dequantize().cpu(), quantized=False)
    y = product(x, weight, config)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.shape[0])
    error = (y.reshape(expected.product.shape).double() - expected.product).abs()
    assert bool((error <= expected.tolerance).all()), (
        f"{config}: off by {(error / expected.tolerance).max():.3g} tolerances"
    )


def same(y, expected):
    return bool(((y == expected) | (y.isnan() & expected.isnan())).all())


@pytest.mark.parametrize(
    ("config", "dtype"),    # the matvec kernel decodes to fp32 whatever x is
    [(MATVEC, torch.bfloat16), (DOT, torch.bfloat16), (DOT, torch.float16)], ids=["matvec", "dot-bf16", "dot-fp16"],
)
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_code_of_every_format_decodes_to_its_definition(name, config, dtype):
    fmt = format_named(name)
    values = decode_table(fmt)
    finite = torch.arange(len(values))[values.isfinite()]
    special = torch.arange(len(values))[~values.isfinite()]
    k, scheme, ones = 32, Scheme(f"{name}-tensor", fmt, ONE_SCALE), torch.ones(1, 1)
    numbers = torch.nn.functional.pad(finite, (0, -len(finite) % k)).reshape(-1, k)
    x, weight = torch.eye(k).to(dtype), weight_of(numbers, ones, scheme)
    y = torch.cat([product(rows, weight, config) for rows in x.split(16 if config is MATVEC else k)])
    assert same(y, values[numbers].T.to(dtype))
    if len(special):
        specials = torch.zeros(len(special), k, dtype=torch.long)   # a row each: NaN and infinity spoil all of theirs
        specials[:, 5] = special
        x = x[5:7]
        assert same(product(x, weight_of(specials, ones, scheme), config),
                    (x.double() @ values[specials].double().T).to(dtype))


@pytest.mark.parametrize("config", [MATVEC, DOT], ids=["matvec", "dot"])
def test_every_e8m0_scale_decodes_to_its_definition(config):
    scheme = scheme_named("mxfp4")
    exponents = torch.arange(256, dtype=torch.uint8)
    codes = torch.zeros(16, 16 * 32)
    codes[:, ::32] = 2      # 1.0 in each block
    weight = weight_of(codes, exponents.reshape(16, 16), scheme)
    x = torch.zeros(16, 16 * 32, dtype=torch.bfloat16)
    x[torch.arange(16), torch.arange(16) * 32] = 1
    y = product(x, weight, config)
    expected = (2.0 ** (exponents.double() - 127)).reshape(16, 16).T
    assert bool(y[:, 15].isnan().all()), "a row with a NaN scale has only NaN products"
    assert torch.equal(y[:, :15], expected[:, :15].to(torch.bfloat16))


@pytest.mark.parametrize("config", [MATVEC, DOT], ids=["matvec", "dot"])
def test_every_e4m3fn_block_scale_of_nvfp4_decodes_to_its_definition(config):
    scheme = scheme_named("nvfp4")
    scales = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    codes = torch.zeros(16, 256, dtype=torch.uint8)
    codes[:, ::16] = 2
    weight = QuantizedWeight.from_codes(
        codes.to(DEVICE), Scales(scales.to(DEVICE), torch.full((1,), 0.5, device=DEVICE)), scheme
    )
    x = torch.zeros(16, 256, dtype=torch.float16)
    x[torch.arange(16), torch.arange(16) * 16] = 1
    y = product(x, weight, config)
    expected = (x.double() @ weight.dequantize().cpu().double().T).half()
    assert int(expected.isnan().sum()) == 2 * 16 and same(y, expected)


SCHEMES = ["e4m3fn-row", "e4m3fn-tensor", "e4m3fnuz-g128", "e5m2fnuz-row", "int8-row", "e3m2-g128", "mxfp6_e2m3",
           "mxfp4", "nvfp4", "e2m2-g32", "e3m3-g24", "e1m1-g10", "e3m4-g100", "e4m3fn-b16x24.bf16", "e2m1-nv16x16"]


@pytest.mark.parametrize(("name", "layer"), in_turn(
    SCHEMES, [(1, 5, 168, torch.bfloat16), (2, 9, 97, torch.float16), (18, 18, 200, torch.bfloat16)], one_in=2))
def test_products_of_ragged_shapes_stay_within_the_derived_tolerance(name, layer):
    m, n, k, dtype = layer
    torch.manual_seed(0)
    weight = TritonFused().quantize(torch.randn(n, k).to(DEVICE), scheme_named(name))
    weight = weight.relayout("planar")
    assert_right(torch.randn(m, k).to(dtype), weight)
    if 1 < m <= _planar.MATVEC_MAX_M:
        assert_right(torch.randn(m, k).to(dtype), weight, DOT)


@pytest.mark.parametrize("name", ["e4m3fn-row", "mxfp4", "e3m2-g24"])
@pytest.mark.parametrize("m", [1, 2, 40])
def test_every_config_multiplies_rightly(name, m):
    torch.manual_seed(1)
    weight = TritonFused().quantize(torch.randn(5, 1056).to(DEVICE), scheme_named(name))
    x = torch.randn(m, 1056).bfloat16()
    # On a GPU, all that autotuning may pick; the interpreter is given those of one, which its own choice is not among.
    target = _planar.target_of(weight.device)
    target = _planar.Target("cuda", 90) if target.interpreted else target
    configs = _planar.worth_trying(m, weight.scheme, 1056, target)
    assert len(configs) > 1
    for config in configs:
        assert_right(x, weight, config)


@pytest.mark.parametrize("scheme", [scheme_named("e3m2-g64"), scheme_named("mxfp4")], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("config", [MATVEC, DOT], ids=["matvec", "dot"])
def test_a_weight_is_never_rounded_to_the_activations_dtype(scheme, config):
    """Scales of far apart magnitudes within one row: rounding a scaled weight to fp16 would lose the small ones."""
    codes = torch.randint(0, 1 << scheme.format.bits, (4, 128))
    if scheme.scaling.scale_format.powers_of_two:
        scales = torch.tensor([[90, 127, 100, 140]], dtype=torch.uint8).expand(4, 4).contiguous()
        tiny = 2.0**30
    else:
        scales, tiny = torch.tensor([[3e-9, 1.1]]).expand(4, 2).contiguous(), 2.0**15
    weight = weight_of(codes, scales, scheme)
    x = torch.zeros(4, 128)
    x[torch.arange(4), torch.arange(4)] = tiny
    assert_right(x.to(torch.bfloat16), weight, config)
    expected = (x.double() @ weight.dequantize().cpu().double().T).float().bfloat16()
    assert torch.equal(product(x.bfloat16(), weight, config), expected)


@pytest.mark.parametrize("magnitude", [2.0**100, 2.0**-100])
@pytest.mark.parametrize("name", ["e5m2-row", "e5m2fnuz-row", "e4m3fn-row", "int8-row"])
@pytest.mark.parametrize("config", [MATVEC, DOT], ids=["matvec", "dot"])
def test_bf16_activations_keep_their_range(name, magnitude, config):
    torch.manual_seed(2)
    weight = TritonFused().quantize(torch.randn(6, 64).to(DEVICE), scheme_named(name))
    x = (torch.randn(3, 64) * magnitude).bfloat16()
    assert_right(x, weight, config)
    assert bool(product(x, weight, config).isfinite().all())


def test_x_may_have_any_leading_shape_be_strided_or_empty():
    torch.manual_seed(3)
    weight = TritonFused().quantize(torch.randn(9, 64).to(DEVICE), scheme_named("e2m1-row"))
    for shape in [(64,), (1, 1, 64), (2, 3, 64)]:
        assert_right(torch.randn(shape).half(), weight)
    assert_right(torch.randn(64, 3).half().T, weight)
    assert_right(torch.randn(2, 130).half()[:, 1:65], weight)
    for shape in [(0, 64), (2, 0, 64)]:
        assert product(torch.empty(shape, dtype=torch.bfloat16), weight).shape == (*shape[:-1], 9)


def test_packed_codes_may_begin_at_any_byte():
    torch.manual_seed(4)
    weight = TritonFused().quantize(torch.randn(9, 64).to(DEVICE), scheme_named("e2m1-row"))
    storage = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8, device=DEVICE)
    packed = storage[1:].view_as(weight.packed).copy_(weight.packed)
    shifted = QuantizedWeight(weight.scheme, weight.shape, weight.layout, packed, weight.scales)
    x = torch.randn(2, 64).half()
    assert torch.equal(product(x, shifted), product(x, weight))


def test_operands_that_do_not_fit_are_refused_by_name():
    weight = TritonFused().quantize(torch.randn(4, 64).to(DEVICE), scheme_named("e2m1-row"))
    with pytest.raises(ValueError, match="float32"):
        product(torch.randn(2, 64), weight)
    with pytest.raises(ValueError, match=r"\[2, 63\]"):
        product(torch.randn(2, 63).half(), weight)


def test_it_says_what_it_does_not_take():
    fused = TritonFused()
    assert fused.supports(scheme_named("e3m4b5-g64"), DEVICE).supported
    assert "no codes" in fused.supports(scheme_named("bf16"), DEVICE).reason
    factor = fused.supports(scheme_named("e2m1b-120-row"), DEVICE)
    assert not factor.supported and "2**135" in factor.reason
    assert "list of values" in fused.supports(scheme_named("nf4-g64"), DEVICE).reason
    assert "16-bit activations" in fused.supports(scheme_named("e4m3fn-row+e4m3fn-row"), DEVICE).reason
    assert "interpreter" in fused.no_timing("cpu") and fused.no_timing("cuda") is None


def test_interpreted_and_compiled_kernels_live_side_by_side():
    """The interpreter must not take over the kernels that torch.compile makes in the same process."""
    from triton import JITFunction, jit, knobs
    from triton.runtime.interpreter import InterpretedFunction

    assert isinstance(_triton_modules.kernels("_triton_kernels", True).matvec_kernel, InterpretedFunction)
    if not knobs.runtime.interpret:
        assert isinstance(_triton_modules.kernels("_triton_kernels", False).matvec_kernel, JITFunction)
        assert isinstance(jit(test_it_says_what_it_does_not_take), JITFunction)


def test_the_smallest_product_of_a_raw_code_is_normal_in_fp32():
    """The power of two that makes up for the bias may wait for the sum only because of this."""
    from fpxbench.impls import _triton_codes

    for name in FORMAT_NAMES:
        lanes = _triton_codes.lanes_of(format_named(name))
        if lanes.kind == "fp16":
            fmt = format_named(name)
            smallest = math.ldexp(fmt.min_subnormal if fmt.mantissa_bits else fmt.min_normal, -lanes.exponent)
            assert smallest >= 2.0**-24

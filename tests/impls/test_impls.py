"""Claims about every shipped implementation except triton_fused, which needs an interpreter and has its own file."""

import copy
from functools import partial

import pytest
import torch

from fpxbench.checking import reference
from fpxbench.implementation import discover, shipped_folder
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.scaling import Scales
from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.weight import QuantizedWeight

KNOWN, FAILURES = discover()
# Those that multiply quantized activations alone have test_quantized_activations.py.
PEERS = {file.stem for file in (shipped_folder() / "peers").glob("[!_]*.py")}     # test_peers.py
NAMES = sorted(set(KNOWN) - {"triton_fused", "int_mm", "scaled_mm_fp4"} - PEERS)
COMPILED = {"compiled_mixed_mm", "cpu_fused"}
BY_PARTS = ("e2m2-row", "e1m1-g32", "e3m3-mx", "e4m1b9-row", "int4-g48")
ALL_SCHEMES = (*SCHEMES, *BY_PARTS)


def supported(name, schemes=ALL_SCHEMES):
    return [scheme for scheme in schemes if KNOWN[name]().supports(scheme_named(scheme), "cpu").supported]


PAIRS = [(name, scheme) for name in NAMES for scheme in supported(name)]
# A compilation takes seconds, so where one is needed these schemes stand for the ways to decode and to scale, and tests
# of a layer of 37 x 75 have a kernel for one token and one for MANY.
MANY = 75
REPRESENTATIVE = ("bf16", "fp16", "int8-row", "e4m3fn-tensor", "e5m2fnuz-row", "e3m2-g128", "mxfp4")
SOME_PAIRS = [(name, scheme) for name in NAMES for scheme in supported(name, REPRESENTATIVE)]
EAGER_OR_SOME = [(name, scheme) for name, scheme in PAIRS if name not in COMPILED or (name, scheme) in SOME_PAIRS]


def stored(name, scheme, n=37, k=75, seed=0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    implementation = KNOWN[name]()
    return implementation, implementation.quantize(weight, scheme_named(scheme))


def activation_dtype(scheme):
    return scheme_named(scheme).dense_dtype or torch.bfloat16


def activation(*shape, dtype=torch.bfloat16, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activation_rule(implementation, weight):
    """Return what `torch._scaled_mm` is given: float8 of the weight's own convention, a scale a row."""
    if implementation.activation_format is None:
        return None
    return ActivationRule("e4m3fnuz-row" if weight.scheme.format.specials == "fnuz" else "e4m3fn-row")


def assert_right(implementation, x, weight):
    out = implementation.matmul(x, weight)
    assert out.shape == (*x.shape[:-1], weight.shape[0]) and out.dtype == x.dtype
    expected = reference.matmul_reference(
        x.reshape(-1, x.shape[-1]), implementation.dequantize(weight), quantized=weight.scheme.quantized,
        rule=activation_rule(implementation, weight),
    )
    error = (out.reshape(expected.product.shape).double() - expected.product).abs()
    assert bool((error <= expected.tolerance).all()), f"off by {(error / expected.tolerance).max():.1f} tolerances"


def test_every_file_of_the_folder_loads():
    assert not FAILURES
    assert {file.stem for file in shipped_folder().glob("[!_]*.py")} | PEERS == set(KNOWN)


def test_the_baseline_is_the_dense_layer_alone():
    assert [name for name in KNOWN if KNOWN[name].baseline] == ["dense"]


@pytest.mark.parametrize("name", NAMES)
def test_a_refusal_is_one_sentence_that_names_the_scheme(name):
    for scheme in ALL_SCHEMES:
        support = KNOWN[name]().supports(scheme_named(scheme), "cpu")
        if not support.supported:
            assert scheme in support.reason or scheme_named(scheme).format.name in support.reason
            assert "\n" not in support.reason


def test_every_quantized_scheme_has_an_implementation_that_supports_it():
    quantized = [scheme for scheme in ALL_SCHEMES if scheme_named(scheme).quantized]
    assert supported("eager_upcast") == supported("cpu_fused") == quantized


@pytest.mark.parametrize("name, scheme", EAGER_OR_SOME)
def test_a_ragged_layer_lies_within_the_derived_tolerance(name, scheme):
    implementation, weight = stored(name, scheme)
    for tokens in (1, MANY) if name == "compiled_mixed_mm" else (1, 9, MANY):
        assert_right(implementation, activation(tokens, 75, dtype=activation_dtype(scheme)), weight)


@pytest.mark.parametrize("scheme", ["e2m2-row", "e2m1-g8", "nvfp4"])
def test_one_token_is_multiplied_by_codes_of_any_width_and_blocks_of_any_size(scheme):
    implementation, weight = stored("cpu_fused", scheme)
    assert_right(implementation, activation(1, 75), weight)


@pytest.mark.parametrize("name", ["native_float8", "compiled_mixed_mm", "cpu_fused", "eager_upcast", "scaled_mm"])
def test_fp16_activations_do_not_overflow_before_the_scale(name):
    implementation, weight = stored(name, "e5m2-row", k=96)
    assert (weight.codes() & 0x7F).max() == 0x7B      # 57344: two of them are past fp16's maximum
    assert_right(implementation, activation(3, 96, dtype=torch.float16), weight)


def test_a_dense_weight_refuses_activations_of_another_dtype():
    implementation, weight = stored("dense", "fp16")
    with pytest.raises(TypeError, match="fp16.*bfloat16"):
        implementation.matmul(activation(3, 75), weight)


@pytest.mark.parametrize("name, scheme", SOME_PAIRS)
def test_a_one_hot_activation_reads_back_the_decoded_weight(name, scheme):
    implementation, weight = stored(name, scheme)
    x = torch.eye(75, dtype=activation_dtype(scheme))
    decoded = implementation.dequantize(weight).T.double()
    error = (implementation.matmul(x, weight).double() - decoded).abs()
    assert bool((error <= reference.one_hot_tolerance(decoded, x.dtype)).all())


@pytest.mark.parametrize("name, scheme", [
    (name, scheme) for name in ("eager_upcast", "cpu_fused", "native_float8", "compiled_mixed_mm")
    for scheme in supported(name, ("e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "e5m2fnuz-row", "e3m4-row", "e2m1-row"))
])
def test_every_code_is_multiplied_as_its_definition_infinities_and_nans_too(name, scheme):
    parsed = scheme_named(scheme)
    table = decode_table(parsed.format)
    codes = torch.arange(len(table), dtype=torch.uint8)[:, None].repeat(1, 32)      # row n holds code n
    codes[:, 1:] = 0
    ones = Scales(torch.ones(len(table), 1))
    weight = QuantizedWeight.from_codes(codes, ones, parsed, KNOWN[name].layout)
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    x[0, 0] = 1
    for tokens in (1, 8) if name == "cpu_fused" else (1,):      # it multiplies few tokens and many in different ways
        for row in KNOWN[name]().matmul(x.repeat(tokens, 1), weight).float():
            torch.testing.assert_close(row, table, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name, scheme", [(name, supported(name)[0]) for name in NAMES])
class TestShapes:
    def test_leading_dimensions_are_kept(self, name, scheme):
        implementation, weight = stored(name, scheme)
        assert_right(implementation, activation(3, 1, MANY // 3, 75), weight)
        assert_right(implementation, activation(75), weight)

    def test_no_tokens_give_no_rows(self, name, scheme):
        implementation, weight = stored(name, scheme)
        assert implementation.matmul(activation(0, 75), weight).shape == (0, 37)
        assert implementation.matmul(activation(2, 0, 75), weight).shape == (2, 0, 37)

    def test_an_activation_need_not_be_contiguous(self, name, scheme):
        implementation, weight = stored(name, scheme)
        assert_right(implementation, activation(75, MANY).T, weight)
        assert_right(implementation, activation(MANY, 150)[:, ::2], weight)

    def test_a_single_output_and_a_single_input_work(self, name, scheme):
        implementation, weight = stored(name, scheme, n=1, k=1)
        assert_right(implementation, activation(2, 1), weight)

    def test_operands_are_unchanged_and_outputs_are_not_reused(self, name, scheme):
        implementation, weight = stored(name, scheme)
        first, second = activation(MANY, 75, seed=2), activation(MANY, 75, seed=3)
        kept, before = copy.deepcopy(weight.tensors()), first.clone()
        out = implementation.matmul(first, weight)
        out_before = out.clone()
        implementation.matmul(second, weight)
        assert torch.equal(first, before) and torch.equal(out, out_before)
        for tensor_name, tensor in weight.tensors().items():
            assert torch.equal(tensor, kept[tensor_name])


def test_more_rows_than_one_block_are_decoded_each_with_its_own_scale():
    implementation, weight = stored("cpu_fused", "e4m3fn-row", n=1100, k=64)
    assert_right(implementation, activation(8, 64), weight)


@pytest.fixture
def one_compilation(monkeypatch):
    """Have PyTorch compile a function once, and raise where it would do so again. It is Dynamo that counts, so its
    graphs run as they are."""
    from torch._dynamo import config

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    with config.patch(recompile_limit=1):
        yield


def test_many_cases_in_one_process_do_not_use_up_dynamos_recompilations(one_compilation):
    for n in (8, 9, 10):
        implementation, weight = stored("compiled_mixed_mm", "e5m2-row", n=n, k=32)
        assert_right(implementation, activation(1, 32), weight)


def test_many_token_counts_in_one_case_do_not_use_up_dynamos_recompilations(one_compilation):
    implementation, weight = stored("compiled_mixed_mm", "int8-row", n=32, k=32)
    for tokens in (1, 2, 3):
        assert_right(implementation, activation(tokens, 32), weight)


def test_the_seed_case_of_the_issue_is_right():
    implementation, weight = stored("compiled_mixed_mm", "e5m2-tensor", n=32, k=32)
    assert_right(implementation, activation(1, 32), weight)


def test_cpu_fused_is_refused_off_the_cpu():
    support = KNOWN["cpu_fused"]().supports(scheme_named("e4m3fn-row"), "cuda")
    assert not support.supported and "cuda" in support.reason


VARIANTS = ["e4m3fn-b128x128", "e4m3fn-b32x48.e8m0", "e3m2-g32.bf16", "mxfp4.rceil", "nvfp4.div", "nvfp4.4over6",
            "e2m1-nv16x16", "nf4-g64", "bnbfp4-g64", "e4m3fn-row.fp16", "int4-g32.bf16"]


@pytest.mark.parametrize("scheme", VARIANTS)
@pytest.mark.parametrize("name", ["eager_upcast", "cpu_fused", "native_float8", "compiled_mixed_mm"])
def test_scales_and_values_of_other_libraries_are_multiplied_right_or_refused(name, scheme):
    scheme, implementation = scheme_named(scheme), KNOWN[name]()
    support = implementation.supports(scheme, "cpu")
    if not support.supported:
        assert support.reason
        return
    weight = implementation.quantize(torch.randn(150, 100), scheme)
    x = torch.randn(3, 100, dtype=torch.bfloat16)
    expected = reference.matmul_reference(x, implementation.dequantize(weight).float(), quantized=True)
    assert reference.compare(implementation.matmul(x, weight), expected).within


def test_every_variant_has_an_implementation():
    taken = {
        scheme for scheme in VARIANTS for cls in KNOWN.values() if cls().supports(scheme_named(scheme), "cpu").supported
    }
    assert taken == set(VARIANTS)

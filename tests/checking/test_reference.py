"""References and tolerances: what is right is inside whatever the order of its sums; what is not is outside."""

import math

import pytest
import torch
import torch.nn.functional as F

from fpxbench.checking import inputs, reference
from fpxbench.implementation import Implementation
from fpxbench.numbers.activation_rule import ActivationRule
from fpxbench.numbers.formats import FORMATS, format_named
from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.records.case import Case

pytestmark = pytest.mark.usefixtures("one_thread")

QUANTIZED = [name for name in SCHEMES if scheme_named(name).quantized]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def make(scheme="e4m3fn-row", m=4, n=48, k=256, activation="bf16", workload="x"):
    return Case(implementation="i", scheme=scheme, workload=workload, m=m, n=n, k=k, activation=activation)


def operands(case, seed=0):
    scheme = scheme_named(case.scheme)
    weight = Implementation().quantize(inputs.make_weight(case, seed), scheme)
    return inputs.make_activation(case, seed, 0), weight


def truncated(x):
    """Return fp32 with its last bit cut off: what a unit that does not round to nearest leaves."""
    return (x.view(torch.int32) & ~1).view(torch.float32)


def in_turn(x, w):
    total = torch.zeros(x.shape[0], w.shape[0])
    for k in range(x.shape[1]):
        total = truncated(total + x[:, k, None] * w[None, :, k])
    return total


# Ways to a right product: fp32 sums in some order, the weight or the output rounded on the way as kernels do.
RIGHT = {
    "linear in the activation's dtype": lambda x, w: F.linear(x, w.to(x.dtype)),
    "fp32 throughout": lambda x, w: F.linear(x.float(), w).to(x.dtype),
    "one product after another, truncating": lambda x, w: in_turn(x.float(), w).to(x.dtype),
    "backwards": lambda x, w: F.linear(x.float().flip(1), w.flip(1)).to(x.dtype),
    "split over K": lambda x, w: sum(
        F.linear(a.float(), b) for a, b in zip(x.split(37, 1), w.split(37, 1), strict=True)
    ).to(x.dtype),
    "largest first": lambda x, w: in_turn(x[:, (i := w.abs().amax(0).argsort(descending=True))].float(), w[:, i]).to(
        x.dtype
    ),
}


@pytest.mark.parametrize("way", RIGHT)
@pytest.mark.parametrize("activation", DTYPES)
def test_a_right_product_is_inside_whatever_the_order_of_its_sums(way, activation):
    shapes = (
        [(1, 32, 32), (3, 77, 203), (4, 16, 4096)]
        if "truncating" not in way and "first" not in way
        else [(1, 32, 32), (3, 77, 203)]
    )
    for scheme in QUANTIZED:
        for seed, (m, n, k) in enumerate(shapes):
            x, weight = operands(make(scheme, m, n, k, activation), seed)
            decoded = weight.dequantize()
            comparison = reference.compare(
                RIGHT[way](x, decoded), reference.matmul_reference(x, decoded, quantized=True)
            )
            assert comparison.within, f"{scheme} {m}x{n}x{k}: {comparison.message()}"


@pytest.mark.parametrize("name", ["e4m3fn-row", "e3m2-row", "int8-row", "e5m2-tensor"])
def test_scaling_the_rounded_product_is_right_too(name):
    for seed in range(20):
        x, weight = operands(make(name), seed)
        unscaled = decode_table(weight.scheme.format)[weight.codes().int()]
        y = F.linear(x, unscaled.to(x.dtype)) * weight.scales.reshape(1, -1)
        comparison = reference.compare(
            y.to(x.dtype), reference.matmul_reference(x, weight.dequantize(), quantized=True)
        )
        assert comparison.within, comparison.message()


@pytest.mark.parametrize("activation", DTYPES)
def test_the_dense_product_needs_no_allowance_for_a_quantized_weight(activation):
    for seed in range(20):
        x, weight = operands(make(activation, 4, 64, 1024, activation), seed)
        decoded = weight.dequantize()
        assert reference.compare(
            F.linear(x, weight.packed), reference.matmul_reference(x, decoded, quantized=False)
        ).within
    dense, quantized = (reference.matmul_reference(x, decoded, quantized=flag).tolerance for flag in (False, True))
    assert bool((dense < quantized).all())


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("k", [1, 64, 4096])
def test_the_tolerance_is_derived_from_k_and_the_unit_roundoff(k, dtype):
    """Σ of k ones: two output roundings of k, an fp32 truncation for each of k sums, and 8 standard deviations of the
    weights'."""
    unit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    expected = reference.matmul_reference(torch.ones(1, k, dtype=dtype), torch.ones(1, k), quantized=True)
    derived = (2 * unit + unit**2) * k + k * 2.0**-23 * k + 8 * unit * math.sqrt(k) + torch.finfo(dtype).smallest_normal
    assert expected.product.item() == k
    assert expected.tolerance.item() == pytest.approx(derived, rel=1e-12)


def test_an_activation_that_is_declared_rounded_is_allowed_that_rounding_and_no_more():
    x, weight = operands(make(k=1024, n=256))
    decoded = weight.dequantize()
    rounded = decode_table(FORMATS["e4m3fn"])[scheme_named("e4m3fn-row").quantize(x.float())[0].int()]
    scale = x.float().abs().amax(dim=1, keepdim=True) / 448
    y = F.linear(rounded * scale, decoded).to(x.dtype)
    assert reference.compare(
        y, reference.matmul_reference(x, decoded, quantized=True, rule=ActivationRule("e4m3fn-row"))
    ).within
    assert not reference.compare(y, reference.matmul_reference(x, decoded, quantized=True)).within


def wrong_ways(x, weight):
    decoded, scheme = weight.dequantize(), weight.scheme
    table = decode_table(scheme.format)
    codes = weight.codes().int()
    spread = decoded / table[codes]
    yield "sums kept in bf16", in_bf16(x, decoded)
    yield "scales 5% off", F.linear(x.float(), decoded * 1.05).to(x.dtype)
    yield "the codes beside", F.linear(x.float(), table[(codes ^ 1)] * spread.nan_to_num(0)).to(x.dtype)
    yield "a sign lost", F.linear(x.float(), decoded.abs()).to(x.dtype)
    yield "the last 32 columns left out", F.linear(x.float()[:, :-32], decoded[:, :-32]).to(x.dtype)
    yield "rows shifted by one", F.linear(x.float(), decoded.roll(1, 0)).to(x.dtype)
    yield "the previous activation", F.linear(x.float().roll(1, 0), decoded).to(x.dtype)


def in_bf16(x, w):
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.bfloat16)
    for k in range(x.shape[1]):
        total += x[:, k, None] * w[None, :, k].bfloat16()
    return total


def test_what_is_wrong_is_outside():
    x, weight = operands(make("e2m3-row", 4, 64, 256))
    expected = reference.matmul_reference(x, weight.dequantize(), quantized=True)
    inside = [name for name, y in wrong_ways(x, weight) if reference.compare(y, expected).within]
    assert inside == []


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            (name, torch.bfloat16)
            for name in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e3m4", "e3m2", "e2m3", "e2m1", "e2m2", "int4")
        ),
        *((name, torch.float16) for name in ("e4m3fn", "e3m4", "e2m5", "int8")),
    ],
)
def test_one_hot_activations_tell_every_code_from_its_neighbour(name, dtype):
    fmt = format_named(name)
    numbers = decode_table(fmt)
    numbers = numbers[numbers.isfinite()].unique().double()
    for seed in range(5):
        scale = 0.5 + float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))
        weights = (numbers * scale).float().double()
        tolerance = reference.one_hot_tolerance(weights, dtype)
        rounded = weights.to(dtype).double()
        assert bool(((rounded - weights).abs() <= tolerance).all())
        gaps = (weights[1:] - weights[:-1]).abs()
        assert bool((gaps > tolerance[1:]).all()) and bool((gaps > tolerance[:-1]).all())


def test_the_reference_of_a_one_hot_activation_is_the_column_itself():
    x = inputs.one_hot([5, 0, 7], 3, 9, torch.bfloat16, "cpu")
    decoded = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(reference.matmul_reference(x, decoded, quantized=True).product, decoded[:, [5, 0, 7]].T.double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_element_that_is_not_finite_is_seen(bad):
    x, weight = operands(make())
    expected = reference.matmul_reference(x, weight.dequantize(), quantized=True)
    y = F.linear(x, weight.dequantize().to(x.dtype))
    y[2, 7] = bad
    comparison = reference.compare(y, expected)
    assert not comparison.within and not comparison.finite
    assert comparison.worst_at == (2, 7) and comparison.outside == 1


def test_the_worst_element_is_named_with_its_value_and_the_right_one():
    x, weight = operands(make())
    expected = reference.matmul_reference(x, weight.dequantize(), quantized=True)
    y = F.linear(x, weight.dequantize().to(x.dtype))
    y[1, 30] = 1000.0
    comparison = reference.compare(y, expected)
    assert (comparison.worst_at, comparison.worst_value) == ((1, 30), 1000.0)
    assert comparison.worst_expected == expected.product[1, 30].item()
    assert "the worst at [1, 30]: 1000 instead of" in comparison.message()


def test_an_output_of_no_tokens_is_right():
    x, weight = operands(make(m=0))
    expected = reference.matmul_reference(x, weight.dequantize(), quantized=True)
    assert expected.product.shape == (0, 48)
    assert reference.compare(torch.empty(0, 48, dtype=torch.bfloat16), expected).within


def test_a_long_reference_is_the_same_in_pieces(monkeypatch):
    x, weight = operands(make())
    whole = reference.matmul_reference(x, weight.dequantize(), quantized=True)
    monkeypatch.setattr(reference, "_REFERENCE_ELEMENTS", 5 * 256)
    pieces = reference.matmul_reference(x, weight.dequantize(), quantized=True)
    assert torch.allclose(pieces.product, whole.product, rtol=1e-13) and torch.allclose(
        pieces.tolerance, whole.tolerance, rtol=1e-13
    )


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_codes_canary_holds_every_number_of_its_format(name):
    case = make(name, 1, 64, 256, workload="canary.codes")
    weight = Implementation().quantize(inputs.make_weight(case, seed=3), scheme_named(name))
    table = decode_table(weight.scheme.format)
    stored = set(weight.codes().unique().tolist())
    wanted = {
        code for code, value in enumerate(table.tolist()) if math.isfinite(value) and value >= -weight.scheme.format.max
    }
    # -0 is what small negatives round to.
    assert stored >= {code for code in wanted if table[code] != 0 or not table[code].signbit()}
    columns = inputs.columns_covering_codes(weight, most=256)
    assert set(weight.codes()[:, columns].unique().tolist()) == stored


def test_inputs_are_the_same_for_every_rival_and_new_for_every_call():
    first, rival = (make(scheme) for scheme in ("e4m3fn-row", "mxfp4"))
    assert torch.equal(inputs.make_weight(first, 7), inputs.make_weight(rival, 7))
    assert not torch.equal(inputs.make_weight(first, 7), inputs.make_weight(first, 8))
    calls = [inputs.make_activation(first, 7, call) for call in range(3)]
    assert torch.equal(calls[0], inputs.make_activation(rival, 7, 0))
    assert not any(torch.equal(a, b) for a, b in zip(calls, calls[1:], strict=False))


def test_an_exactly_stored_weight_has_no_noise_to_speak_of():
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    assert reference.sqnr_db(weight, weight) is None
    assert reference.sqnr_db(weight, weight * 1.1) == pytest.approx(20.0, abs=1e-4)


def test_an_infinite_output_where_a_large_number_is_right_is_wrong_and_has_no_worst_element() -> None:
    product = torch.full((2, 3), 70_000.0, dtype=torch.float64)
    expected = reference.Reference(product, product * 0.01)
    y = product.to(torch.bfloat16)
    assert reference.compare(y, expected).within
    y[1, 2] = torch.inf     # as after fp16, whose range ends at 65504
    found = reference.compare(y, expected)
    assert not found.within and not found.finite and found.worst_at == (1, 2)
    assert found.worst_ulp == found.relative_error == float("inf")

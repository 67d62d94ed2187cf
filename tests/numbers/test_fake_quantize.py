"""Fake quantization: the codec's numbers in the input's dtype, with gradients, eager and compiled."""

import re
from functools import partial

import pytest
import torch
from codec_by_search import overflows
from places import DOCS

from fpxbench.numbers.codec_definition import SOURCES
from fpxbench.numbers.fake_quantize import fake_quantize, fake_quantize_weight
from fpxbench.numbers.formats import FORMATS, format_named
from fpxbench.numbers.scheme import SCHEMES, scheme_named
from fpxbench.numbers.tensor_codec import Overflow, Rounding, decode, encode

pytestmark = pytest.mark.usefixtures("one_thread")

HELD = [(name, source) for name in FORMATS for source in SOURCES if not (name == "e8m0" and source == torch.float16)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_bits(rounding):
    return 12 if rounding is Rounding.STOCHASTIC else None


@pytest.mark.parametrize(("name", "source"), HELD)
def test_it_is_encoding_and_decoding_in_the_dtype_of_the_input(name, source):
    fmt = FORMATS[name]
    x = (randn(50, 40) * fmt.max / 2).to(source)
    for rounding in Rounding:
        for overflow in overflows(fmt):
            how = {"random_bits": random_bits(rounding)}
            values = fake_quantize(x, fmt, rounding, overflow, generator=torch.Generator().manual_seed(1), **how)
            expected = decode(
                encode(x, fmt, rounding, overflow, generator=torch.Generator().manual_seed(1), **how), fmt
            )
            assert values.dtype == source and values.shape == x.shape
            torch.testing.assert_close(values.double(), expected.double(), rtol=0, atol=0, equal_nan=True)


def test_it_is_idempotent():
    for name, source in HELD:
        once = fake_quantize((randn(500) * FORMATS[name].max / 2).to(source), FORMATS[name])
        assert torch.equal(fake_quantize(once, FORMATS[name]), once)


def test_nan_stays_nan_also_in_a_format_without_one():
    x = torch.tensor([1.0, torch.nan])
    for name in ("e2m1", "int8", "e4m3fn"):
        assert fake_quantize(x, FORMATS[name]).isnan().tolist() == [False, True]


def test_a_dtype_that_cannot_hold_every_number_of_the_format_is_refused():
    for name in ("e8m0", "e6m1", "e5m2fnuz", "e5m2"):
        fmt = format_named(name)
        table = decode(torch.arange(1 << fmt.bits, dtype=torch.int32).to(torch.uint8), fmt)
        table = table[~table.isnan()]
        for source in SOURCES:
            if torch.equal(table.to(source).double(), table.double()):
                fake_quantize(torch.ones(1, dtype=source), fmt)
            else:
                with pytest.raises(ValueError, match=f"{source} does not hold every number of {name}.*: use float32"):
                    fake_quantize(torch.ones(1, dtype=source), fmt)


def test_its_derivative_is_zero_unless_straight_through():
    x = randn(10).requires_grad_()
    assert not fake_quantize(x, FORMATS["e2m1"]).requires_grad
    assert fake_quantize(x, FORMATS["e2m1"], straight_through=True).requires_grad


@pytest.mark.parametrize(("name", "x", "passes"), [
    ("e2m1", [-7.0, -6.0, 0.3, 6.0, 6.1, torch.inf, torch.nan], [0, 1, 1, 1, 0, 0, 0]),
    ("int8", [-128.0, -127.0, 127.0, 128.0], [0, 1, 1, 0]),
    ("ue4m3fn", [-1.0, 0.0, 448.0, 449.0], [0, 1, 1, 0]),
    ("e8m0", [-1.0, 0.0, 1.3, 1e38], [0, 0, 1, 1]),
])
def test_the_gradient_passes_within_the_range_and_not_where_the_number_saturates(name, x, passes):
    x = torch.tensor(x, requires_grad=True)
    upstream = torch.arange(1.0, len(x) + 1)
    fake_quantize(x, format_named(name), straight_through=True).backward(upstream)
    assert torch.equal(x.grad, upstream * torch.tensor(passes))
    x.grad = None
    fake_quantize(x, format_named(name), straight_through=True, clip_gradient=False).backward(upstream)
    assert torch.equal(x.grad, upstream)


def test_straight_through_gives_the_same_bits_as_without():
    x = torch.cat([randn(1000) * 300, torch.tensor([-0.0, 1e-40, torch.inf, -torch.inf])])
    plain = fake_quantize(x, FORMATS["e4m3fn"])
    through = fake_quantize(x.clone().requires_grad_(), FORMATS["e4m3fn"], straight_through=True)
    assert torch.equal(plain.view(torch.int32), through.detach().view(torch.int32))


@pytest.mark.parametrize(
    ("name", "backend"),
    [("e4m3fn", "inductor"), pytest.param("e2m1", "inductor", marks=pytest.mark.slow),
     *((name, "aot_eager") for name in ("e2m1", "e5m2fnuz", "e3m4", "int8", "e8m0"))],
)
def test_compiled_whole_it_gives_the_same_bits_and_gradients(name, backend):
    fmt = FORMATS[name]
    numbers = torch.cat(
        [randn(997) * fmt.max / 2, randn(997) * fmt.min_subnormal * 3, torch.tensor([-0.0, torch.inf, torch.nan])]
    )

    def both(x):
        return fake_quantize(x, fmt, straight_through=True), fake_quantize(x, fmt, Rounding.UP)

    results = []
    for function in (both, torch.compile(both, fullgraph=True, backend=backend)):
        x = numbers.clone().requires_grad_()
        nearest, up = function(x)
        nearest.nan_to_num(0).sum().backward()
        results.append((nearest.detach().view(torch.int32), up.view(torch.int32), x.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_one_compiled_function_takes_one_format_after_another():
    compiled = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
    x = randn(100) * 3
    for name in ("e4m3fn", "e4m3fnuz", "e2m1", "e2m3", "e4m3fn"):
        assert torch.equal(compiled(x, FORMATS[name]), fake_quantize(x, FORMATS[name]))


def test_compiled_stochastic_rounding_ends_on_the_two_neighbours_about_as_often_as_it_should():
    fmt, x = FORMATS["e4m3fn"], torch.full((1 << 16,), 1.03125)  # a quarter of the way from 1 to 1.125
    rounded = torch.compile(
        lambda x: fake_quantize(x, fmt, Rounding.STOCHASTIC, random_bits=8), fullgraph=True, backend="aot_eager"
    )(x)
    assert set(rounded.tolist()) == {1.0, 1.125}
    assert (rounded > 1).double().mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in SCHEMES if scheme_named(name).quantized])
def test_a_weight_is_what_its_codes_and_scales_stand_for_and_its_gradient_passes(name, dtype):
    scheme = scheme_named(name)
    weight = randn(8, 300).to(dtype).requires_grad_()
    values = fake_quantize_weight(weight, scheme, straight_through=True)
    assert torch.equal(values, scheme.dequantize(*scheme.quantize(weight.detach())).to(dtype))
    values.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not fake_quantize_weight(weight, scheme).requires_grad


@pytest.mark.parametrize(
    ("name", "backend"),
    [("e2m1-g32", "inductor"), ("mxfp4", "aot_eager"), ("nvfp4", "aot_eager"), ("int8-row", "aot_eager")],
)
def test_a_weight_compiled_whole_is_the_same_where_the_last_block_is_short(name, backend):
    scheme, weight = scheme_named(name), randn(8, 100)
    compiled = torch.compile(lambda weight: fake_quantize_weight(weight, scheme), fullgraph=True, backend=backend)
    assert torch.equal(compiled(weight), fake_quantize_weight(weight, scheme))


def test_a_weight_that_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        fake_quantize_weight(torch.full((2, 2), torch.inf), scheme_named("mxfp4"))
    with pytest.raises(ValueError, match="nothing to quantize"):
        fake_quantize_weight(torch.ones(2, 2), scheme_named("bf16"))
    with pytest.raises(ValueError, match="e4m3fn has no infinity"):
        fake_quantize(torch.ones(2), FORMATS["e4m3fn"], overflow=Overflow.INFINITY)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_layer_of_the_docs_trains(backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    example, = re.findall(r"## Fake quantization\n\n```python\n(.*?)```", (DOCS / "codec.md").read_text(), re.S)
    names = {"torch": torch, "format_named": format_named}
    exec(example, names)
    torch.manual_seed(0)
    target, layer, x = randn(64, 256), names["layer"], randn(64, 256, seed=1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_a_name_in_place_of_a_format_or_a_scheme_is_refused_with_the_way_to_get_one():
    with pytest.raises(TypeError, match=r"takes a Format, not 'e4m3fn': fpxbench.numbers.formats.format_named"):
        fake_quantize(torch.ones(4), "e4m3fn")
    with pytest.raises(TypeError, match=r"takes a Scheme, not 'mxfp4': fpxbench\.numbers\.scheme\.scheme_named"):
        fake_quantize_weight(torch.ones(4, 32), "mxfp4")

"""Peers quantize, are read back and multiply as their libraries do; one that is not installed is missing."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fpxbench.implementation import discover
from fpxbench.numbers.scheme import scheme_named

PEERS = discover()[0]
from fpxbench.impls.peers import _libraries  # noqa: E402  (discover makes the package of implementations)


def installed(name):
    pytest.importorskip(name)
    return PEERS[name]()


@pytest.mark.parametrize(("peer", "scheme"), [
    ("torchao", "e4m3fn-row"), ("torchao", "e5m2-row"), ("torchao", "nvfp4"),
    ("bitsandbytes", "nf4-g64"), ("bitsandbytes", "bnbfp4-g64"),
])
def test_a_weight_that_a_library_quantized_is_read_back_by_the_oracle_and_is_its_own(peer, scheme):
    torch.manual_seed(0)
    peer, scheme = installed(peer), scheme_named(scheme)
    assert peer.supports(scheme, "cpu").supported and peer.library().split()[0] == peer.name
    original = torch.randn(96, 128)
    weight = peer.quantize(original, scheme)
    codes, scales = scheme.quantize(original)
    assert weight.has_codes and torch.equal(weight.scales, scales.stored)
    assert torch.equal(weight.dequantize(), scheme.dequantize(codes, scales))
    for dtype in (torch.bfloat16, torch.float16):
        for shape in ((1, 128), (2, 3, 128)):
            x = torch.randn(shape).to(dtype)
            y, expected = peer.matmul(x, weight), x.double() @ weight.dequantize().double().T
            assert y.dtype == dtype and (y.double() - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["e4m3fn-row", "e5m2-row", "nvfp4"])
def test_torchaos_product_compiles_as_one_graph_and_stays_the_same(scheme):
    peer = installed("torchao")
    from fpxbench.impls.peers.torchao import tensor_of

    weight = peer.quantize(torch.randn(96, 128), scheme_named(scheme))
    for m in (1, 5):
        x = torch.randn(m, 128, dtype=torch.bfloat16)
        with torch.no_grad():
            seen = peer.compiled(x, tensor_of(weight, x.dtype))
        expected = peer.matmul(x, weight).double()
        assert type(seen) is torch.Tensor and (seen.double() - expected).norm() < 4e-3 * expected.norm()


def test_shapes_that_a_library_does_not_store_are_refused_by_name():
    with pytest.raises(NotImplementedError, match="not 75"):
        installed("torchao").quantize(torch.randn(8, 75), scheme_named("nvfp4"))
    with pytest.raises(NotImplementedError, match="K = 96"):
        installed("bitsandbytes").quantize(torch.randn(8, 96), scheme_named("nf4-g64"))


def test_a_library_that_is_not_installed_is_missing_with_the_command(monkeypatch):
    monkeypatch.setattr(_libraries.importlib.util, "find_spec", lambda name: None)
    for name in ("torchao", "bitsandbytes", "humming", "gemlite"):
        answer = PEERS[name]().supports(scheme_named("e4m3fn-row"), "cuda")
        assert answer.missing and "pip install 'fpxbench[peers]'" in answer.reason, name


def test_libraries_for_gpus_are_missing_on_a_cpu_and_refuse_other_schemes_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_libraries.importlib.util, "find_spec", lambda name: object())
    for name in ("humming", "gemlite"):
        assert PEERS[name]().supports(scheme_named("e4m3fn-row"), "cpu").missing
        assert PEERS[name]().supports(scheme_named("e4m3fn-row"), "cuda").supported
        assert "e2m1-g32" in PEERS[name]().supports(scheme_named("e2m1-g32"), "cuda").reason


class StandIn(torch.nn.Module):
    """A layer of humming's that keeps what it is given: weight, weight_scale, weight_scale_2."""

    def __init__(self, **config):
        super().__init__()
        self.humming_config, self.locks = config, torch.zeros(1)

    def cuda(self):
        return self

    def load_from_tensors(self, tensors):
        for name, tensor in tensors.items():
            setattr(self, name, torch.nn.Parameter(tensor, requires_grad=False))

    def transform(self):
        self.weight.data.neg_()     # an order of its own


@pytest.mark.parametrize("name", ["e4m3fn-row", "mxfp4", "nvfp4"])
def test_humming_is_given_the_oracles_codes_and_what_it_was_given_is_read_back(name, monkeypatch):
    seen = {}

    def humming_forward(config, inputs, weight, weight_scale, weight_scale_2, locks):
        seen.update(config=config, weight=weight, scale=weight_scale, scale_2=weight_scale_2)
        return inputs @ inputs.new_ones(inputs.shape[1], 64)

    modules = {"humming": {}, "humming.layer": {"HummingLayer": StandIn}, "humming.forward": {
        "humming_forward": humming_forward}, "humming.ops": {"pack_weight": lambda codes, bits: codes.clone()}}
    for module, contents in modules.items():
        made = ModuleType(module)
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, module, made)
    peer, scheme = PEERS["humming"](), scheme_named(name)
    original = torch.randn(64, 128)
    weight = peer.quantize(original, scheme)
    assert not weight.has_codes
    oracle = scheme.dequantize(*scheme.quantize(original))
    assert (peer.dequantize(weight) - oracle).abs().max() <= 2**-8 * oracle.abs().max()      # bfloat16 scales of rows
    assert peer._given._given[weight.packed][0].base is None, "host memory that PyTorch does not know of"
    copy = weight.clone()
    y = peer.matmul(torch.ones(2, 3, 128, dtype=torch.bfloat16), copy)
    assert y.shape == (2, 3, 64) and seen["weight"] is copy.packed and seen["scale"] is copy.scales
    assert seen["config"]["weight_config"]["dtype"] == {"e4m3fn-row": "float8e4m3"}.get(name, "float4e2m1")
    with pytest.raises(NotImplementedError, match="bfloat16"):
        peer.matmul(torch.ones(1, 128, dtype=torch.float16), weight)
    with pytest.raises(NotImplementedError, match=r"\[60, 128\]"):
        peer.quantize(torch.randn(60, 128), scheme)


@pytest.mark.parametrize("name", ["e4m3fn-row", "mxfp4", "nvfp4"])
def test_gemlite_is_given_the_oracles_codes_and_scales(name, monkeypatch):
    seen = {}

    class Helper:
        def __init__(self, device, dtype):
            assert dtype == torch.bfloat16

        def from_weights(self, codes, scales=None, meta_scale=None):
            seen.update(codes=codes, scales=scales, meta_scale=meta_scale)
            arguments = [codes.t(), scales, torch.zeros(0), torch.ones(()) if meta_scale is None else meta_scale]
            return SimpleNamespace(get_tensor_args=lambda: arguments, get_meta_args=lambda: [1, 2])

    made = ModuleType("gemlite")
    made.helper = SimpleNamespace(A16W8_FP8=Helper, A16W4_MXFP=Helper, A16W4_NVFP=Helper)
    made.forward_functional = lambda x, bias, tensors, meta: (seen.update(tensors=tensors, meta=meta), x)[1]
    monkeypatch.setitem(sys.modules, "gemlite", made)
    peer, scheme = PEERS["gemlite"](), scheme_named(name)
    original = torch.randn(64, 128)
    weight = peer.quantize(original, scheme)
    codes, scales = scheme.quantize(original)
    assert torch.equal(seen["codes"].view(torch.uint8), codes)
    assert torch.equal(seen["scales"].view(scales.stored.dtype), scales.stored)
    assert torch.equal(peer.dequantize(weight), scheme.dequantize(codes, scales))
    copy = weight.clone()
    peer.matmul(torch.ones(2, 128, dtype=torch.bfloat16), copy)
    assert seen["tensors"][0] is copy.packed and seen["meta"] == [1, 2]

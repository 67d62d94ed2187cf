"""Implementations that quantize activations compute what the scheme says; the others refuse such schemes."""

from types import ModuleType

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fpxbench.checkpoint.conventions import tiled_order
from fpxbench.implementation import Implementation, Support, discover
from fpxbench.impls import _scaled_operands
from fpxbench.numbers.formats import FORMATS
from fpxbench.numbers.scheme import USED_BY, scheme_named
from fpxbench.numbers.tensor_codec import decode
from fpxbench.records.case import Case
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial

pytestmark = pytest.mark.usefixtures("one_thread")
KNOWN, _ = discover()
WITH_ACTIVATIONS = [name for name in USED_BY if "+" in name]


def verdict(implementation, scheme, m=3, n=77, k=203):
    case = Case(implementation=implementation.name, scheme=scheme, workload="small", m=m, n=n, k=k)
    return diagnosed_trial(implementation, TrialRequest(case=case, seed=1, timing_budget_s=0))


@pytest.mark.parametrize("scheme", WITH_ACTIVATIONS)
def test_every_scheme_with_activations_is_emulated_rightly(scheme):
    found = verdict(KNOWN["eager_upcast"](), scheme)
    assert found.status is Status.OK, found.summary


@pytest.mark.parametrize(("name", "scheme"), [
    ("scaled_mm", "e4m3fn-row+e4m3fn-row"), ("scaled_mm", "e4m3fn-tensor+e4m3fn-tensor.static"),
    ("scaled_mm", "e4m3fn-row+e4m3fn-tensor"), ("scaled_mm", "e4m3fn-tensor+e4m3fn-row"),
    ("scaled_mm", "e4m3fnuz-row+e4m3fnuz-row"), ("scaled_mm", "e4m3fn-row+e5m2-row"),
    ("int_mm", "int8-row+int8-row"), ("int_mm", "int8-tensor+int8-row"),
])
def test_products_of_two_quantized_operands_are_right(name, scheme):
    assert KNOWN[name]().support(scheme_named(scheme), "cpu").supported
    found = verdict(KNOWN[name](), scheme)
    assert found.status is Status.OK, found.summary


def test_an_activation_rounded_by_another_rule_than_the_schemes_is_wrong():
    class AnotherGranularity(Implementation):
        name, quantizes_activations = "another_granularity", True

        def supports(self, scheme, device):
            return Support.yes()

        def matmul(self, x, weight):
            rounded = scheme_named("e4m3fn-row+e4m3fn-tensor").rounded_activation(x)
            return (rounded @ weight.dequantize().T).to(x.dtype)

    assert verdict(AnotherGranularity(), "e4m3fn-row+e4m3fn-tensor").status is Status.OK
    assert verdict(AnotherGranularity(), "e4m3fn-row+int8-row").status is Status.WRONG


def test_weight_only_implementations_refuse_quantized_activations_in_one_sentence():
    scheme = scheme_named("e4m3fn-row+e4m3fn-row")
    taking = {name for name, cls in KNOWN.items() if cls.quantizes_activations}
    assert taking == {"eager_upcast", "scaled_mm", "scaled_mm_fp4", "int_mm"}
    for name in KNOWN.keys() - taking:
        support = KNOWN[name]().support(scheme, "cpu")
        assert not support.supported
        assert support.reason == "supports 16-bit activations only: e4m3fn-row, not e4m3fn-row+e4m3fn-row"


@pytest.mark.parametrize(("rows", "blocks"), [(128, 4), (100, 3), (300, 9)])
def test_tiled_scales_lie_where_cublas_reads_them(rows, blocks):
    scales = torch.randint(1, 255, (rows, blocks), dtype=torch.uint8)
    tiles = _scaled_operands.tiled(scales)
    assert tiles.numel() == -(-rows // 128) * 128 * -(-blocks // 4) * 4
    assert torch.equal(tiles[tiled_order(rows, blocks)], scales)
    assert int((tiles > 0).sum()) == scales.numel()


class ChainedModule(ModuleType):
    """A module with some of its names replaced."""

    def __init__(self, module, **replaced):
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self.__getattr__ = lambda name: getattr(module, name)


class ScaledMMStandIn:
    """`torch._scaled_mm` of GPUs that are not here: checks what the kernels require, and computes by definition."""

    def __init__(self):
        self.calls = []

    def __call__(self, a, b, *, scale_a, scale_b, out_dtype):
        (m, k), n = a.shape, b.shape[1]
        assert a.stride(1) == 1 and b.stride(0) == 1, "a is row-major, b column-major"
        assert a.shape[1] == b.shape[0] and k * a.element_size() % 16 == 0 and n % 16 == 0
        assert out_dtype in (torch.bfloat16, torch.float16)
        self.calls.append(scale_a.dtype)
        if scale_a.dtype is torch.float32:
            assert scale_a.shape == (m, k // 128) and scale_a.stride() == (1, m)
            assert scale_b.shape == (k // 128, n // 128) and scale_b.stride(0) == 1
            assert m % 4 == 0 and k % 512 == 0, "what else cuBLAS asks is not checked by PyTorch: read on an H200"
            wide_a, wide_b = scale_a.repeat_interleave(128, 1), scale_b.t().repeat_interleave(128, 0)
            wide_b = wide_b.repeat_interleave(128, 1)
        else:
            packed = a.dtype is torch.float4_e2m1fn_x2
            k, block = (2 * k, 16) if packed else (k, 32)
            wide_a, wide_b = (self._untiled(scale, rows, k // block).repeat_interleave(block, 1)
                              for scale, rows in ((scale_a, m), (scale_b, n)))
        return ((self._numbers(a) * wide_a) @ (self._numbers(b.t()) * wide_b).T).to(out_dtype)

    @staticmethod
    def _untiled(scale, rows, blocks):
        assert scale.numel() == -(-rows // 128) * 128 * -(-blocks // 4) * 4 and scale.is_contiguous()
        fmt = FORMATS["e8m0" if scale.dtype is torch.float8_e8m0fnu else "e4m3fn"]
        return decode(scale.view(torch.uint8)[tiled_order(rows, blocks)], fmt)

    @staticmethod
    def _numbers(codes):
        if codes.dtype is not torch.float4_e2m1fn_x2:
            return codes.float()
        nibbles = codes.view(torch.uint8)
        return decode(torch.stack([nibbles & 15, nibbles >> 4], dim=2).flatten(1), FORMATS["e2m1"])


@pytest.mark.parametrize(("name", "scheme", "capability"), [
    ("scaled_mm", "e4m3fn-b128x128+e4m3fn-g128", (9, 0)),
    ("scaled_mm", "e4m3fn-b128x128.e8m0+e4m3fn-g128.e8m0", (9, 0)),
    ("scaled_mm", "mxfp8_e4m3fn+mxfp8_e4m3fn", (10, 0)),
    ("scaled_mm", "mxfp8_e4m3fn.rceil+mxfp8_e5m2.rceil", (10, 0)),
    ("scaled_mm_fp4", "nvfp4+nvfp4", (10, 0)),
    ("scaled_mm_fp4", "nvfp4.div+nvfp4.4over6", (12, 0)),
])
def test_what_gpus_multiply_in_blocks_is_given_to_them_as_they_require(monkeypatch, name, scheme, capability):
    cls = KNOWN[name]
    assert not cls().support(scheme_named(scheme), "cpu").supported
    module = cls.matmul.__globals__
    monkeypatch.setitem(module, "compute_capability", lambda device: capability)
    monkeypatch.setitem(module, "float8_formats", lambda device: (_scaled_operands.OCP, "the stand-in's"))
    stand_in = ScaledMMStandIn()
    # In the implementation's view alone: a trial notices a torch that was changed.
    monkeypatch.setitem(module, "torch", ChainedModule(torch, _scaled_mm=stand_in))
    assert cls().support(scheme_named(scheme), "cpu").supported
    found = verdict(cls(), scheme, m=5, n=200, k=328)
    assert found.status is Status.OK, found.summary
    assert stand_in.calls


def test_scaled_mm_refuses_to_round_fp16_through_bf16() -> None:
    weight = Implementation().quantize(torch.randn(16, 32), scheme_named("e4m3fn-row"))
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(NotImplementedError, match="bfloat16"):
        discover()[0]["scaled_mm"]().matmul(torch.empty(4, 32, dtype=torch.float16, device="cuda"), weight)

"""fp32 scales that lose bits before weights are multiplied by them: each output stays within its tolerance, and many
together show it."""

from __future__ import annotations

import pytest
import torch
from fault_injection import Faulty, over_rows
from inspecting import inspected

from fpxbench.diagnosis.recovery.bench import Bench
from fpxbench.diagnosis.recovery.scale_precision import ScaleRounding, recover_precision
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial
from fpxbench.workloads import workload_named

pytestmark = pytest.mark.usefixtures("one_thread")


def precision(implementation, scheme: str, activation: str = "bf16", seed: int = 1):
    case = Case(implementation="injected", scheme=scheme, workload="injected", m=16, n=96, k=256, activation=activation)
    return recover_precision(Bench(implementation, case, "cpu", seed))


@pytest.mark.parametrize(("scheme", "how", "kind", "words"), [
    ("nvfp4", {"tensor_dtype": torch.bfloat16}, Kind.GLOBAL_SCALE_MISREAD, "tensor scale is rounded to bf16 (8 bits)"),
    ("nvfp4.div", {"tensor_dtype": torch.bfloat16}, Kind.GLOBAL_SCALE_MISREAD, "the tensor scale is rounded to bf16"),
    ("e4m3fn-row", {"scale_dtype": torch.bfloat16}, Kind.SCALE_NARROWED, "the scale is rounded to bf16 (8 bits)"),
    ("e4m3fn-tensor", {"scale_dtype": torch.bfloat16}, Kind.SCALE_NARROWED, "the scale is rounded to bf16 (8 bits)"),
    ("e2m3-g128", {"scale_dtype": torch.bfloat16}, Kind.SCALE_NARROWED, "the scale is rounded to bf16 (8 bits)"),
])
def test_scales_of_16_bits_are_named_with_the_gain_that_they_make(scheme, how, kind, words) -> None:
    found = precision(Faulty(how), scheme)
    assert found.right is False and found.kinds == [kind]
    assert words in found.message and ("gain 1.00" in found.message or "gain 0.99" in found.message)
    for difference in found.differences:        # the sentence is true of what was stored
        stored, effective = float(difference.definition), float(difference.effective)
        assert effective == pytest.approx(stored, rel=2.0**-8) and effective != stored


@pytest.mark.parametrize("activation", ["bf16", "fp16"])
@pytest.mark.parametrize("scheme", ["nvfp4", "nvfp4.div", "e4m3fn-row", "e4m3fn-tensor", "e2m1-g32"])
def test_what_an_implementation_is_free_to_round_is_no_fault(scheme, activation) -> None:
    def cut(y):
        return (y.view(torch.int32) & -65536).view(torch.float32)

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[activation]
    for multiply in (
        lambda x, w: (x.double() @ w.T).to(x.dtype),
        lambda x, w: (x.float() @ w.to(dtype).float().T).to(x.dtype),
        lambda x, w: (x.float() @ cut(w.float()).T).to(x.dtype),
        lambda x, w: cut(x.float() @ w.float().T).to(x.dtype),
        lambda x, w: (x.float() @ w.float().T).to(x.dtype).float().bfloat16().to(x.dtype),
    ):
        found = precision(Faulty(multiply=over_rows(multiply)), scheme, activation)
        assert found.right is True, found.message


def test_where_fewer_bits_cannot_be_told_nothing_is_said_to_be_right() -> None:
    def noise(y):
        return 1 + 0.3 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1))

    noisy = Faulty(multiply=over_rows(lambda x, w: (lambda y: (y * noise(y)).to(x.dtype))(x.float() @ w.float().T)))
    assert precision(noisy, "e4m3fn-tensor").right is None


@pytest.mark.parametrize("scheme", ["mxfp4", "int4-g128.bf16"])
def test_scales_of_fewer_bits_are_not_asked(scheme) -> None:
    assert precision(Faulty(), scheme) is None


def test_a_rounding_to_bits_is_that_of_the_dtype() -> None:
    values = torch.randn(1000, dtype=torch.float64)
    values = values.abs().clamp(min=2.0**-14).copysign(values)      # smaller numbers of fp16 have fewer bits
    for bits, dtype in ((8, torch.bfloat16), (11, torch.float16)):
        assert torch.equal(ScaleRounding(bits, "").apply(values.float().double()), values.float().to(dtype).double())
    assert bool((ScaleRounding(8, "", to_nearest=False).apply(values).abs() <= values.abs()).all())


def test_a_sweep_and_an_inspection_say_it() -> None:
    def faulty():
        return Faulty({"tensor_dtype": torch.bfloat16})

    layer = workload_named("canary.scales")
    case = Case(implementation="injected", scheme="nvfp4", workload=layer.name, m=layer.m[0], n=layer.n, k=layer.k)
    of_sweep = diagnosed_trial(faulty(), TrialRequest(case=case, seed=1, timing_budget_s=0, check_budget_s=1.0))
    of_inspection = inspected(faulty(), "nvfp4", n=96, k=256).verdict
    for verdict in (of_sweep, of_inspection):
        assert verdict.status is Status.WRONG and verdict.kind is Kind.GLOBAL_SCALE_MISREAD, verdict.summary
        assert "the tensor scale is rounded to bf16 (8 bits)" in verdict.summary

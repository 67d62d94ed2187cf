"""Products of experts are checked by the oracle as those of single weights are, under every routing."""

from __future__ import annotations

import pytest
import torch

from fpxbench.checking import grouped_product
from fpxbench.implementation import Implementation, Support, discover
from fpxbench.records.case import Case, Routing
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Flag, Record, now
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest, TrialResult
from fpxbench.sweep.trial import _run, prepare, run_trial
from fpxbench.workloads import CANARIES, Workload

pytestmark = pytest.mark.usefixtures("one_thread", "few_repeats")

EXPERTS = [workload for workload in CANARIES if workload.experts is not None]
LARGER = Workload("larger", 128, 256, (8,), experts=4, experts_per_token=2, routing=Routing.SKEWED)


def tried(implementation: str, scheme: str, workload: Workload, **fields) -> TrialResult:
    fields = {"timing_budget_s": 0, "check_budget_s": 5.0, "cache_bytes": 1 << 12} | fields
    return run_trial(TrialRequest(case=workload.case(implementation, scheme, workload.m[0]), seed=5, **fields))


def test_the_canaries_have_every_routing():
    assert [workload.routing for workload in EXPERTS] == list(Routing)


@pytest.mark.parametrize("workload", EXPERTS, ids=lambda workload: workload.name)
@pytest.mark.parametrize(("implementation", "scheme"), [
    ("grouped_mm", "e4m3fn-row"), ("grouped_mm", "mxfp4"), ("grouped_mm", "nf4-g64"), ("eager_upcast", "nvfp4"),
    ("eager_upcast", "e4m3fn-b128x128+e4m3fn-g128"), ("int_mm", "int8-row+int8-row"), ("dense", "bf16"),
    ("native_float8", "e5m2-row"),
])
def test_right_implementations_are_right_under_every_routing(implementation, scheme, workload):
    result = tried(implementation, scheme, workload)
    assert result.verdict.status is Status.OK, result.verdict.summary
    asked = result.coverage.covered["routings"]
    assert all(f"{routing} with 1, 33, 4, 0" in asked for routing in Routing)
    if scheme != "bf16":
        assert result.coverage.covered["single weights"] == f"16 columns of each of {workload.experts} experts"


def test_the_fused_kernels_loop_is_right_where_an_expert_is_empty():
    empty = next(workload for workload in EXPERTS if workload.routing is Routing.EMPTY)
    result = tried("triton_fused", "mxfp4", empty)
    assert result.verdict.status is Status.OK, result.verdict.summary


def test_a_time_stands_beside_the_grouped_product_in_16_bits(monkeypatch):
    products = []
    original = grouped_product.grouped_product
    monkeypatch.setattr(grouped_product, "grouped_product", lambda x, weight, offsets: products.append(
        (x.shape, weight.shape, weight.dtype, offsets.tolist())) or original(x, weight, offsets))
    result = tried("eager_upcast", "mxfp4", LARGER, timing_budget_s=0.02, read_gb_per_s=10.0)
    assert result.timing is not None and result.timing.baseline_us and result.timing.speedup
    case = LARGER.case("eager_upcast", "mxfp4", 8)
    assert products and all(x == (16, 256) and weight == (4, 128, 256) and dtype is torch.bfloat16 and ends[-1] == 16
                            for x, weight, dtype, ends in products)
    stored = 4 * 128 * 256 * 4.25 / 8
    assert result.traffic.packed_bytes == stored
    rows = case.rows * (128 + 256) * 2
    assert result.traffic.bytes_min in {int(stored * busy / 4) + rows for busy in (2, 3, 4)}
    record = {"case": case, "build": {"torch": "2.13.0", "channel": "release", "variant": "cpu"}, "started_at": now(),
              "machine": {"name": "here", "device": "x", "arch": "y"}, **result.model_dump(exclude={"work_s"})}
    line = Record.model_validate(record).to_json()
    assert '"experts":4,"experts_per_token":2,"routing":"skewed"' in line
    assert Record.model_validate_json(line).case == case


def test_the_same_seed_gives_the_same_experts_and_routings_and_two_experts_differ():
    request = TrialRequest(case=LARGER.case("eager_upcast", "mxfp4", 8), seed=5)
    first, again = (prepare(discover()[0]["eager_upcast"](), request) for _ in range(2))
    assert torch.equal(first.weight.packed, again.weight.packed)
    assert not torch.equal(first.weight.packed[0], first.weight.packed[1])
    x, same = first.activation(0), again.activation(0)
    assert torch.equal(x, same) and first.ends == again.ends == first.offsets.tolist()
    assert not torch.equal(first.activation(1), x)
    assert torch.equal(first.dense()[0].float(), first.original.bfloat16().float())


class SharedBuffer(Implementation):
    """Stores every expert in the same memory."""

    name = "shared_buffer"
    kept = None

    def supports(self, scheme, device):
        return Support.yes()

    def quantize(self, weight, scheme):
        stored = super().quantize(weight, scheme)
        if self.kept is None:
            self.kept = stored
        for name, tensor in self.kept.tensors().items():
            tensor.copy_(stored.tensors()[name])
        return self.kept

    def matmul(self, x, weight):
        return (x.float() @ weight.dequantize().T).to(x.dtype)


def test_experts_that_are_stored_in_the_same_memory_are_found():
    result = TrialResult(verdict={"status": "ok"})
    request = TrialRequest(case=LARGER.case("shared_buffer", "mxfp4", 8), seed=5, timing_budget_s=0)
    _run(SharedBuffer(), request, result)
    assert (result.verdict.status, result.verdict.kind) == (Status.WRONG, Kind.GIBBERISH), result.verdict.summary


def test_an_implementation_of_experts_takes_no_single_weight():
    result = tried("grouped_mm", "mxfp4", CANARIES[0])
    assert result.verdict.status is Status.UNSUPPORTED and "experts only" in result.verdict.summary


def test_what_the_checks_keep_of_an_expert_is_not_held_by_the_implementation():
    case = Case(implementation="eager_upcast", scheme="mxfp4", workload="timed", m=1, n=512, k=512, experts=8,
                experts_per_token=4, routing="uniform")
    result = run_trial(TrialRequest(case=case, seed=1, timing_budget_s=0.05, check_budget_s=0.0, read_gb_per_s=20.0))
    assert result.verdict.status is Status.OK and result.timing is not None
    assert result.traffic.kept_bytes == 0 and Flag.KEEPS_DECODED_COPY not in result.flags

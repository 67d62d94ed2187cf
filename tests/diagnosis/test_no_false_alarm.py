"""Nothing that multiplies correctly is found fault with: any layout, hidden codes, any order of additions."""

from __future__ import annotations

import pytest
import torch
from fault_injection import Faulty, numbers, over_rows
from inspecting import Decoding, experiment, inspected

from fpxbench.numbers.formats import FP32
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial

pytestmark = pytest.mark.usefixtures("one_thread")

@pytest.mark.parametrize(
    ("scheme", "layout", "activation"),
    [("e4m3fn-row", "bytes", "bf16"), ("e4m3fnuz-tensor", "planar", "fp16"), ("e5m2-g32", "planar", "fp16"),
     ("e3m4-row", "planar", "bf16"), ("mxfp8_e5m2", "planar", "bf16"), ("mxfp6_e2m3", "bitstream", "bf16"),
     ("mxfp4", "nibbles_high_first", "bf16"), ("nvfp4", "planar", "fp16"), ("int8-row", "planar", "bf16"),
     ("e2m2-row", "planar", "fp16"), ("mxfp6_e3m2", "torchao_fp6", "bf16")],
)
@pytest.mark.parametrize("opaque", [False, True])
def test_what_is_right_is_said_to_be_in_every_layout_and_where_codes_cannot_be_seen(
    scheme, layout, activation, opaque
) -> None:
    right = Faulty(opaque=True) if opaque else Decoding(layout=layout)
    found = inspected(right, scheme, activation=activation)
    assert found.verdict.status is Status.OK, found.verdict.summary
    assert found.verdict.summary.startswith("reads all 4,160 weights as the definition says")
    assert all(one.right for one in found.experiments), [one.message for one in found.experiments]
    scaling = scheme_named(scheme).scaling
    asked = not opaque and (scaling.has_tensor_scale or scaling.scale_format.format == FP32)
    assert [one.name for one in found.experiments] == ["table", "scales", "blocks", "order", *["precision"] * asked]
    size = 1 << scheme_named(scheme).format.bits
    if not opaque:
        assert experiment(found, "table").tried == size      # NaN and infinity included


ORDERS = {
    "in one": lambda x, w: (x.float() @ w.T).to(x.dtype),
    "in fp64": lambda x, w: (x.double() @ w.double().T).to(x.dtype),
    "decoded to 16 bits first": lambda x, w: x @ w.T.to(x.dtype),
    "split along K": lambda x, w: sum(
        (x[:, part].float() @ w[:, part].T for part in (slice(0, 17), slice(17, 40), slice(40, None))), torch.zeros(())
    ).to(x.dtype),
    "from the end": lambda x, w: (x.flip(1).float() @ w.flip(1).T).to(x.dtype),
    "one by one": lambda x, w: (x.float()[:, None, :] * w[None]).cumsum(dim=2)[:, :, -1].to(x.dtype),
    "in pairs": lambda x, w: ((x.float()[:, 0::2] @ w[:, 0::2].T) + (x.float()[:, 1::2] @ w[:, 1::2].T)).to(x.dtype),
}


SCHEMES = ("e4m3fn-row", "e4m3fnuz-row", "e5m2-g32", "e3m4-tensor", "e3m2-g32", "mxfp8_e4m3fn", "mxfp6_e2m3", "mxfp4",
           "nvfp4", "int8-row", "e2m2-row", "e2m3-g128")


def _false_alarms(count: int) -> list[str]:
    """Return the false alarms among correct implementations that add up in other orders, on random cases."""
    rng = torch.Generator().manual_seed(2)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=rng))]

    found, tried = [], set()
    for number in range(count):
        scheme, order = pick(*SCHEMES), pick(*ORDERS, "scaled after")
        tried |= {scheme, order}
        case = Case(implementation="injected", scheme=scheme, workload="random", m=pick(1, 2, 7, 16, 33),
                    n=pick(1, 5, 32, 77), k=pick(32, 50, 96, 203), activation=pick("bf16", "fp16"))

        class Right(Decoding):
            """Adds up in one of the orders; scales the sum where there is one scale a row."""

            def matmul(self, x, weight, order=order):
                if order != "scaled after" or weight.scheme.scaling.block is not None:
                    return over_rows(ORDERS.get(order, ORDERS["in one"]))(x, weight.dequantize())
                values = torch.from_numpy(numbers(weight.scheme.format))[weight.codes().int()].float()
                y = x.float() @ values.T
                return ((y.to(x.dtype) if x.dtype == torch.bfloat16 else y) * weight.scale_grid().T).to(x.dtype)

        verdict = diagnosed_trial(Right(), TrialRequest(case=case, seed=number, timing_budget_s=0))
        if verdict.status is not Status.OK:
            found.append(f"{case.id} n={case.n} k={case.k}, {order}: {verdict.headline}: {verdict.summary}")
    assert tried == {*SCHEMES, *ORDERS, "scaled after"}
    return found


def test_none_of_50_correct_cases_is_found_fault_with() -> None:
    assert _false_alarms(50) == []


@pytest.mark.slow      # 1 minute
def test_none_of_1000_correct_cases_is_found_fault_with() -> None:
    assert _false_alarms(1000) == []


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_of_additions_is_not_a_fault_to_an_inspection(order) -> None:
    found = inspected(Decoding(multiply=lambda x, w: ORDERS[order](x, w.float())), "mxfp4")
    assert found.verdict.status is Status.OK, found.verdict.summary

"""A kernel that is launched early and does not wait for the one that writes its activation is found by name.

On a GPU: ``tests/sweep/test_faulty_impls.py -k early`` and ``-k waits``. Here the device is a stand-in.
"""

from __future__ import annotations

import sys

import pytest
import torch
from places import FAULTY_IMPLS
from small_implementations import Right
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fpxbench.checking import device_wait, early_launch
from fpxbench.checking.examination import Examination
from fpxbench.checking.late_write import late_write_kernel
from fpxbench.implementation import discover
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


class Device:
    """A stream whose last kernel has not written yet, and lets the next one begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.late: list[tuple[Tensor, Tensor]] = []
        self.held = 0
        monkeypatch.setattr(early_launch, "_unavailable", lambda device: None)
        monkeypatch.setattr(early_launch, "_write_late", lambda values, x: self.late.append((values, x)))
        monkeypatch.setattr(device_wait, "hold_stream", self._hold)

    def _hold(self, seconds: float) -> None:
        self.held += 1

    def wait(self) -> None:
        """Let it end, as a kernel's wait, or a launch without overlap, does."""
        for values, x in self.late:
            x.copy_(values)
        self.late.clear()


def asked(implementation: Right, m: int = 3) -> Examination:
    case = Case(implementation="right", scheme="e4m3fn-row", workload="canary.x", m=m, n=32, k=96)
    request = TrialRequest(case=case, seed=1, timing_budget_s=0)
    return Examination(implementation, prepare(implementation, request))


def test_a_product_that_waits_is_right_and_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    class Waits(Right):
        def matmul(self, x, weight):
            device.wait()
            return super().matmul(x, weight)

    examination = asked(Waits())
    assert early_launch.check_early_launch(examination) is None
    assert examination.covered[early_launch.NAME].startswith("3 calls") and device.held == early_launch.CALLS


def test_a_product_of_what_its_activation_held_before_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    class ReadsEarly(Right):
        def matmul(self, x, weight):
            y = super().matmul(x, weight)
            device.wait()
            return y

    examination = asked(ReadsEarly())
    verdict = early_launch.check_early_launch(examination)
    assert (verdict.status, verdict.kind) == (Status.WRONG, Kind.READS_EARLY)
    assert "does not wait for it" in verdict.summary and early_launch.NAME not in examination.covered


def test_one_element_read_early_in_the_last_call_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    class OneElement(Right):
        calls = 0

        def matmul(self, x, weight):
            self.calls += bool(device.late)
            early = x[-1, -1].clone()
            device.wait()
            if self.calls >= early_launch.CALLS and early.isnan():
                x = x.clone()
                x[-1, -1] = early
            return super().matmul(x, weight)

    verdict = early_launch.check_early_launch(asked(OneElement()))
    assert verdict.kind is Kind.READS_EARLY
    assert (verdict.evidence["wrong_behind"], verdict.evidence["wrong_alone"]) == (early_launch.MORE_CALLS, 0)


def test_a_product_that_is_wrong_by_itself_is_not_said_to_read_early(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)

    class Thrice(Right):
        def matmul(self, x, weight):
            device.wait()
            return 3 * super().matmul(x, weight)

    verdict = early_launch.check_early_launch(asked(Thrice()))
    assert verdict.status is Status.WRONG and verdict.kind is None


@pytest.mark.parametrize("wrong_calls", [{2}, {2, 5, 8}, {2, 4, 6, 8, 10, 12, 14, 16, 18, 5}])
def test_a_product_that_waits_and_is_wrong_now_and_then_is_not_said_to_read_early(
        monkeypatch: pytest.MonkeyPatch, wrong_calls: set[int]) -> None:
    device = Device(monkeypatch)

    class NowAndThen(Right):
        calls = 0

        def matmul(self, x, weight):
            device.wait()
            self.calls += 1
            return super().matmul(x, weight) * (3 if self.calls in wrong_calls else 1)

    verdict = early_launch.check_early_launch(asked(NowAndThen()))
    assert (verdict.status, verdict.kind) == (Status.WRONG, Kind.NOT_REPEATABLE), verdict.summary


def test_where_no_kernel_is_launched_early_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    examination = asked(Right())
    assert early_launch.check_early_launch(examination) is None
    assert "CPU" in examination.not_asked[early_launch.NAME] and not examination.covered
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert "sm_90" in early_launch._unavailable("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert early_launch._unavailable("cuda") is None


def ptx_of(kernel: object, signature: dict[str, str], arch: int, **constants: int) -> str:
    """Return the kernel's instructions for an architecture."""
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    ptx = compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    return ptx[ptx.index(".entry"):]


@pytest.mark.parametrize("arch", [90, 100, 120])
def test_the_late_kernel_lets_the_next_one_begin_first_then_waits_then_writes(arch: int) -> None:
    body = ptx_of(late_write_kernel, {"source": "*u8", "target": "*u8", "nbytes": "i32", "delay_ns": "i32"}, arch,
                  BLOCK=4096)
    lets_begin, clock, write = (body.index(each) for each in (
        "griddepcontrol.launch_dependents", "%globaltimer", "st.global"))
    assert lets_begin < clock < write
    assert body[clock:write].count("%globaltimer") == 2 and "griddepcontrol.wait" not in body


def test_a_build_on_which_the_late_kernel_does_not_compile_is_not_the_implementations_fault(
        monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(values: Tensor, x: Tensor) -> None:
        raise RuntimeError("PassManager::run failed")

    Device(monkeypatch)
    monkeypatch.setattr(early_launch, "_write_late", fails)
    examination = asked(Right())
    assert early_launch.check_early_launch(examination) is None
    assert "PassManager::run failed" in examination.not_asked[early_launch.NAME] and not examination.covered


@pytest.mark.parametrize("waits", [False, True])
def test_of_the_planted_kernels_one_waits(waits: bool) -> None:
    known, failures = discover([FAULTY_IMPLS])
    assert not failures
    planted = sys.modules[known["faulty_waits" if waits else "faulty_reads_early"].__module__]
    signature = {"x": "*bf16", "w": "*fp32", "y": "*bf16", "N": "i32", "K": "i32"}
    body = ptx_of(planted.product_kernel, signature, 90, WAITS=waits, BLOCK_N=16, BLOCK_K=64)
    assert (body.find("griddepcontrol.wait") < body.index("ld.global")) and ("griddepcontrol.wait" in body) is waits

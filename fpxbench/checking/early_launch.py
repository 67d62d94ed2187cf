"""Check that a product waits for the kernel that writes its activation, if its own kernels are launched to overlap.

From sm_90 on, a kernel may be launched before the one before it on its stream has ended (programmatic dependent launch:
Triton's ``launch_pdl``, CUDA's ``cudaLaunchAttributeProgrammaticStreamSerialization``), and has to wait on the device
before it reads what that one writes. PyTorch's eager kernels let the next one begin only when they end, which hides a
missing wait; a model's compiled kernels do not.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from fpxbench.checking import contract, device_wait, poison
from fpxbench.checking.examination import Examination, in_a_line, is_refusal
from fpxbench.checking.reference import Comparison, Reference, compare
from fpxbench.checking.wrong_output import Again, comparison_evidence, judge
from fpxbench.numbers.weight import QuantizedWeight
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict

NAME = "early launch"
LEAST_CAPABILITY = (9, 0)
CALLS, MORE_CALLS = 3, 8


def check_early_launch(examination: Examination) -> Verdict | None:
    """Check that calls wait for a kernel that triggers their launch before it writes their activation, which holds NaN
    until then."""
    implementation, operands = examination.implementation, examination.operands
    reason = _unavailable(operands.device) or ("no tokens" if operands.case.m == 0 else None)
    if reason is not None:
        examination.not_asked[NAME] = reason
        return None
    x = operands.activation(NAME)
    late, expected = _BehindALateWrite(examination, x), operands.reference(x, implementation)
    try:
        _write_late(x, x.clone())       # compiles
    except Exception as error:      # not the implementation's: a build without Triton, or one that breaks this kernel
        if not is_refusal(error):
            raise
        examination.not_asked[NAME] = f"the kernel that writes late failed: {in_a_line(error)}"
        return None
    for number in range(CALLS):
        pattern = poison.PATTERNS[number % len(poison.PATTERNS)]
        comparison = compare(contract.call(late, x, operands.weight, operands.device, pattern).seen, expected)
        if comparison.within:
            continue
        again = partial(contract.watched_matmul, implementation, x, operands.weight, operands.device, None)
        alone = again(pattern)
        compared = compare(alone.seen, expected)
        if not compared.within:
            return judge(again, alone, compared, expected, pattern=pattern)
        return _told_apart(late, again, expected, comparison, pattern)
    examination.covered[NAME] = (f"{CALLS} calls behind a kernel that lets the next one begin before it writes the"
                                 " activation")
    return None


def _told_apart(late: _BehindALateWrite, again: Again, expected: Reference, wrong: Comparison, pattern: int) -> Verdict:
    """Return the verdict on a product that was wrong behind the late kernel and right after it: whether that is the
    rule, or was chance."""
    x, operands = late.x, late.examination.operands
    outputs = [(contract.call(late, x, operands.weight, operands.device, pattern), again(pattern))
               for _ in range(MORE_CALLS)]
    behind, alone = (sum(not compare(output.seen, expected).within for output in each)
                     for each in zip(*outputs, strict=True))
    evidence = comparison_evidence(wrong) | {"calls": MORE_CALLS, "wrong_behind": behind, "wrong_alone": alone}
    if alone or 2 * behind < MORE_CALLS:
        return Verdict(
            status=Status.WRONG, kind=Kind.NOT_REPEATABLE, evidence=evidence,
            summary=f"wrong in {behind} of {MORE_CALLS} calls behind a running kernel and in {alone} of as many by"
                    f" themselves, with the same operands: {wrong.message()}")
    return Verdict(
        status=Status.WRONG, kind=Kind.READS_EARLY, evidence=evidence,
        summary="is launched before the kernel that writes its activation has ended, and does not wait for it: correct"
                f" behind a finished kernel, wrong in {behind} of {MORE_CALLS} calls behind a running one:"
                f" {wrong.message()}")


class _BehindALateWrite:
    """A `matmul` whose activation is written by a kernel that runs while the call's own kernels are launched."""

    def __init__(self, examination: Examination, x: Tensor) -> None:
        self.examination, self.x, self.values, self.queueing_s = examination, x, x.clone(), 0.0

    def __call__(self, x: Tensor, weight: QuantizedWeight) -> Tensor:
        device_wait.hold_stream(2 * self.queueing_s)
        began = perf_counter()
        x.fill_(float("nan"))
        _write_late(self.values, x)
        y = self.examination.implementation.matmul(x, weight)
        self.queueing_s = perf_counter() - began
        return y


def _write_late(values: Tensor, x: Tensor) -> None:
    from fpxbench.checking.late_write import write_late  # Triton, which a CPU may lack

    write_late(values, x)


def _unavailable(device: str) -> str | None:
    """Return why a device launches no kernel early; None if it can."""
    if device == "cpu":
        return "a CPU launches no kernels"
    if torch.version.hip or torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return "the device launches no kernel before the one before has ended (NVIDIA's do from sm_90 on)"
    return None

"""The records that come with the repository are real ones, and readable."""

from pathlib import Path

from fpxbench.store import Store
from fpxbench.verdict import Status

SAMPLES = Store(Path(__file__).parent.parent / "reports" / "samples")


def test_every_line_is_a_record():
    records, broken = SAMPLES.read_all()
    assert not broken
    assert {record.machine.arch for record in records} >= {"sm_90"}


def test_no_time_without_a_right_answer_and_no_bandwidth_above_the_machines():
    timed = [record for record in SAMPLES.read_all()[0] if record.timing]
    assert len(timed) > 100
    assert {record.verdict.status for record in timed} == {Status.OK}
    assert max(record.traffic.roofline_fraction for record in timed) < 1.1


def test_the_fused_kernel_is_one_kernel_on_a_gpu():
    fused = [r for r in SAMPLES.read_all()[0] if r.timing and r.machine.kind == "cuda" and r.case.implementation == "triton_fused"]
    assert fused and {record.traffic.kernels_launched for record in fused} == {1}

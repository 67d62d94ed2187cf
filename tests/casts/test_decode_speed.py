"""Claims about timing a decode by itself: only what is right has a speed, and a refusal is a reason."""

import json
import os
import subprocess
import sys

import pytest
import torch
from commands import command
from pydantic import ValidationError
from sample_records import BUILD, CPU, GPU, GPU_BUILD

from fpxbench.casts import decode_timing
from fpxbench.casts.decode_speed import ENGINES, DecodeSpeed, EngineSpeed
from fpxbench.records.verdict import Status, Verdict
from fpxbench.reports.casts.decode_speed_table import decode_table
from fpxbench.reports.targets.support_table import chosen_matrix


def ok(rate=1.0):
    return EngineSpeed(verdict=Verdict(status=Status.OK), gb_per_s=rate)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(decode_timing.ROWS, "cpu", 64)


@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2fnuz", "e2m1"])
def test_each_way_decodes_right_and_has_a_speed_or_says_why_it_has_none(small, fmt):
    measured = decode_timing.measure(fmt, "bf16", "cpu", ["eager", "triton", "own"], 0.01)
    assert measured.copy_gb_per_s > 0 and measured.engines["own"].gb_per_s > 0
    assert "GPUs" in measured.engines["triton"].verdict.summary
    eager = measured.engines["eager"]
    assert (eager.gb_per_s is None) == (fmt == "e2m1") == ("no cast" in eager.verdict.summary)


def test_a_way_that_decodes_a_code_wrong_has_no_speed(small, monkeypatch):
    def off_by_one(fmt, codes, dtype):
        right, read = decode_timing._own(fmt, codes, dtype)
        return lambda: torch.where(codes == 3, 0.0, right()), read

    monkeypatch.setitem(decode_timing._MAKERS, "own", off_by_one)
    own = decode_timing.measure("e4m3fn", "fp32", "cpu", ["own"], 0.01).engines["own"]
    assert own.verdict.status is Status.WRONG and own.gb_per_s is None and "0x03" in own.verdict.summary


def test_a_speed_of_what_is_not_right_cannot_be_written_down():
    with pytest.raises(ValidationError, match="if and only if it is right"):
        EngineSpeed(verdict=Verdict(status=Status.UNSUPPORTED, summary="refused"), gb_per_s=1.0)


def test_the_command_writes_records_that_a_report_reads(tmp_path):
    done = command("decode -f e2m1 --device cpu --budget 0.01 --machine here --json --results", tmp_path)
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "here" / "decodes").glob("*.jsonl")
    stored = [DecodeSpeed.model_validate_json(line) for line in file.read_text().splitlines()]
    assert [json.loads(line)["target"] for line in done.stdout.splitlines()] == [one.target for one in stored]
    assert all(one.verdict.status is Status.OK and set(one.engines) == set(ENGINES) for one in stored)


def test_instructions_are_those_of_the_machines_architecture_and_triton(tmp_path):
    matrix = chosen_matrix(tmp_path)[0]
    probe = next(probe for probe in matrix.probes if probe.id == "decode/e4m3fn/bf16")
    run = next(run for run in probe.cells[GPU.arch] if run.metrics)
    build = GPU_BUILD.model_copy(update={"triton": matrix.builds[run.builds[1]].triton})
    speeds = dict(format="e4m3fn", target="bf16", weights=1, engines={"own": ok()})
    (row,) = decode_table([DecodeSpeed(build=build, machine=GPU, device="cuda", **speeds)], matrix).rows
    assert row.instructions == run.metrics.instructions_a_weight is not None
    (row,) = decode_table([DecodeSpeed(build=BUILD, machine=CPU, device="cpu", **speeds)], matrix).rows
    assert row.instructions is None


INTERPRETED = """
import torch
from fpxbench.casts.decode_speed import FORMATS as NAMES
from fpxbench.casts.triton_decode import decode
from fpxbench.numbers.tensor_codec import decode_table
from fpxbench.numbers.formats import FORMATS
for fmt in map(FORMATS.get, NAMES):
    numbers = decode(torch.arange(1 << fmt.bits, dtype=torch.uint8), fmt, torch.float32)
    assert torch.equal(numbers.nan_to_num(9e9), decode_table(fmt).nan_to_num(9e9)), fmt.name
"""


def test_the_kernel_of_shifts_decodes_every_code_of_every_format():
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=os.environ | {"TRITON_INTERPRET": "1"})

"""The script on a case's page does what the record says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from sample_records import case, record

from fpxbench.records.case import Routing
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Record
from fpxbench.records.verdict import Status, Verdict
from fpxbench.sweep.repro_script import repro_script

FAULTY = '''
import os
import torch
from fpxbench.implementation import Implementation, Support, implementation


class Upcast(Implementation):
    def supports(self, scheme, device):
        return Support.yes() if scheme.quantized else Support.no("takes quantized weights only")

    def matmul(self, x, weight):
        return (x.float() @ weight.dequantize().T).to(x.dtype)


@implementation("right")
class Right(Upcast):
    pass


@implementation("halves")
class Halves(Upcast):
    def matmul(self, x, weight):
        return super().matmul(x, weight) / 2


@implementation("drops_smallest")
class DropsSmallest(Upcast):
    """Reads the smallest code as 0: a product of random operands does not show it."""

    def matmul(self, x, weight):
        decoded = weight.dequantize()
        decoded[weight.codes() % 128 == 1] = 0
        return (x.float() @ decoded.T).to(x.dtype)


@implementation("wrong_for_17")
class WrongFor17(Upcast):
    """Is wrong for one number of tokens, which is not the case's."""

    def matmul(self, x, weight):
        return super().matmul(x, weight) * (2 if x.shape[0] == 17 else 1)


@implementation("only_contiguous")
class OnlyContiguous(Upcast):
    """Reads a batch's first matrix alone."""

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        if x.dim() == 3:
            y[1:] = y[:1]
        return y


@implementation("aborts")
class Aborts(Upcast):
    def matmul(self, x, weight):
        os.abort()
'''

SMALL = {"workload": "canary.codes", "m": 1, "n": 64, "k": 256}


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    file = tmp_path / "faulty.py"
    file.write_text(FAULTY)
    return file


def run(of: Record, faulty: Path) -> subprocess.CompletedProcess[str]:
    script = faulty.with_name("repro.py")
    script.write_text(repro_script(of))
    return subprocess.run(
        [sys.executable, str(script), str(faulty)], capture_output=True, text=True, check=False
    )


def test_the_script_of_a_right_case_finds_it_right(faulty: Path) -> None:
    done = run(record(case("right", **SMALL)), faulty)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "right"


def test_the_script_of_a_timed_case_times_it_against_dense(faulty: Path) -> None:
    done = run(record(case("right", workload="llama3-8b.k", n=128, k=256), speedup=2.0), faulty)
    assert done.returncode == 0, done.stderr
    assert "speedup" in done.stdout


def test_the_script_of_a_wrong_case_shows_its_error(faulty: Path) -> None:
    done = run(
        record(case("halves", **SMALL), Verdict(status=Status.WRONG, kind=Kind.FN_AS_FNUZ, summary="half")), faulty
    )
    assert done.returncode == 1, done.stderr
    assert "relative error 0.5" in done.stdout
    assert done.stdout.splitlines()[-1] == "wrong"


def test_the_script_finds_a_single_code_read_wrongly(faulty: Path) -> None:
    done = run(
        record(case("drops_smallest", **SMALL), Verdict(status=Status.WRONG, summary="reads a code as 0")), faulty
    )
    assert done.returncode == 1, done.stderr
    assert "wrong (subnormal_wrong): " in done.stdout and "0x01 0.0000.001 as 0 instead of" in done.stdout


def test_the_script_of_a_crashing_case_crashes(faulty: Path) -> None:
    done = run(record(case("aborts", **SMALL), Verdict(status=Status.CRASH, signal="SIGABRT", exit_code=-6)), faulty)
    assert done.returncode == -6


def test_a_refused_case_says_why(faulty: Path) -> None:
    done = run(record(case("right", "bf16", **SMALL), Verdict(status=Status.UNSUPPORTED, summary="no")), faulty)
    assert done.returncode == 1
    assert "takes quantized weights only" in done.stderr


def test_text_of_a_record_cannot_leave_its_comment() -> None:
    breakouts = "harmless\nimport os\rimport os\x0cimport os\u2028import os\u202e\x00 '''"
    planted = record(case(), Verdict(status=Status.WRONG, summary=breakouts))
    planted = planted.model_copy(update={
        "machine": planted.machine.model_copy(update={"device": breakouts, "arch": breakouts, "kind": breakouts}),
        "build": planted.build.model_copy(update={"triton": breakouts}), "started_at": breakouts,
    })
    plain = {ast.dump(node) for node in ast.parse(repro_script(record(case()))).body if isinstance(node, ast.Import)}
    tree = ast.parse(repro_script(planted))
    assert {ast.dump(node) for node in tree.body if isinstance(node, ast.Import)} == plain
    assert "\u202e" not in repro_script(planted)


def test_the_script_of_experts_multiplies_them_all(tmp_path: Path) -> None:
    of_experts = case("grouped_mm", "mxfp4", workload="canary.experts.empty", m=9, n=40, k=160).model_copy(
        update={"experts": 6, "experts_per_token": 2, "routing": Routing.EMPTY})
    script = repro_script(record(of_experts))
    ast.parse(script)
    path = tmp_path / "repro.py"
    path.write_text(script)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("right"), done.stdout + done.stderr


@pytest.mark.parametrize(("implementation", "kind"), [
    ("wrong_for_17", Kind.M_DEPENDENT), ("only_contiguous", Kind.ACTIVATION_LAYOUT)])
def test_the_script_makes_the_calls_that_the_sweep_made(implementation: str, kind: Kind, faulty: Path) -> None:
    done = run(record(case(implementation, **SMALL | {"m": 3}), Verdict(status=Status.WRONG, kind=kind)), faulty)
    assert done.returncode == 1 and f"wrong ({kind})" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("scheme", ["e4m3fn-row+e4m3fn-row", "mxfp4+mxfp8_e4m3fn"])
def test_the_script_knows_that_activations_are_rounded(scheme: str, faulty: Path) -> None:
    done = run(record(case("eager_upcast", scheme, **SMALL | {"m": 3})), faulty)
    assert done.returncode == 0 and done.stdout.count(" 0 of 192 elements outside") == 3, done.stdout + done.stderr


@pytest.mark.parametrize(("of", "said"), [
    (record(case("right", **SMALL), activations="0123abcd"), "--activations FILE -i right -s e4m3fn-row -w"),
    (record(case("right", **SMALL | {"workload": "own.x.abcdef"})), "--weights FILE -i right -s e4m3fn-row -w"),
    (record(case("right", **SMALL | {"workload": "checkpoint.x.abcdef"}), activations="0123abcd"),
     "--checkpoint PATH --layer '*' --activations FILE -i right -w"),
])
def test_the_script_of_a_files_operands_says_how_to_measure_them_again(of: Record, said: str, faulty: Path) -> None:
    done = run(of, faulty)
    assert done.returncode == 1 and said in done.stderr

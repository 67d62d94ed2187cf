"""Conversions are planned, run in isolation and become records."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import fpxbench
from places import CHECKOUT
from pydantic_core import to_json
from sample_casts import EXAMPLE, conversion, record
from sample_records import BUILD, CPU

from fpxbench.casts import cast_run as runs, cast_trial as trial
from fpxbench.casts.cast_plan import batches, conversions
from fpxbench.casts.cast_record import CastRecord, CastResult, DifferingInputs, InputKind
from fpxbench.casts.conversion import Engine
from fpxbench.records.kinds import Kind
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import Status, Verdict
from fpxbench.sweep.isolation import Outcome

# The plan.


def test_every_conversion_is_planned_once_and_has_an_id_of_its_own():
    planned = conversions(["cpu", "cuda"])
    assert len({one.id for one in planned}) == len(planned) > 500
    assert {one.engine for one in planned if one.device == "cuda"} == {Engine.EAGER, Engine.COMPILED, Engine.TRITON}
    assert sorted(one.id for batch in batches(planned) for one in batch) == sorted(one.id for one in planned)
    assert all(len({(one.engine, one.device, one.source) for one in batch}) == 1 for batch in batches(planned))


def test_globs_narrow_and_one_that_matches_nothing_says_what_there_is():
    assert [one.id for one in conversions(["cpu"], ["eager"], ["cast/fp32/e5m2"])] == ["cast/fp32/e5m2/eager/cpu"]
    with pytest.raises(ValueError, match=r"conversion nothing/\*: ids are like cast/fp64/e4m3fn/eager/cpu"):
        conversions(["cpu"], (), ["nothing/*"])


# Records.


def test_a_verdict_that_its_differences_contradict_is_refused_by_the_schema():
    wrong = [DifferingInputs(kind=InputKind.TIE, count=1, permitted=False, examples=[EXAMPLE])]
    with pytest.raises(ValueError, match="not permitted"):
        record(differences=wrong)
    with pytest.raises(ValueError, match="must have differences"):
        record(status=Status.WRONG, differences=[])
    with pytest.raises(ValueError, match="no dtype 'fp7'"):
        conversion("cast/fp7/e4m3fn")


def test_conversions_lie_beside_the_cases_and_are_read_back_as_written(tmp_path):
    store = Store(tmp_path, CastRecord)
    first, second = record(), record(status=Status.WRONG)
    for one in (first, second, record(conversion("finfo/e5m2/e5m2"))):
        store.append(one)
    path = store.file(CPU.name, BUILD)
    assert path.relative_to(tmp_path).as_posix() == "cpu-epyc-2c/numerics/2.13.0-cpu.jsonl" and store.files() == [path]
    with open(path, "a") as file:
        file.write('{"schema":99}\n')
    read, broken = store.read(path)
    assert read[1] == second and [one.verdict.status for one in latest(read)] == ["wrong", "ok"]
    assert "newer fpxbench" in broken[0].reason and Store(tmp_path).files() == []


# In the child.


def test_eager_casts_of_this_pytorch_are_what_they_are_known_to_be():
    chosen = conversions(["cpu"], ["eager"], ["cast/bf16/e4m3fn", "cast/e5m2/fp16", "cast/fp64/e5m2", "and/uint32"])
    results = {result.conversion.what: result for result in trial.run_conversions(chosen)}
    assert results["cast/bf16/e4m3fn"].verdict.status is Status.OK and results["cast/bf16/e4m3fn"].inputs == 65536
    assert results["cast/e5m2/fp16"].differing == 0
    assert results["cast/fp64/e5m2"].verdict.kind is Kind.DOUBLE_ROUNDING
    assert results["and/uint32/uint32"].verdict.status is Status.OK and results["and/uint32/uint32"].differing == 0


def test_a_wrong_bit_operation_is_counted(monkeypatch):
    monkeypatch.setattr(trial, "convert", lambda of, operands: (operands[0] & operands[1]) | np.uint16(1))
    (result,) = trial.run_conversions([conversion("and/uint16/uint16")])
    assert result.verdict.status is Status.WRONG and result.differing == result.differences[0].count > 0
    assert result.differences[0].examples[0].got != result.differences[0].examples[0].expected


def test_a_conversion_that_does_not_compile_fails_alone(monkeypatch):
    real = trial.torch_function

    def refusing(of):
        return (lambda x: x.no_such_method()) if of.target == "e5m2" else real(of)

    monkeypatch.setattr(trial, "torch_function", refusing)
    trial._function.cache_clear()
    chosen = [conversion(f"cast/e8m0/{target}", "compiled") for target in ("fp32", "e5m2", "bf16")]
    results = trial.run_conversions(chosen)
    trial._function.cache_clear()
    assert [result.verdict.status for result in results] == ["ok", "error", "ok"]
    assert [result.inputs for result in results] == [256, 256, 256]


def test_triton_is_interpreted_in_a_child_of_its_own(tmp_path):
    pytest.importorskip("triton")
    done = fpxbench("numerics -c cast/e4m3fn/fp32 -c cast/e5m2/e4m3fn -e eager -e triton_interpreter --json --results",
                    tmp_path)
    by_id = {one["conversion"]["engine"]: one for one in json.loads(done.stdout)}
    assert (
        by_id["triton_interpreter"]["verdict"]["status"] in ("ok", "wrong")
        and by_id["triton_interpreter"]["inputs"] == 256
    )
    assert by_id["eager"]["verdict"]["status"] == "ok"


# The run.


def returned(results, log=""):
    return Outcome(to_json(results).decode(), None, log)


class Isolated:
    """An isolation in which some conversions crash, and one that is not crashed by others."""

    def __init__(self, *crashing):
        self.crashing, self.calls, self.recycled = crashing, [], 0

    def call(self, function, asked, timeout_s):
        self.calls.append([one.target for one in asked])
        if any(one.target in self.crashing for one in asked):
            return Outcome(None, Verdict(status=Status.CRASH, summary="died by SIGSEGV", signal="SIGSEGV"), "")
        results = [CastResult(conversion=one, verdict=Verdict(status=Status.OK), differing=0) for one in asked]
        return returned(results)

    def recycle(self):
        self.recycled += 1


def test_a_crash_in_a_batch_is_pinned_on_the_one_that_crashes():
    batch = [conversion(f"cast/fp32/{target}") for target in ("e4m3fn", "e5m2", "e8m0")]
    isolated = Isolated("e5m2")
    results = runs._run_batch(isolated, batch, 1.0)
    assert [result.verdict.status for result in results] == ["ok", "crash", "ok"]
    assert isolated.calls == [["e4m3fn", "e5m2", "e8m0"], ["e4m3fn"], ["e5m2"], ["e8m0"]]
    assert results[1].verdict.signal == "SIGSEGV" and results[1].differing is None


def test_after_a_fault_on_a_gpu_each_is_tried_again_in_a_new_child():
    fault = Verdict(
        status=Status.ERROR, summary="raised AcceleratorError: CUDA error: an illegal memory access was encountered"
    )

    class Faulty(Isolated):
        def call(self, function, asked, timeout_s):
            outcome = super().call(function, asked, timeout_s)
            results = outcome.read(list[CastResult])
            if len(results) > 1:
                results = [one.model_copy(update={"verdict": fault, "differing": None}) for one in results]
            return returned(results)

    isolated = Faulty()
    results = runs._run_batch(
        isolated, [conversion(f"cast/fp32/{target}", device="cuda") for target in ("e4m3fn", "e5m2")], 1.0
    )
    assert [result.verdict.status for result in results] == ["ok", "ok"] and isolated.recycled == 1


def test_an_error_keeps_what_native_code_printed_of_that_conversion_alone():
    """A pass manager prints the reason, and raises that it failed."""
    failed = Verdict(status=Status.ERROR, kind=Kind.PASS_FAILED, summary="raised RuntimeError: PassManager::run failed")

    class Failing(Isolated):
        def call(self, function, asked, timeout_s):
            results = super().call(function, asked, timeout_s).read(list[CastResult])
            results = [
                one.model_copy(update={"verdict": failed, "differing": None})
                if one.conversion.target == "e5m2"
                else one
                for one in results
            ]
            log = (
                "LLVM ERROR: no fptrunc from f64 to f8"
                if [one.conversion.target for one in results] == ["e5m2"]
                else "of all of them"
            )
            return returned(results, log)

    right, wrong = runs._run_batch(Failing(), [conversion(f"cast/fp64/{target}") for target in ("e4m3fn", "e5m2")], 1.0)
    assert (right.verdict.status, right.verdict.log_tail) == (Status.OK, "")
    assert wrong.verdict.log_tail == "LLVM ERROR: no fptrunc from f64 to f8"
    assert wrong.verdict.summary == "raised, after saying: LLVM ERROR: no fptrunc from f64 to f8"


def test_a_reason_in_the_cause_of_tritons_error_is_reported():
    error = RuntimeError("at 4:26:\n    x = tl.load(p)\n    y = x.to(tl.float8e4b15)\n                          ^")
    error.__cause__ = AssertionError("float64 has no way to float8e4b15")
    assert (
        trial.refusal(conversion("cast/fp64/e4m3b15", "triton"), error).verdict.summary
        == "raised RuntimeError: AssertionError: float64 has no way to float8e4b15"
    )


def test_the_command_finds_what_is_wrong_resumes_and_fails_on_demand(tmp_path):
    done = fpxbench("numerics -c finfo -c shift_left/uint16 -e eager --fail-on wrong --results", tmp_path)
    assert done.returncode == 1, done.stderr
    assert "torch.finfo(torch.float8_e5m2fnuz).eps is 0.125, not 0.25" in done.stdout
    assert "refused" in done.stdout or torch.__version__ >= "2.14"
    again = fpxbench("numerics -c finfo -e eager --results", tmp_path)
    assert again.returncode == 0 and "9 conversions were checked before" in again.stderr


def test_errors_in_the_command_are_one_line(tmp_path):
    for arguments, said in (
        (("-c", "nothing"), "no conversion matches conversion nothing"),
        (("--fail-on", "bad"), "a status is one of"),
    ):
        done = fpxbench("numerics", *arguments, "--results", tmp_path)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow   # two minutes on two cores
def test_every_fp32_input_is_cast_to_e4m3fn_as_the_oracle_says(tmp_path):
    done = fpxbench("numerics --exhaustive -c cast/fp32/e4m3fn -e eager --json --results", tmp_path, timeout=1800)
    (one,) = json.loads(done.stdout)
    assert one["inputs"] == 1 << 32 and one["inputs_digest"] == "every fp32"
    assert [d["kind"] for d in one["differences"] if not d["permitted"]] == []


def test_asv_looks_results_up_without_importing_torch():
    code = (
        "import sys; from fpxbench.benchmarks import numerics as n; assert 'torch' not in sys.modules;"
        "cache = {n.CONVERSIONS[0]: {'differing': 3, 'status': 8}};"
        "print(len(n.CONVERSIONS), n.track_differing(cache, n.CONVERSIONS[0]), n.track_status(cache, n.CONVERSIONS[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT,
                          env={"PATH": "/usr/bin:/bin", "FPX_PROFILE": "smoke", "FPX_DEVICE": "cpu"})
    assert done.stdout.split() == ["16", "3", "nan"], done.stderr

"""Conversions run in isolation and become records; the report shows their behaviour and what changed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import fpxbench
from places import CHECKOUT
from pydantic_core import to_json
from sample_records import BUILD, CPU

from fpxbench.casts import cast_run as runs, cast_trial as trial
from fpxbench.casts.cast_changes import CastSnapshot, changes
from fpxbench.casts.cast_findings import disagreements, find
from fpxbench.casts.cast_plan import batches, conversions
from fpxbench.casts.cast_record import Behaviour, CastRecord, CastResult, DifferingInputs, Example, InputKind
from fpxbench.casts.conversion import Conversion, Engine
from fpxbench.records.kinds import Kind
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import Status, Verdict
from fpxbench.reports.site import build_site
from fpxbench.sweep.isolation import Outcome

EXAMPLE = Example(
    input="0x43e90000", input_value="466", got="0x7f", got_value="nan", expected="0x7e", expected_value="448"
)


def conversion(what="cast/fp32/e4m3fn", engine="eager", device="cpu"):
    operation, source, target = what.split("/")
    return Conversion(operation=operation, source=source, target=target, engine=engine, device=device)


def record(of=None, status=Status.OK, *, build=BUILD, **more):
    wrong = (
        [DifferingInputs(kind=InputKind.TIE, count=7, permitted=False, examples=[EXAMPLE])]
        if status is Status.WRONG
        else []
    )
    told = (
        {"differing": 7 if wrong else 0, "inputs": 65536, "inputs_digest": "abc", "differences": wrong}
        if status in (Status.OK, Status.WRONG)
        else {}
    )
    return CastRecord(
        **{
            "conversion": of or conversion(),
            "build": build,
            "machine": CPU,
            "verdict": Verdict(status=status),
            **told,
            **more,
        }
    )


# ---- the plan -------------------------------------------------------------------------------------------------------

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


# ---- engines that disagree ------------------------------------------------------------------------------------------

def overflowing(overflow, engine="eager", what="cast/fp32/e4m3fn", infinity=None):
    return record(conversion(what, engine), behaviour=Behaviour(overflow=overflow, infinity=infinity or overflow))


def test_engines_that_overflow_differently_are_one_message_over_all_the_sources_that_show_it():
    records = [overflowing(how, engine, f"cast/{source}/e4m3fn")
               for source in ("fp32", "bf16") for how, engine in (("nan", "eager"), ("saturate", "compiled"))]
    (one,) = disagreements(
        [*records, overflowing("nan", what="cast/fp32/e5m2"), overflowing("nan", "compiled", "cast/fp32/e5m2")]
    )
    assert one.ways == {"nan": ("eager/cpu",), "saturate": ("compiled/cpu",)}
    assert (
        one.message
        == "cast fp32, bf16 → e4m3fn: past the maximum nan in eager/cpu; saturate in compiled/cpu (all round alike)"
    )


def test_infinity_alone_may_be_what_engines_disagree_on():
    (one,) = disagreements([overflowing("saturate"), overflowing("saturate", "compiled", infinity="nan")])
    assert set(one.ways) == {"saturate", "saturate, but infinity: nan"}


def scaled(engine, rules, **more):
    kept = DifferingInputs(kind=InputKind.UNROUNDED_PRODUCT, count=390, permitted=rules >= 3, examples=[EXAMPLE])
    told = {"taken_as": "exact product"} if engine == "compiled" else {}
    return record(
        conversion("scale_then_cast/bf16/e4m3fn", engine),
        **{
            "rules": rules,
            "behaviour": Behaviour(**told),
            "differences": [kept] if told else [],
            "differing": 390 if told else 0,
            **more,
        },
    )


def test_a_product_that_is_rounded_in_one_engine_only_is_a_disagreement_and_no_fault():
    records = [scaled("eager", 3), scaled("compiled", 3)]
    (one,) = disagreements(records)
    assert one.message.startswith(
        "scale, then cast bf16 → e4m3fn: the product is rounded to its dtype first in eager/cpu; not rounded before"
        " the cast in compiled/cpu"
    )
    assert "emulate_precision_casts" in one.message
    assert find(records) == []
    assert disagreements([scaled("eager", 3)]) == []


def test_a_record_of_rules_by_which_an_unrounded_product_was_wrong_is_read_by_the_current_rules():
    before = scaled("compiled", 3).model_dump(mode="json", by_alias=True) | {
        "rules": 2,
        "verdict": {"status": "wrong", "summary": "keeps the product"},
    }
    before["differences"][0]["permitted"] = False
    read = CastRecord.model_validate(before)
    assert read.verdict.status is Status.OK and read.differences[0].permitted and read.rules == 2
    assert (
        read.verdict.summary == "all 65,536 inputs; for 390 of them, of the product before it is rounded to its dtype"
    )
    before["differences"].append(
        DifferingInputs(kind=InputKind.TIE, count=7, permitted=False, examples=[EXAMPLE]).model_dump(mode="json")
    )
    assert CastRecord.model_validate(before).verdict.summary == "keeps the product"      # a tie is wrong by any rules
    with pytest.raises(ValueError, match="is not ok"):
        CastRecord.model_validate(before | {"rules": 3, "verdict": {"status": "ok"}})


@pytest.mark.parametrize("other", [
    overflowing("nan", "compiled"),                                 # the same
    overflowing("saturate", "triton_interpreter"),                  # nobody's results come from it
    overflowing("mixture of saturate and nan", "compiled"),         # wrong, which is another finding
    overflowing("saturate", "compiled", "cast_rtz/fp32/e4m3fn"),    # another operation
    overflowing("saturate", "compiled", "cast/fp32/e5m2"),          # another target
], ids=["the same", "interpreted", "mixture", "another operation", "another target"])
def test_what_is_no_disagreement(other):
    assert disagreements([overflowing("nan"), other]) == []


def test_a_disagreement_is_on_the_page_and_among_the_findings(tmp_path):
    store = Store(tmp_path / "results", CastRecord)
    for one in (overflowing("nan"), overflowing("saturate", "compiled")):
        store.append(one)
    site = build_site(tmp_path / "results", tmp_path / "site")
    (finding,) = [one for one in site.problems if one.severity == "disagrees"]
    assert "e4m3fn" in finding.message
    page, _, anchor = finding.link.partition("#")
    assert f'id="{anchor}"' in (tmp_path / "site" / page).read_text()
    assert "saturate in compiled/cpu" in (tmp_path / "site" / page).read_text()


# ---- records --------------------------------------------------------------------------------------------------------

def test_a_verdict_that_its_differences_contradict_is_refused_by_the_schema():
    wrong = [DifferingInputs(kind=InputKind.TIE, count=1, permitted=False, examples=[EXAMPLE])]
    with pytest.raises(ValueError, match="not permitted"):
        record(differences=wrong)
    with pytest.raises(ValueError, match="shows the differences"):
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


# ---- in the child ---------------------------------------------------------------------------------------------------

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


# ---- the run --------------------------------------------------------------------------------------------------------

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
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fpxbench",
            "numerics",
            "--exhaustive",
            "-c",
            "cast/fp32/e4m3fn",
            "-e",
            "eager",
            "--json",
            "--results",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    (one,) = json.loads(done.stdout)
    assert one["inputs"] == 1 << 32 and one["inputs_digest"] == "every fp32"
    assert [d["kind"] for d in one["differences"] if not d["permitted"]] == []


# ---- findings, changes, pages ---------------------------------------------------------------------------------------

def test_one_fault_in_many_conversions_is_one_finding_and_the_interpreter_comes_last():
    wrong = Verdict(status=Status.WRONG, kind=Kind.DOUBLE_ROUNDING, evidence={"mistake": "rounds twice"})
    records = [record(conversion("cast/fp32/e5m2", "triton_interpreter"), Status.WRONG)] + [
        record(conversion(f"cast/fp64/{target}", engine), Status.WRONG, verdict=wrong)
        for engine in ("eager", "compiled") for target in ("e5m2", "e4m3fn")]
    found = find([*records, record(conversion("cast/fp32/e4m3fn"))])
    assert [(one.what, one.runs_on) for one in found] == [
        ("cast fp64 → e4m3fn, e5m2", ["eager/cpu", "compiled/cpu"]), ("cast fp32 → e5m2", ["triton_interpreter/cpu"])]


EARLIER = BUILD.model_copy(update={"torch": "2.11.0+cpu", "date": "2026-03-01", "key": "b" * 40})


def before_and_after():
    cast = [conversion("cast/fp32/e4m3fn"), conversion("cast/bf16/e4m3fn")]
    old = [
        record(one, build=EARLIER, behaviour=Behaviour(overflow="nan", rounding="nearest_even"), differing=500)
        for one in cast
    ]
    new = [record(one, behaviour=Behaviour(overflow="saturate", rounding="nearest_even"), differing=0) for one in cast]
    return old, new


def test_a_changed_overflow_is_one_event_and_its_count_is_not_another():
    old, new = before_and_after()
    assert [one.message for one in changes(map(CastSnapshot.of, old), map(CastSnapshot.of, new))] == [
        "cast fp32, bf16 → e4m3fn in eager/cpu: overflow nan → saturate"]
    assert changes(map(CastSnapshot.of, new), map(CastSnapshot.of, new)) == []


def test_other_inputs_are_no_change():
    old, new = before_and_after()
    new = [one.model_copy(update={"inputs_digest": "other"}) for one in new]
    assert changes(map(CastSnapshot.of, old), map(CastSnapshot.of, new)) == []


def test_the_report_shows_conversions_their_examples_and_what_changed(tmp_path):
    old, new = before_and_after()
    store = Store(tmp_path / "results", CastRecord)
    markup = Verdict(status=Status.UNSUPPORTED, summary="refused: <script>alert(1)</script>", log_tail="<img src=x>")
    for one in (
        *old,
        *new,
        record(
            conversion("cast/fp32/e5m2"),
            Status.WRONG,
            verdict=Verdict(status=Status.WRONG, summary="ties", kind=Kind.TIES_AWAY),
        ),
        record(conversion("not/uint16/uint16"), Status.UNSUPPORTED, verdict=markup),
    ):
        store.append(one)
    summary = build_site(tmp_path / "results", tmp_path / "site")
    sentences = [problem.message for problem in summary.problems]
    assert (
        sentences[-1]
        == "PyTorch 2.11.0 → 2.13.0 on AMD EPYC 7B13: cast fp32, bf16 → e4m3fn in eager/cpu: overflow nan → saturate."
    )
    assert sentences[0].startswith("cast fp32 → e5m2 in eager/cpu on PyTorch 2.13.0: 7 of 65,536 inputs")
    folder = tmp_path / "site" / "machines" / CPU.name
    page = (folder / "2.13.0-cpu" / "numerics.html").read_text()
    assert "overflow nan → saturate" in page and 'href="numerics/cast-fp32-e5m2.html#eager-cpu"' in page
    detail = (folder / "2.13.0-cpu" / "numerics" / "cast-fp32-e5m2.html").read_text()
    assert "0x43e90000" in detail and "forbids it" in detail
    assert "since 2.11.0" in (folder / "index.html").read_text()
    of_build = (tmp_path / "site" / "builds" / "2.13.0.html").read_text()
    assert "Not swept; only its casts were checked" in of_build
    pages = list((tmp_path / "site").rglob("*.html"))
    assert not any("<script>alert" in page.read_text() or "<img src=x" in page.read_text() for page in pages)
    for page in pages:      # every link to a page leads to one
        for link in set(_links(page.read_text())):
            assert (page.parent / link).resolve().is_file(), (page, link)


def test_one_fault_on_two_machines_is_one_message_on_the_first_page(tmp_path):
    twice = Verdict(status=Status.WRONG, kind=Kind.DOUBLE_ROUNDING, evidence={"mistake": "rounds twice"})
    other = CPU.model_copy(update={"name": "another", "device": "Another CPU"})
    store = Store(tmp_path / "results", CastRecord)
    for machine in (CPU, other):
        store.append(record(conversion("cast/fp64/e5m2"), Status.WRONG, verdict=twice, machine=machine))
    store.append(record(conversion("scale_then_cast/bf16/e5m2"), Status.WRONG, verdict=twice, machine=other))
    (finding,) = build_site(tmp_path / "results", tmp_path / "site").problems
    assert finding.message.count("rounds twice") == 1
    said, _, likewise = finding.message.partition(" Likewise ")
    assert said.startswith("cast fp64 → e5m2 in eager/cpu on PyTorch 2.13.0")
    assert {CPU.device, other.device} & {part.partition(" on ")[2].rstrip(".") for part in likewise.split("; ")}


def test_a_fault_that_ordinary_programs_meet_stands_above_one_that_few_do(tmp_path):
    store = Store(tmp_path / "results", CastRecord)
    for id, mistake in (("cast/fp64/e5m2", "rounds twice"), ("scale_then_cast/bf16/e5m2", "keeps more precision")):
        verdict = Verdict(status=Status.WRONG, kind=Kind.DOUBLE_ROUNDING, evidence={"mistake": mistake})
        store.append(record(conversion(id), Status.WRONG, verdict=verdict))
    first, second = build_site(tmp_path / "results", tmp_path / "site").problems
    assert "keeps more precision" in first.message and "rounds twice" in second.message


def test_of_many_builds_the_newest_have_pages_and_those_that_changed_a_cast(tmp_path):
    store = Store(tmp_path / "results", CastRecord)
    for day in range(1, 10):
        build = BUILD.model_copy(
            update={
                "torch": f"2.15.0.dev202611{day:02}+cpu",
                "channel": "nightly",
                "date": f"2026-11-{day:02}",
                "key": str(day) * 40,
            }
        )
        store.append(record(build=build, behaviour=Behaviour(overflow="nan" if day < 4 else "saturate")))
    site = build_site(tmp_path / "results", tmp_path / "site", builds=2)
    pages = sorted((tmp_path / "site" / "machines" / CPU.name).glob("*/numerics.html"))
    assert [page.parent.name[10:18] for page in pages] == ["20261104", "20261108", "20261109"]
    assert "overflow nan → saturate" in pages[0].read_text() and not site.problems


def _links(html: str) -> list[str]:
    return [
        part.split('"')[0].split("#")[0]
        for part in html.split('href="')[1:]
        if part.split('"')[0].split("#")[0].endswith(".html")
    ]


def test_asv_looks_results_up_without_importing_torch():
    code = (
        "import sys; from fpxbench.benchmarks import numerics as n; assert 'torch' not in sys.modules;"
        "cache = {n.CONVERSIONS[0]: {'differing': 3, 'status': 8}};"
        "print(len(n.CONVERSIONS), n.track_differing(cache, n.CONVERSIONS[0]), n.track_status(cache, n.CONVERSIONS[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT,
                          env={"PATH": "/usr/bin:/bin", "FPX_PROFILE": "smoke", "FPX_DEVICE": "cpu"})
    assert done.stdout.split() == ["16", "3", "nan"], done.stderr

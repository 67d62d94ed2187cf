"""What a Triton compiles for every GPU is found out without a GPU, whatever the compiler does, and shown briefly."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fake_triton
import psutil
import pytest
from commands import command, fpxbench
from places import CHECKOUT
from ptx_samples import DECODE

from fpxbench.cli.common import UsageError
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.reports.targets.support_table import SHIPPED
from fpxbench.targets import engine, triton_builds as builds, version_spans as history
from fpxbench.targets.architectures import ARCHITECTURES, architectures_like
from fpxbench.targets.build_diff import changes
from fpxbench.targets.cell_outcomes import evaluate
from fpxbench.targets.collection import assemble, evaluate_build, evaluate_builds
from fpxbench.targets.engine import UnusableTriton
from fpxbench.targets.matrix import Matrix, read_matrix
from fpxbench.targets.operations import OPERATIONS, TILE_OPTIONS, TILES, ProbeSpec, probes_like
from fpxbench.targets.triton_builds import TritonUnavailable, find_triton, normal_name
from fpxbench.targets.version_spans import GroupState, Span, history_text


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Give each test a cache of its own: no test reads or leaves answers in the user's cache, or in another test's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def fake(tmp_path):
    return find_triton(str(fake_triton.write(tmp_path / "fake")))


def decode(fmt="e4m3fnuz", out="bf16"):
    return probes_like([f"decode/{fmt}/{out}"])


def cells(architectures, questions=None):
    return [(question, architecture) for question in questions or decode() for architecture in architectures]


# Failures, each with its own cause.


def test_whatever_ends_a_compilation_is_an_outcome_and_the_others_go_on(fake):
    result = evaluate_build(fake, cells(ARCHITECTURES.values()), timeout_s=3)
    seen = {architecture: outcome for (_, architecture), outcome in result.outcomes.items()}
    assert set(seen) == set(ARCHITECTURES)
    assert (seen["sm_86"].status, seen["sm_86"].kind, seen["sm_86"].signal) == (Status.CRASH, Kind.COMPILER_ABORT,
                                                                                "SIGABRT")
    assert seen["sm_86"].cause == "LLVM ERROR: the injected abort"
    assert (seen["sm_89"].status, seen["sm_89"].kind) == (Status.UNSUPPORTED, Kind.UNSUPPORTED_DTYPE)
    assert seen["sm_89"].cause == "type fp8e4b8 not supported in this architecture"
    assert seen["sm_90"].status is Status.TIMEOUT and "3 s" in seen["sm_90"].cause
    assert (seen["sm_103"].status, "exit code 3" in seen["sm_103"].cause) == (Status.CRASH, True)
    assert (seen["sm_120"].status, seen["sm_120"].cause) == (Status.MISSING, "not known to this build")


def test_an_object_that_is_empty_or_no_elf_file_is_a_failure(fake):
    result = evaluate_build(fake, cells(architectures_like(["sm_100", "gfx950"])))
    assert {(outcome.status, outcome.kind) for outcome in result.outcomes.values()} == {(Status.ERROR,
                                                                                         Kind.EMPTY_OBJECT)}


def test_an_instruction_that_the_target_does_not_have_is_a_failure_though_an_object_came_out(fake):
    outcome, = evaluate_build(fake, cells(architectures_like(["gfx942"]))).outcomes.values()
    assert (outcome.status, outcome.kind) == (Status.ERROR, Kind.ASSEMBLER_ERROR)
    assert outcome.cause == "instruction not supported on this GPU v_cvt_pk_f32_fp8"


def test_what_a_hanging_compiler_had_started_is_gone_with_it(fake):
    evaluate_build(fake, cells(architectures_like(["sm_90"])), timeout_s=3)
    assert not [process for process in psutil.process_iter() if _command_of(process) == "sleep 600.25"]


def _command_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:        # it has just ended
        return ""


def test_a_hanging_compilation_is_asked_again_and_nothing_else_is(fake):
    chosen = architectures_like(["sm_8?", "sm_90"])
    # a plain copy for each, to see if it is known
    assert engine.compile_cells(fake, cells(chosen), timeout_s=3).asked == 2 * len(chosen)
    assert engine.compile_cells(fake, cells(chosen), timeout_s=0.3).asked == 1
    ending = architectures_like(["sm_86", "sm_89"])
    assert engine.compile_cells(fake, cells(ending), fresh=True).asked == 2 * len(ending)


def test_half_a_line_in_the_cache_costs_that_line_only(fake):
    chosen = cells(architectures_like(["sm_80", "sm_86"]))
    engine.compile_cells(fake, chosen)
    kept = max((builds.cache_root() / "targets").glob("*.jsonl"), key=os.path.getmtime)
    kept.write_bytes(kept.read_bytes()[:-20])
    assert engine.compile_cells(fake, chosen).asked == 1
    assert engine.compile_cells(fake, chosen).asked == 0


# Builds.


def test_a_triton_that_cannot_be_imported_is_reported_and_the_others_go_on(tmp_path, fake):
    broken = fake_triton.write(tmp_path / "broken",
                               __init____py="raise OSError('libtriton.so: the injected undefined symbol')")
    dying = fake_triton.write(tmp_path / "dying",
                              __init____py="import os; os.write(2, b'injected last line\\n'); os._exit(7)")
    messages = []
    results = evaluate_builds([str(broken), str(dying), fake.requested], decode(), architectures_like(["sm_80"]),
                              notify=messages.append)
    assert "cannot be imported: OSError: libtriton.so: the injected undefined symbol" in results[0].build.unusable
    assert "ended its process with 7: injected last line" in results[1].build.unusable
    assert messages == [results[0].build.unusable, results[1].build.unusable]
    matrix = assemble(results, decode(), architectures_like(["sm_80"]))
    assert [build.unusable == "" for build in matrix.builds] == [True, False, False]
    with pytest.raises(UnusableTriton):
        evaluate_build(find_triton(str(broken)), cells(architectures_like(["sm_80"])))


@pytest.mark.parametrize(("output", "sentence"), [
    ("ERROR: No matching distribution found for triton==9.9.9",
     r"Triton 9\.9\.9 has no wheel for Python 3\.\d+ on this machine"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
     "no space left for Triton 9.9.9"),
    ("WARNING: Retrying (Retry(total=0)) after connection broken", "the package index did not answer"),
    ("Looking\nERROR: the index is on fire", "could not be installed: ERROR: the index is on fire"),
])
def test_why_a_version_cannot_be_fetched_is_one_sentence(monkeypatch, output, sentence):
    def install(installer, requirements, log, **options):
        log.write_text(output)
        return 1

    monkeypatch.setattr(builds.installer, "install", install)
    with pytest.raises(TritonUnavailable, match=sentence):
        find_triton("9.9.9")
    assert not list((builds.cache_root() / "triton").iterdir()), "something half made was left behind"


def test_a_full_disk_is_reported_even_before_anything_is_installed(monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(builds.tempfile, "mkdtemp", full)
    with pytest.raises(TritonUnavailable, match="no space left"):
        find_triton("9.9.9")


@pytest.mark.parametrize("name", ["/nonexistent/folder", "newest"])
def test_an_unknown_build_is_refused_by_name(name):
    with pytest.raises(TritonUnavailable, match=name):
        find_triton(name)


# Operations.


def test_the_sample_of_tiles_meets_every_option_and_every_block_k_in_both_layouts():
    for option, values in TILE_OPTIONS.items():
        assert {tile[option] for tile in TILES} == set(values)
    assert {(tile["block_k"], tile["layout"]) for tile in TILES} == {(k, layout) for k in TILE_OPTIONS["block_k"]
                                                                     for layout in ("nk", "kn")}
    assert len(TILES) <= 20


def test_every_operation_has_probes_whose_requests_are_json_and_differ():
    pytest.importorskip("triton")
    questions = probes_like([])
    assert {question.operation for question in questions} == set(OPERATIONS)
    assert len({question.id for question in questions}) == len(questions)
    for architecture in ARCHITECTURES.values():
        requests = [json.dumps(question.request(architecture), sort_keys=True) for question in questions]
        assert len(set(requests)) == len(requests)


@pytest.mark.parametrize("glob", ["decode/e9m9", "nothing"])
def test_a_glob_that_matches_no_probe_is_a_mistake(glob):
    with pytest.raises(ValueError, match=glob):
        probes_like(["encode", glob])
    with pytest.raises(ValueError, match="sm_75"):
        architectures_like(["sm_75"])


# Silent wrongness.


def compiled(ptx, **facts):
    return {"compiled": {"object_bytes": 5000, "shared_bytes": 0, "matrix": {}, "matrix_types": [],
                         "conversions": {"cvt.rn.f16x2.e4m3x2": 2},
                         "load_bits": 32, "registers": 12, "stack_bytes": 0, "assembly": ptx} | facts}


HALVED = "mul.f16x2 %r2, %r2, 0x38003800; mul.f16x2 %r3, %r3, 0x38003800;"


@pytest.mark.parametrize(("fmt", "correction", "status", "kind", "cause"), [
    ("e4m3fn", "", Status.OK, None, "decodes every code as defined"),
    ("e4m3fnuz", "", Status.WRONG, Kind.FNUZ_AS_FN, "twice its value"),
    ("e4m3fnuz", HALVED, Status.WRONG, None, ""),                                   # the bias is put right, 0x80 is not
    # 0x80 and NaN are right: FNUZ would read them otherwise
    ("e4m3fn", HALVED, Status.WRONG, Kind.SCALED, "0.5 times its value"),
    ("e4m3fn", "and.b32 %r2, %r2, 0x7FFF7FFF; and.b32 %r3, %r3, 0x7FFF7FFF;", Status.WRONG, Kind.SIGN_LOST, "positive"),
    ("e4m3fn", "and.b32 %r2, %r2, 0xFFFFFDFF; and.b32 %r3, %r3, 0xFFFFFDFF;", Status.WRONG, Kind.GIBBERISH,
     "no known format"),
    ("e4m3fn", "bra $L1;", Status.OK, None, "not run"),
])
def test_an_injected_decode_fault_is_recognised_by_its_table(fmt, correction, status, kind, cause):
    outcome, metrics = evaluate(decode(fmt, "fp16")[0], ARCHITECTURES["sm_90"],
                                compiled(DECODE.format(instruction="e4m3x2", correction=correction)))
    assert outcome.status is status and cause in outcome.cause
    assert outcome.check == ("none" if "bra" in correction else "table")
    if kind is not None:
        assert outcome.kind is kind
    if status is Status.WRONG:
        assert "cvt.rn.f16x2.e4m3x2" in outcome.message and "instead of" in outcome.message
    assert metrics.registers == 12 and metrics.conversions == ["cvt.rn.f16x2.e4m3x2"]


@pytest.mark.parametrize(("architecture", "fmt", "status", "kind"), [
    ("gfx942", "e4m3fnuz", Status.OK, None), ("gfx942", "e4m3fn", Status.WRONG, Kind.FN_AS_FNUZ),
    ("gfx950", "e4m3fn", Status.OK, None), ("gfx950", "e4m3fnuz", Status.WRONG, Kind.FNUZ_AS_FN),
])
def test_on_amd_the_instruction_tells_if_nothing_stands_beside_it(architecture, fmt, status, kind):
    text = "v_lshl_add_u64 v[2:3], s[2:3], 0, v[0:1]\nv_cvt_pk_f32_fp8_e32 v[0:1], v2\ns_endpgm"
    facts = {"conversions": {"v_cvt_pk_f32_fp8_e32": 1}, "assembly": text}
    outcome, _ = evaluate(decode(fmt, "fp32")[0], ARCHITECTURES[architecture], compiled("", **facts))
    assert (outcome.status, outcome.kind, outcome.check) == (status, kind, "instruction")
    corrected = facts | {"assembly": text.replace("s_endpgm", "v_mul_f32_e32 v0, 2.0, v0\ns_endpgm")}
    outcome, _ = evaluate(decode(fmt, "fp32")[0], ARCHITECTURES[architecture], compiled("", **corrected))
    assert (outcome.status, outcome.check) == (Status.OK, "none"), "what a multiplication does to it is not known"


@pytest.mark.parametrize(("architecture", "fmt", "types", "check"), [
    ("sm_90", "e4m3fn×e5m2", "e4m3.e5m2", "instruction"), ("sm_90", "e4m3fnuz×e4m3fnuz", "e4m3.e4m3", "none"),
    ("gfx942", "e4m3fnuz×e5m2fnuz", "fp8_bf8", "instruction"), ("gfx942", "e4m3fn×e4m3fn", "fp8_fp8", "none"),
])
def test_a_product_is_vouched_for_only_by_instructions_of_its_own_formats(architecture, fmt, types, check):
    question = ProbeSpec("fp8_dot", fmt, "k32", {})
    outcome, _ = evaluate(question, ARCHITECTURES[architecture], compiled("", conversions={}, matrix_types=[types]))
    assert (outcome.status, outcome.check) == (Status.OK, check)


# The installed Triton.


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    pytest.importorskip("triton")
    questions, architectures = probes_like(["decode/e4m3fn", "integer_decode/*/bf16"]), architectures_like(["sm_80",
                                                                                                            "sm_90"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return evaluate_build(find_triton("installed"), cells(architectures, questions)), questions, architectures


def test_the_installed_triton_decodes_e4m3fn_on_hopper_and_refuses_it_on_ampere(installed):
    result, _, _ = installed
    for out in ("bf16", "fp16", "fp32"):
        hopper, ampere = (result.outcomes[f"decode/e4m3fn/{out}", arch] for arch in ("sm_90", "sm_80"))
        assert (hopper.status, hopper.check) == (Status.OK, "table"), hopper.message
        assert (ampere.status, ampere.kind) == (Status.UNSUPPORTED, Kind.UNSUPPORTED_DTYPE)
        assert "fp8e4nv" in ampere.cause


def test_codes_of_6_and_4_bits_are_decoded_exactly_by_integers(installed):
    result, _, _ = installed
    for fmt in ("e3m2", "e2m3", "e2m1"):
        for arch in ("sm_80", "sm_90"):
            outcome = result.outcomes[f"integer_decode/{fmt}/bf16", arch]
            assert (outcome.status, outcome.check) == (Status.OK, "table"), outcome.message


def test_metrics_describe_the_object(installed):
    result, _, _ = installed
    metrics = result.metrics["decode/e4m3fn/fp16", "sm_90"]
    assert metrics.conversions == ["cvt.rn.f16x2.e4m3x2"] and metrics.load_bits == 32
    assert 0 < metrics.registers < 64 and metrics.stack_bytes == 0
    assert metrics.instructions_a_weight is None or 0.5 < metrics.instructions_a_weight < 12


def test_a_matrix_is_read_as_it_was_written_and_a_damaged_one_is_refused(installed, tmp_path):
    matrix = assemble([installed[0]], *installed[1:])
    file = tmp_path / "targets.json"
    matrix.write(file)
    assert read_matrix(file) == matrix
    whole = json.loads(file.read_text())
    for damage, message in (({"schema": 99}, "newer fpxbench"), ({"builds": []}, "out of order or range"),
                            ({"outcomes": 5}, "outcomes")):
        file.write_text(json.dumps(whole | damage))
        with pytest.raises(ValueError, match=message):
            read_matrix(file)
    file.write_text("not json")
    with pytest.raises(ValueError, match="not a matrix"):
        read_matrix(file)


def test_a_script_does_a_cell_again_with_nothing_but_triton(installed, tmp_path):
    import triton

    from fpxbench.targets.reproduction import script

    question, = probes_like(["decode/e4m3fn/fp16"])
    for name, text in (("sm_90", "cvt.rn.f16x2.e4m3x2"), ("sm_80", "type fp8e4nv not supported")):
        file = tmp_path / f"{name}.py"
        file.write_text(script(question, ARCHITECTURES[name], triton.__version__))
        run = subprocess.run([sys.executable, file], capture_output=True, text=True, cwd=tmp_path)
        assert text in run.stdout + run.stderr
        assert (run.returncode == 0) == (name == "sm_90")


def test_asv_counts_by_operation_and_does_without_pytorch(tmp_path):
    """In an environment that holds a Triton alone; what is wrong is counted there too, though not by name."""
    pytest.importorskip("triton")
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('injected', name='torch')")
    program = "from benchmarks import targets; import json; print(json.dumps(targets.setup_cache()))"
    environment = os.environ | {"FPX_PROFILE": "smoke", "PYTHONPATH": f"{tmp_path}:{CHECKOUT}",
                                "XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    counts = json.loads(run.stdout.splitlines()[-1])["decode"]
    assert set(counts) == {"not_compiling", "wrong", "failing"} and 0 < counts["not_compiling"] < 15


# Histories and differences.


def matrix_of(*builds_, probe="decode/e4m3fn/bf16"):
    """Return a matrix of one cell on sm_90: its status on each build, by version."""
    outcomes = [{"status": status, "cause": status} for status in dict.fromkeys(status for _, status in builds_)]
    number = {outcome["status"]: at for at, outcome in enumerate(outcomes)}
    return Matrix.model_validate({
        "generator": "test", "generated": "2026-01-01T00:00:00Z",
        "machine": {"system": "x", "processor": "y", "cores": 1},
        "builds": [{"triton": version} for version, _ in builds_], "operations": [], "outcomes": outcomes,
        "architectures": [ARCHITECTURES["sm_90"].model_dump()],
        "probes": [{"id": probe, "operation": "decode", "format": "e4m3fn",
                    "cells": {"sm_90": [{"builds": (at, at), "outcome": number[status]} for at,
                                        (_, status) in enumerate(builds_)]}}],
    })


def test_a_history_is_given_as_text_and_as_signs():
    matrix = matrix_of(("3.0.0", "wrong"), ("3.1.0", "wrong"), ("3.2.0", "unsupported"), ("3.5.1", "ok"))
    spans = history.spans(matrix, matrix.probes, "sm_90")
    assert history.history_text(spans) == "wrong 3.0.0–3.1.0, unsupported 3.2.0, ok since 3.5.1"
    assert history.history_signs(spans) == "✗3.0 –3.2 ✓°3.5.1"
    assert [list(where) for _, _,
            where in history.causes(matrix, 0)] == [[matrix.probes[0].id]], "which of its row is wrong"
    assert [list(where) for _, _, where in history.causes(matrix, 2)] == [["decode/e4m3fn"]]
    always = matrix_of(("3.0.0", "ok"), ("3.1.0", "ok"))
    spans = history.spans(always, always.probes, "sm_90")
    assert history.history_text(spans) == "ok on every build"
    assert history.history_signs(spans) == "✓°", "it was only compiled"


def test_what_was_only_compiled_is_shown_apart_from_what_was_executed():
    whole = matrix_of(("3.0.0", "ok"), ("3.1.0", "wrong"))
    compiled = history.spans(whole, whole.probes, "sm_90")[:1]
    assert compiled[0].state.unchecked and history.checked_cells(whole, 0) == (0, 1)
    outcomes = [outcome.model_copy(update={"check": "table"}) for outcome in whole.outcomes]
    executed = whole.model_copy(update={"outcomes": outcomes})
    assert history.history_signs(history.spans(executed, executed.probes, "sm_90")[:1]) == "✓"
    assert history.checked_cells(executed, 0) == history.checked_cells(executed, 1) == (1, 1)


def test_a_diff_lists_losses_and_gains_and_sets_the_exit_status(tmp_path):
    matrix = matrix_of(("3.0.0", "ok"), ("3.1.0", "crash"), ("3.2.0", "ok"))
    assert [change.verdict for change in changes(matrix, 0, matrix, 1)] == ["lost"]
    assert [change.verdict for change in changes(matrix, 1, matrix, 2)] == ["gained"]
    assert changes(matrix, 0, matrix, 2) == []
    file = tmp_path / "targets.json"
    matrix.write(file)
    for names, status, word in ((("3.0.0", "3.1.0"), 1, "lost: 1 cells"), (("3.1.0", "3.2.0"), 0, "gained: 1 cells"),
                                (("3.0.0", "9"), 2, "no Triton 9")):
        run = fpxbench("targets diff", *names, "--matrix", file)
        assert (run.returncode, word in run.stdout + run.stderr) == (status, True), run


def test_the_command_prints_a_table_writes_the_matrix_and_counts_causes(fake, tmp_path):
    file = tmp_path / "out.json"
    run = fpxbench("targets --operation decode/e4m3fnuz/bf16 --arch sm_8* --triton", fake.requested, "--export", file)
    assert run.returncode == 0, run.stderr
    assert "sm_86" in run.stdout and "☠" in run.stdout and "LLVM ERROR: the injected abort" in run.stdout
    assert read_matrix(file).builds[0].triton == "3.9.9"
    run = fpxbench("targets --triton /nonexistent --operation decode --json")
    assert run.returncode == 1 and "/nonexistent" in run.stderr and json.loads(run.stdout)["builds"][0]["unusable"]


def test_ctrl_c_ends_it_and_all_that_it_started(fake):
    process = subprocess.Popen([sys.executable, "-m", "fpxbench", "targets", "-t", fake.requested, "-o",
                                "decode/e4m3fnuz", "-a", "sm_90", "--jobs", "1"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = []
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and not any("sleep" in command for _, command in children):
        time.sleep(0.2)
        children = descendants(process.pid)
    assert any("sleep" in command for _, command in children), "it never got to compiling"
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid, _ in children):
        time.sleep(0.1)
    assert not [command for pid, command in children if Path(f"/proc/{pid}").exists()]


def descendants(pid):
    return [(child.pid, _command_of(child)) for child in psutil.Process(pid).children(recursive=True)]


@pytest.mark.parametrize(("requested", "release"), [
    ("3.0", "3.0.0"), ("3", "3.0.0"), ("v3.1.0", "3.1.0"), ("3.9.0", "3.9.0"), ("3.9.0.post1", "3.9.0.post1"),
    ("3.9rc1", "3.9.0rc1"),
    ("installed", "installed"), ("./3.0", "./3.0"),
])
def test_a_release_has_one_name_however_it_is_written(requested, release, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert normal_name(requested) == release


def test_a_folder_that_is_called_like_a_release_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3.0").mkdir()
    assert normal_name("3.0") == "3.0"


class _Compiled(Exception):
    """Builds would have been fetched and compiled with."""


def _diff(monkeypatch, *arguments):
    def ask(builds, *others, **options):
        raise _Compiled(builds)

    monkeypatch.setattr("fpxbench.targets.collection.evaluate_builds", ask)
    return command("targets diff", *arguments)


def test_releases_that_the_shipped_matrix_has_are_looked_up_and_not_asked(monkeypatch):
    found = _diff(monkeypatch, "3.8", "3.9.0", "-o", "encode/e4m3fn")
    assert found.exit_code == 0 and "from the matrix that ships with fpxbench" in found.output
    assert "gained: 1 cells" in found.output


@pytest.mark.parametrize("arguments", [("3.8.0", "3.9.0", "--ask"), ("3.8.0", "3.9.0", "--fresh"), ("3.8.0", "3.99.0"),
                                       ("installed", "3.9.0")])
def test_what_the_shipped_matrix_cannot_answer_is_asked(monkeypatch, arguments):
    with pytest.raises(_Compiled) as found:
        _diff(monkeypatch, *arguments, "-o", "decode/e4m3fn")
    assert found.value.args == ([arguments[0]],)


def test_a_diff_is_of_the_selected_cells_alone():
    found = json.loads(command("targets diff 3.1.0 3.2.0 -a gfx1201 --json").stdout)
    cells = [cell for change in found for cell in change["cells"]]
    assert cells and {cell["architecture"] for cell in cells} == {"gfx1201"}
    said = command("targets diff 3.1.0 3.2.0 -a gfx1201")
    assert "gfx90a" not in said.stdout and re.search(r"3\.1\.0 -> 3\.2\.0, \d+ cells compared", said.stdout)


def test_a_diff_of_nothing_is_refused(tmp_path):
    matrix = read_matrix(SHIPPED)
    without = matrix.model_copy(update={"builds": [
        build.model_copy(update={"unusable": "no wheel"}) if build.triton == "3.2.0" else build
        for build in matrix.builds]})
    without.write(tmp_path / "targets.json")
    run = command("targets diff 3.1.0 3.2.0 --matrix", tmp_path / "targets.json")
    assert isinstance(run.exception, UsageError) and "unusable: no wheel" in str(run.exception)
    run = command("targets repro encode/e5m2fnuz/fp16-rtne sm_*")
    assert isinstance(run.exception, UsageError) and "architectures; name one" in str(run.exception)


def test_a_history_says_no_count_that_a_build_did_not_have():
    steady = Span(GroupState(Status.OK, 3, 6, 3), "3.1.0", "3.2.0")
    moved = replace(steady, first="3.0.0", steady=False)
    assert history_text([steady]) == "3 of 6 ok on every build"
    assert history_text([moved]) == "some ok on every build (3 of 6 ok on 3.2.0)"
    wrong = Span(GroupState(Status.WRONG, 0, 6, 0), "2.9.0", "2.9.0")
    assert history_text([wrong, moved]) == "wrong 2.9.0, some ok since 3.0.0 (3 of 6 ok on 3.2.0)"

"""The table of tensor classes and a model's history as the report shows them, and the docs' table of classes."""

import subprocess
import sys

from generation_records import row, wrong
from places import CHECKOUT
from sample_records import BUILD, CPU

from fpxbench.model.generate_record import GenerationRecord
from fpxbench.model.tensor_record import OperationOutcome, OperationResult, TensorOperationRecord
from fpxbench.records.store import Store
from fpxbench.reports.model.generation_table import model_page
from fpxbench.reports.model.model_chapter import write_models
from fpxbench.reports.model.model_history import machine_histories
from fpxbench.reports.model.tensor_table import tensor_pages
from fpxbench.reports.pages import Pages

LATER = BUILD.model_copy(update={"torch": "2.14.0+cpu", "date": "2027-01-20"})
HOSTILE = "<img src=x onerror=alert(1)>"


def record(tensor, operation, outcome, build=BUILD, **changes):
    return TensorOperationRecord(build=build, machine=CPU, result=OperationResult(
        tensor=tensor, operation=operation, outcome=outcome, needed_by="checkpoints", **changes))


def first():
    return [record("FloatTensor mxfp4", "clone", "ok"), record("FloatTensor mxfp4", "t", "ok"),
            record("torchao MXTensor", "clone", "ok", library="torchao 0.18.0"),
            record("torchao MXTensor", "t", "wrong", library="torchao 0.18.0", message=HOSTILE)]


def second():
    return [record("FloatTensor mxfp4", "clone", "ok", LATER),
            record("torchao MXTensor", "clone", "crash", LATER, library="torchao 0.19.0"),
            record("torchao MXTensor", "t", "ok", LATER, library="torchao 0.19.0")]


def test_a_build_is_compared_with_the_one_before_it_operation_by_operation():
    older, newer = tensor_pages({(CPU.name, LATER.stem): second(), (CPU.name, BUILD.stem): first()})
    assert older.earlier is None and newer.earlier == BUILD
    assert [(change.tensor, change.operation, change.before, change.after) for change in newer.changes] == [
        ("torchao MXTensor", "clone", "ok", "crash"), ("torchao MXTensor", "t", "wrong", "ok")]
    assert older.table.done("torchao MXTensor") == "1 of 2"
    assert older.table.library("torchao MXTensor") == "torchao 0.18.0"
    assert [one.result.outcome for one in newer.table.notable()] == [OperationOutcome.CRASH]
    assert newer.table.outcome("FloatTensor mxfp4", "t") is None, "it was not asked, and is not called right"


def test_machines_are_not_compared_with_each_other():
    pages = tensor_pages({("a", BUILD.stem): first(), ("b", LATER.stem): second()})
    assert all(page.earlier is None and not page.changes for page in pages)


def test_the_chapter_has_a_table_a_build_and_the_rows_over_builds(tmp_path):
    tensors, rows = Store(tmp_path / "results", TensorOperationRecord), Store(tmp_path / "results", GenerationRecord)
    for each in [*first(), *second()]:
        tensors.append(each)
    for each in [row("mxfp4", 80, 0.01, 0.5), row("mxfp4", 80, 0.02, 0.5, build=LATER), wrong(build=LATER)]:
        rows.append(each)
    pages = Pages(tmp_path / "site")
    chapter = write_models(tmp_path / "results", pages, set())
    assert not pages.failures and not chapter.broken_lines
    assert [len(chapter.of(name).tensors) for name in (CPU.name, "another")] == [2, 0]
    folder = tmp_path / "site/machines" / CPU.name
    newer = (folder / LATER.stem / "tensors.html").read_text()
    assert "clone: ok → <b>crash</b>" in newer and "not checked" in newer
    assert HOSTILE not in (folder / BUILD.stem / "tensors.html").read_text()
    history = (folder / "models.html").read_text()
    assert "100 tokens/s" in history and "50.0 tokens/s" in history and "wrong" in history
    assert "The same rows over builds" in (folder / BUILD.stem / "models.html").read_text()


def test_a_history_holds_every_metric_that_was_measured_and_a_gap_where_a_row_was_not():
    older, newer = (model_page((CPU.name, build.stem), [each.model_copy(update={"build": build}) for each in rows])
                    for build, rows in ((BUILD, [row("mxfp4", 80, 0.01, 0.5)]),
                                        (LATER, [row("mxfp4", 80, 0.02, 0.5), row("nvfp4", 90, 0.02, 0.2)])))
    assert machine_histories([older]) == [], "one build is no history"
    [machine] = machine_histories([newer, older])
    [model] = machine.models
    assert model.labels == [BUILD.stem, LATER.stem]
    assert {each.name: [one is not None for one in each.records] for each in model.rows} == {
        "mxfp4, cpu_fused": [True, True], "nvfp4, cpu_fused": [False, True]}
    speed, kl = model.charts(0)
    assert [trace["y"] for trace in speed.figure["data"]] == [[100.0, 50.0], [50.0]]
    assert kl.figure["data"][1]["x"] == [LATER.stem]


def test_a_speed_s_line_is_broken_where_steps_are_timed_in_another_way():
    waited = row("mxfp4", 80, 0.01, 0.5)
    enqueued = waited.model_copy(update={"speed": waited.speed.model_copy(update={"method": 2})})
    older, newer = (model_page((CPU.name, build.stem), [each.model_copy(update={"build": build})])
                    for build, each in ((BUILD, waited), (LATER, enqueued)))
    [machine] = machine_histories([older, newer])
    speed, kl = machine.models[0].charts(0)
    [timed], [of_quality] = speed.figure["data"], kl.figure["data"]
    assert timed["x"] == [BUILD.stem, None, LATER.stem] and timed["y"] == [100.0, None, 100.0]
    assert "broken where" in speed.caption and "broken where" not in kl.caption
    assert of_quality["x"] == [BUILD.stem, LATER.stem]


def test_the_table_in_the_docs_is_that_of_the_sample_s_records():
    command = [sys.executable, CHECKOUT / "tools/tensor_class_docs.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

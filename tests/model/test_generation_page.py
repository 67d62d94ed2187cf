"""The table of a model as the report shows it."""

import pytest
from generation_records import HOSTILE, row, wrong
from sample_records import BUILD, CPU
from sites import dead_links, unlinked_pages

from fpxbench.model.generate_record import GenerationRecord
from fpxbench.model.tensor_record import OperationResult, TensorOperationRecord
from fpxbench.records.store import Store
from fpxbench.reports.model.generation_charts import charts_of
from fpxbench.reports.model.generation_table import model_page
from fpxbench.reports.site import build_site
from fpxbench.reports.sweep.charts import log_ticks, shared_labels

pytestmark = pytest.mark.usefixtures("few_targets")


def records():
    return [wrong(), row("mxfp4", 80, 0.01, 0.5), row("e4m3fn-row", 150, 0.0125, 0.01),
            row("bf16", 270, 0.02, 0.0, "plain"), row("int8-row", 150, 0.015, 0.001)]


def test_baselines_come_first_then_the_most_faithful_then_the_wrong():
    table = model_page(("cpu", "2.13.0-cpu"), records()).tables[0]
    assert [r.record.scheme for r in table.rows] == ["bf16", "int8-row", "e4m3fn-row", "mxfp4", "e4m3fn-row"]
    assert [r.speedup for r in table.rows] == [None, pytest.approx(4 / 3), pytest.approx(1.6), pytest.approx(2), None]
    assert table.rows[-1].remark == "wrong (gibberish), fn_as_fnuz"


def test_the_front_has_no_row_that_another_beats_in_bytes_and_quality():
    rows = [*records(), row("e5m2-row", 160, 0.01, 0.2)]
    chart = next(c for c in charts_of(model_page(("cpu", "b"), rows).tables[0], 0) if c.name == "quality-0")
    front, marks = chart.figure["data"]
    assert len(marks["x"]) == 5, "wrong rows, without bytes, are not among the choices"
    assert front["x"] == [80, 150, 270]


def test_marks_that_would_hide_each_other_s_names_share_a_label():
    points, names = [(100.0, 0.5), (160.0, 0.0050), (160.0, 0.0052), (40.0, 0.0051)], ["a", "b", "c", "d"]
    assert shared_labels(points, names, from_zero=True) == ["a", "b, c", "", "d"]
    assert log_ticks([0.002, 0.01])["dtick"] == "D2" and log_ticks([1e-3, 1.0])["dtick"] == 1


def test_impossible_speeds_are_no_bars_and_every_bar_has_its_quality():
    fast = row("nvfp4", 80, 80e6 / (2 * CPU.read_gb_per_s * 1e9), 0.6)
    assert fast.flags
    chart = next(c for c in charts_of(model_page(("cpu", "b"), [*records(), fast]).tables[0], 0)
                 if c.name == "speed-0")
    labels = chart.figure["data"][0]["y"]
    assert not any("nvfp4" in label for label in labels)
    assert all("KL" in label for label in labels)


def test_the_site_has_the_page_escaped_and_the_overview_counts_its_rows(tmp_path):
    store = Store(tmp_path / "results", GenerationRecord)
    later = BUILD.model_copy(update={"torch": "2.14.0+cpu", "date": "2027-01-20"})
    for record in [*records(), row("mxfp4", 80, 0.01, 0.5, build=later)]:
        store.append(record)
    Store(tmp_path / "results", TensorOperationRecord).append(TensorOperationRecord(
        build=BUILD, machine=CPU, result=OperationResult(tensor="FloatTensor mxfp4", operation="t", outcome="ok")))
    summary = build_site(tmp_path / "results", tmp_path / "site")
    assert not summary.troubles and not summary.empty and dead_links(tmp_path / "site") == []
    assert unlinked_pages(tmp_path / "site") == []
    assert ["wrong (gibberish)" in problem.message for problem in summary.problems] == [True]
    page = (tmp_path / "site" / "machines" / CPU.name / BUILD.stem / "models.html").read_text()
    assert HOSTILE not in page and "&lt;script&gt;alert" in page
    for text in ("wrong (gibberish), fn_as_fnuz", "A model of a test.", "over bf16", "cpu_fused"):
        assert text in page
    overview = (tmp_path / "site" / "index.html").read_text()
    assert "models over builds</a>" in overview and "1 tensor class</a>" in overview
    assert "models.html" in overview and "4 of 5 rows right" in overview
    assert "<h1>1 faulty row in models&#39; tables</h1>" in overview, "casts were not checked, and are not called right"

"""Claims about the drawings of speedup against M, and about who is named fastest."""

import re

import pytest
from sample_records import GPU, GPU_BUILD, case, record

from fpxbench.records.kinds import Kind
from fpxbench.records.record import Properties
from fpxbench.records.verdict import Status, Verdict
from fpxbench.reports.pages import Pages
from fpxbench.reports.sweep.speedup_curves import speedup_curves
from fpxbench.reports.sweep.sweep_table import sweep_of


def timed(implementation, m, speedup, library=None):
    return record(case(implementation, m=m), speedup=speedup, machine=GPU, build=GPU_BUILD,
                  properties=Properties(library=library))


def curves_of(*records):
    return speedup_curves(sweep_of(("gpu", "build"), records))


PEER = [timed("humming", m, speedup, "humming-kernels 0.1.19") for m, speedup in ((1, 1.5), (16, 1.9), (64, 1.4))]
OWN = [timed("triton_fused", m, speedup) for m, speedup in ((1, 1.8), (16, 0.9))]


def test_each_implementation_is_a_line_over_the_tokens_that_it_was_timed_at():
    (drawing,) = curves_of(*PEER, *OWN).drawings
    assert [(curve.name, [mark.row.case.m for mark in curve.marks]) for curve in drawing.curves] == [
        ("humming", [1, 16, 64]), ("triton_fused", [1, 16])]
    assert [m for _, m in drawing.tokens] == [1, 16, 64]
    own = drawing.curves[1].marks
    assert own[0].y < drawing.dense < own[1].y      # above dense at one token, below at 16
    assert own[0].x == drawing.curves[0].marks[0].x


def test_the_fastest_is_named_with_the_own_kernels_share_of_its_speed():
    fastest = curves_of(*PEER, *OWN).fastest["e4m3fn-row", "llama2-7b.o"]
    assert fastest[1].best.case.implementation == "triton_fused" and fastest[1].own is fastest[1].best
    assert fastest[16].best.case.implementation == "humming"
    assert fastest[16].own_share == pytest.approx(0.9 / 1.9, rel=0.05)
    assert fastest[64].own is None and fastest[64].own_share is None


def test_the_roofline_bounds_what_is_drawn_and_falls_to_dense_where_products_are_bound_by_arithmetic():
    many = [timed("triton_fused", m, 0.9) for m in (512, 4096)]
    (drawing,) = curves_of(*PEER, *OWN, *many).drawings
    heights = [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", drawing.roofline)]
    assert len(heights) == 5
    assert all(heights[0] <= curve.marks[0].y for curve in drawing.curves)
    assert heights[-1] == pytest.approx(drawing.dense, abs=1)


def test_a_wrong_case_is_neither_drawn_nor_fastest():
    wrong = record(case("gemlite", m=16), Verdict(status=Status.WRONG, kind=Kind.GIBBERISH), machine=GPU,
                   build=GPU_BUILD)
    curves = curves_of(*PEER, wrong)
    assert [name for name, _, _ in curves.names] == ["humming"]
    assert curves.fastest["e4m3fn-row", "llama2-7b.o"][16].best.case.implementation == "humming"


def test_one_token_count_alone_is_no_line():
    assert curves_of(OWN[0]) is None


def test_the_page_shows_lines_a_legend_with_versions_and_the_table(tmp_path):
    sweep = sweep_of(("gpu", "build"), [*PEER, *OWN])
    page = Pages(tmp_path).sweep(sweep, [])
    assert page.count('<path class="line"') == 2 and "humming-kernels 0.1.19" in page
    assert re.search(r"1\.\d+×</b><br>humming</a><br><a[^>]*>triton_fused \d+%", page)

"""The report shows casts, their examples, what changed, and where engines disagree."""

import os
import re
import shutil

import pytest
from sample_casts import before_and_after, conversion, overflowing, record
from sample_records import BUILD, CPU

from fpxbench.casts.cast_record import Behaviour, CastRecord
from fpxbench.records.kinds import Kind
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.reports.casts.cast_index import NAME
from fpxbench.reports.pages import Pages
from fpxbench.reports.site import build_site

pytestmark = pytest.mark.usefixtures("few_targets")


def test_the_report_shows_conversions_their_examples_and_what_changed(tmp_path):
    old, new = before_and_after()
    store = Store(tmp_path / "results", CastRecord)
    markup = Verdict(status=Status.UNSUPPORTED, summary="refused: <script>alert(1)</script>", log_tail="<img src=x>")
    for one in (
        *old,
        *new,
        record(conversion("cast/fp32/e5m2"), Status.WRONG,
               verdict=Verdict(status=Status.WRONG, summary="ties", kind=Kind.TIES_AWAY)),
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
    return re.findall(r'href="([^"#]*\.html)["#]', html)


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


def nights_of_casts(results, days, **behaviour):
    for day in days:
        build = BUILD.model_copy(update={"torch": f"2.15.0.dev202611{day:02}+cpu", "channel": "nightly",
                                         "date": f"2026-11-{day:02}", "key": f"{day:02}" * 20})
        for what in ("cast/fp32/e4m3fn", "cast/bf16/e4m3fn"):
            Store(results, CastRecord).append(record(conversion(what), build=build, behaviour=Behaviour(**behaviour)))


@pytest.fixture
def opened(monkeypatch):
    """Return the dates of builds whose files of casts are opened, and the pages of conversions that are rendered."""
    found = []
    read, rendered = Store.read, Pages.conversion
    monkeypatch.setattr(Store, "read", lambda self, path: (
        found.append(path.stem[10:18]) if self.of is CastRecord else None) or read(self, path))
    monkeypatch.setattr(Pages, "conversion", lambda self, sweep, row: found.append(
        f"{sweep.build.date} {row.what}") or rendered(self, sweep, row))
    return found


def files_of(site):
    return {path.relative_to(site): path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_a_night_reads_its_own_casts_and_writes_their_pages_only(tmp_path, opened):
    results, site = tmp_path / "results", tmp_path / "site"
    nights_of_casts(results, range(1, 9), overflow="nan")
    build_site(results, site, builds=2)
    opened.clear()
    build_site(results, site, builds=2)
    assert opened == ["20261108"], "the newest, which the first page shows"
    nights_of_casts(results, [9], overflow="saturate")
    opened.clear()
    build_site(results, site, builds=2)
    assert opened == ["20261109"] * 2 + ["2026-11-09 cast/fp32/e4m3fn", "2026-11-09 cast/bf16/e4m3fn"]
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    (results / CPU.name / NAME).unlink()
    build_site(results, tmp_path / "again", builds=2)
    assert files_of(site) == files_of(tmp_path / "again"), "what a report from scratch is"
    assert sorted(path.parent.name[10:18] for path in site.glob("machines/*/*/numerics.html")) == [
        "20261108", "20261109"]


def test_casts_that_were_measured_again_or_are_gone_change_the_index(tmp_path, opened):
    results, site = tmp_path / "results", tmp_path / "site"
    nights_of_casts(results, range(1, 5), overflow="nan")
    build_site(results, site, builds=1)
    nights_of_casts(results, [2], overflow="saturate")
    (results / CPU.name / "numerics" / "2.15.0.dev20261101-cpu.jsonl").unlink()
    os.utime(results / CPU.name / "numerics" / "2.15.0.dev20261103-cpu.jsonl")
    opened.clear()
    build_site(results, site, builds=1)
    assert opened[0] == "20261102" and "20261103" not in opened[:1], "one is hashed, and not read"
    pages = {path.parent.name[10:18]: path.read_text() for path in site.glob("machines/*/*/numerics.html")}
    assert sorted(pages) == ["20261103", "20261104"] and "overflow saturate → nan" in pages["20261103"]


@pytest.mark.parametrize("spoil", [lambda path: path.write_text('{"version": 1'),
                                   lambda path: path.write_text('{"version": 0, "files": {}, "snapshots": {}}'),
                                   lambda path: path.unlink()])
def test_an_index_that_cannot_be_used_is_made_anew(tmp_path, opened, spoil):
    results, site = tmp_path / "results", tmp_path / "site"
    nights_of_casts(results, range(1, 4), overflow="nan")
    Store(results, CastRecord).files()[0].open("a").write("no record\n")
    first = build_site(results, site, builds=1)
    spoil(results / CPU.name / NAME)
    opened.clear()
    again = build_site(results, site, builds=1)
    assert opened[:3] == ["20261101", "20261102", "20261103"]
    assert first.broken_lines == again.broken_lines and len(again.broken_lines) == 1
    assert build_site(results, site, builds=1).broken_lines == again.broken_lines, "kept, too"


def test_where_the_index_cannot_be_written_it_is_said_and_the_report_is_the_same(tmp_path):
    results = tmp_path / "results"
    nights_of_casts(results, range(1, 3), overflow="nan")
    (results / CPU.name / NAME).mkdir()
    said = build_site(results, tmp_path / "site").troubles
    assert len(said) == 1 and said[0].endswith("missing rows are read from the records each time")

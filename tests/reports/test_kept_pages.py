"""A report over an earlier one: pages whose inputs did not change stay, and the whole is what a new one would be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from nights import EAGER, FUSED, nightly, nights, slower
from sample_records import CPU, GPU, case, record

from fpxbench.records.case import Case
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.reports import kept_pages
from fpxbench.reports.kept_pages import FILE
from fpxbench.reports.pages import Pages
from fpxbench.reports.site import build_site
from fpxbench.reports.targets.support_table import FILE as MATRIX_FILE, SHIPPED

BUILDS, IN_FULL = 34, 3
CASES = (FUSED, EAGER, case("dense", "bf16"))
CRASH = Verdict(status=Status.CRASH, summary="died by SIGSEGV")


def content(site: Path) -> dict[str, bytes]:
    return {str(path.relative_to(site)): path.read_bytes() for path in site.rglob("*")
            if path.is_file() and path.name != FILE}


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the pages of cases as they are rendered, as build and case."""
    pages: list[str] = []
    really = Pages.case
    monkeypatch.setattr(Pages, "case", lambda self, sweep, row, of: pages.append(
        f"{of.build.date} {of.case.implementation}") or really(self, sweep, row, of))
    return pages


def little_support(results: Path) -> None:
    """Give the results a small support matrix of their own: its pages are not what is tested here."""
    document = json.loads(SHIPPED.read_text(encoding="utf-8"))
    document |= {"probes": document["probes"][::200], "generated": "2030-01-01T00:00:00Z"}
    results.mkdir(exist_ok=True)
    (results / MATRIX_FILE).write_text(json.dumps(document))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    little_support(tmp_path / "results")
    nights(tmp_path / "results", BUILDS, CASES, noise=0.005)
    build_site(tmp_path / "results", tmp_path / "site", builds=IN_FULL)
    return tmp_path / "results"


def assert_as_from_scratch(results: Path) -> None:
    build_site(results, results.parent / "site", builds=IN_FULL)
    shutil.rmtree(results.parent / "again", ignore_errors=True)
    build_site(results, results.parent / "again", builds=IN_FULL)
    assert content(results.parent / "site") == content(results.parent / "again")


def test_without_anything_new_no_page_of_a_case_is_made_again(results: Path, rendered: list[str]) -> None:
    before = content(results.parent / "site")
    build_site(results, results.parent / "site", builds=IN_FULL)
    assert rendered == []
    assert content(results.parent / "site") == before


def test_of_a_night_only_the_new_builds_pages_are_made(results: Path, rendered: list[str]) -> None:
    nights(results, 1, CASES, noise=0.005, first=BUILDS, seed=2)
    build_site(results, results.parent / "site", builds=IN_FULL)
    assert {page.split()[0] for page in rendered} == {nightly(BUILDS).date}
    assert_as_from_scratch(results)
    assert not (results.parent / "site" / "machines" / GPU.name / nightly(BUILDS - IN_FULL).stem).exists()


def test_a_series_that_gets_a_page_is_linked_from_older_builds_and_other_cases_stay(
        results: Path, rendered: list[str]) -> None:
    nights(results, 2, CASES, noise=0.005, first=BUILDS, seed=2, edit=slower(1.3, BUILDS))
    build_site(results, results.parent / "site", builds=IN_FULL + 2)
    assert f"{nightly(BUILDS - 1).date} {FUSED.implementation}" in rendered
    assert f"{nightly(BUILDS - 1).date} dense" not in rendered
    assert_as_from_scratch(results)


def measured_again(results: Path) -> None:
    Store(results).append(record(FUSED, CRASH, machine=GPU, build=nightly(BUILDS - 2)))


def page_deleted(results: Path) -> None:
    next(results.parent.glob(f"site/machines/*/*/{FUSED.slug}.html")).unlink()


def stamp_damaged(results: Path) -> None:
    next(results.parent.glob(f"site/machines/*/*/{FILE}")).write_bytes(b'{"inputs": 3')


def test_what_changed_or_is_damaged_is_made_again(results: Path, rendered: list[str]) -> None:
    night, fused, every = nightly(BUILDS - 2).date, FUSED.implementation, {one.implementation for one in CASES}
    for happens, made in (
            # The case and its rival of one scheme; on the build before it has a link to its series now, and on the
            # build after another status before it.
            (measured_again, {f"{night} {fused}", f"{night} {EAGER.implementation}",
                              f"{nightly(BUILDS - 3).date} {fused}", f"{nightly(BUILDS - 1).date} {fused}"}),
            (page_deleted, {f"{nightly(BUILDS - IN_FULL).date} {fused}"}),
            (stamp_damaged, {f"{nightly(BUILDS - IN_FULL).date} {name}" for name in every})):
        rendered.clear()
        happens(results)
        build_site(results, results.parent / "site", builds=IN_FULL)
        assert set(rendered) == made and len(rendered) == len(made), happens.__name__
    assert_as_from_scratch(results)


def test_while_a_sweep_goes_on_only_the_pages_of_what_ended_are_made(results: Path, rendered: list[str]) -> None:
    """A case of another scheme leaves the others' pages as they are, though the file of records is another."""
    site, on = results.parent / "site", nightly(BUILDS - 1)
    Store(results).append(record(case("dense", "bf16", "llama3-8b.k", n=1024), machine=GPU, build=on))
    build_site(results, site, builds=IN_FULL)
    assert rendered == [f"{on.date} dense"]
    assert_as_from_scratch(results)


def test_a_report_that_is_killed_on_the_way_loses_no_page_that_stays(
        results: Path, rendered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    site, on = results.parent / "site", nightly(BUILDS - 1)
    Store(results).append(record(case("dense", "bf16", "llama3-8b.k", n=1024), machine=GPU, build=on))
    before = content(site)
    with monkeypatch.context() as during:
        during.setattr(Pages, "sweep", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_site(results, site, builds=IN_FULL)
    assert {name: content(site)[name] for name in before} == before, "an old page stays until the new one is there"
    rendered.clear()
    build_site(results, site, builds=IN_FULL)
    assert rendered == [f"{on.date} dense"]
    assert_as_from_scratch(results)


def test_another_fpxbench_makes_every_page_again(
        results: Path, rendered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_pages, "_program", lambda: "another")
    build_site(results, results.parent / "site", builds=IN_FULL)
    assert len(rendered) == IN_FULL * len(CASES)


def test_a_sweep_of_twice_the_cases_compares_twice_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    really = Case.layer.fget
    monkeypatch.setattr(Case, "layer", property(lambda self: asked.append(self.id) or really(self)))
    counts = []
    for number in (40, 80):
        asked.clear()
        of = tuple(case("dense", "bf16", m=m) for m in range(1, number + 1))
        little_support(tmp_path / str(number))
        nights(tmp_path / str(number), 1, of)
        build_site(tmp_path / str(number), tmp_path / f"site-{number}")
        counts.append(len(asked))
    assert counts[1] <= 2 * counts[0]


def test_pages_grow_by_little_for_each_case_and_build(tmp_path: Path) -> None:
    sizes: dict[tuple[int, int], dict[str, int]] = {}
    for builds, number in ((65, 3), (85, 3), (65, 8)):
        results, of = tmp_path / f"{builds}-{number}", tuple(case("dense", "bf16", m=m) for m in range(1, number + 1))
        little_support(results)
        nights(results, builds, of, noise=0.005, edit=slower(1.3, builds - 4, of=of[0]))
        build_site(results, tmp_path / f"site-{builds}-{number}", builds=1)
        pages = {path.relative_to(tmp_path / f"site-{builds}-{number}"): path.stat().st_size
                 for path in (tmp_path / f"site-{builds}-{number}").rglob("*.html")}
        sizes[builds, number] = {
            "sweep": max(size for path, size in pages.items() if path.name == "index.html" and len(path.parts) == 4),
            "case": max(size for path, size in pages.items() if path.name == of[0].slug + ".html"),
            "series": max(size for path, size in pages.items() if "history" in path.parts),
            "builds": pages[Path("builds.html")], "machine": pages[Path("machines") / GPU.name / "index.html"]}
    few, long, wide = sizes.values()
    assert (wide["sweep"] - few["sweep"]) / 5 < 1000, "bytes for a case: 2,000 cases make 2 MB"
    assert (long["series"] - few["series"]) / 20 < 300, "bytes for a build: 1,000 builds make 300 kB"
    assert (long["builds"] - few["builds"]) / 20 < 400
    for page in ("case", "machine"):
        assert max(size[page] for size in sizes.values()) < 40_000, "whatever the history"


@pytest.mark.slow
@pytest.mark.slow_core
def test_machines_that_are_written_at_once_give_the_same_report(results: Path) -> None:
    nights(results, 30, CASES, noise=0.005, machine=CPU)
    there = [build_site(results, results.parent / f"by-{jobs}", builds=IN_FULL, jobs=jobs) for jobs in (1, 2)]
    assert content(results.parent / "by-1") == content(results.parent / "by-2")
    assert there[0].troubles == there[1].troubles and len(there[0].problems) == len(there[1].problems)

"""The report through time: changes and their states, builds, and since when a case has its status."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import command
from nights import EAGER, FUSED, nightly, nights, timed
from sample_records import CPU, GPU, case, record
from sites import PYTORCH_COMMITS, Page, dead_links, pages_of, scripts_of_their_own, unlinked_pages

from fpxbench.builds.environments import Installation
from fpxbench.builds.timeline import Timeline
from fpxbench.casts.cast_record import Behaviour, CastRecord
from fpxbench.casts.conversion import Conversion
from fpxbench.records.kinds import Kind
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.regressions.change_report import Direction, State
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome, ConfirmationRun, Interval
from fpxbench.regressions.result_changes import find_changes
from fpxbench.reports.site import build_site

pytestmark = pytest.mark.usefixtures("few_targets")

BUILDS, IN_FULL = 44, 3
SLOW_SINCE, CRASHING_SINCE, WRONG_SINCE, RIGHT_SINCE, CLOCK_SINCE = 36, 41, 20, 35, 38
REFUTED, MENDED, MOVED, UNRIGHT = (case(scheme=scheme) for scheme in ("e3m2-row", "mxfp4", "e3m4-row", "nvfp4"))
CRASHING = (case("compiled_mixed_mm", "e5m2-row"), case("compiled_mixed_mm", "e4m3fn-row"))
CASES = (FUSED, EAGER, REFUTED, MENDED, MOVED, UNRIGHT, *CRASHING)
PAYLOAD = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\" ' {{ 7 * 7 }} \x1b[31m"
CRASH = Verdict(status=Status.CRASH, kind=Kind.COMPILER_ABORT, signal="SIGABRT", summary=f"died by SIGABRT: {PAYLOAD}")
WRONG = Verdict(status=Status.WRONG, kind=Kind.NIBBLE_SWAP, summary="neighbours change places")


def history(night, one):
    """Return what becomes of the cases: slower ones, of which one is for two nights only; one that moves with the
    clock; a crash; a mistake that is mended; one that was always there."""
    of = one.case
    if of in CRASHING and night >= CRASHING_SINCE:
        return record(of, CRASH, machine=one.machine, build=one.build)
    if of == UNRIGHT or of == MENDED and WRONG_SINCE <= night < RIGHT_SINCE:
        return record(of, WRONG, machine=one.machine, build=one.build)
    if of in (FUSED, EAGER) and night >= SLOW_SINCE or of == REFUTED and SLOW_SINCE <= night < SLOW_SINCE + 2:
        one = timed(one, one.timing.median_us * 1.10, one.timing.baseline_us)
    if of == MOVED and night >= CLOCK_SINCE:
        one = timed(one, one.timing.median_us * 1.20, one.timing.baseline_us * 1.20)
    return one.model_copy(update={"build": one.build.model_copy(update={"git": f"{night:07x}"})})


def confirmation(suspect, outcome: ConfirmationOutcome, ratio: float, said: str) -> Confirmation:
    runs = [ConfirmationRun(side=side, status=Status.OK, median_us=100 * (ratio if side == "bad" else 1),
                            baseline_us=250) for side in ("good", "bad", "bad", "good")]
    return Confirmation(
        suspect=suspect.id, case=next(one for one in CASES if one.id == suspect.series.case), metric="time",
        machine=GPU, good=suspect.surely_good,
        build=suspect.raised_at, outcome=outcome, said=said,
        time=Interval(value=ratio, low=ratio - 0.01, high=ratio + 0.01, level=0.9999, pairs=15),
        control=Interval(value=1.001, low=0.99, high=1.01, level=0.9999, pairs=15), runs=runs)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GPU on which all of that happened, a CPU that measured some of the builds, and a build that did not
    install."""
    folder = tmp_path_factory.mktemp("time") / "results"
    nights(folder, BUILDS, CASES, noise=0.01, edit=history)
    nights(folder, 4, (FUSED,), machine=CPU, first=BUILDS - 4)
    worse = {suspect.series.case: suspect for suspect in find_changes(folder).suspects
             if suspect.direction is Direction.WORSE and suspect.change > 0.07}
    store = Store(folder, Confirmation)
    store.append(confirmation(worse[FUSED.id], ConfirmationOutcome.CONFIRMED, 1.097, "+9.7% [8.7, 10.7]"))
    store.append(confirmation(worse[REFUTED.id], ConfirmationOutcome.REFUTED, 1.001, f"+0.1% [-0.9, 1.1] {PAYLOAD}"))
    store.append(Confirmation(case=MENDED, metric="time", machine=GPU, good=nightly(2), build=nightly(9),
                              outcome=ConfirmationOutcome.UNDECIDED, said="+1.0%"))
    Store(folder, Installation).append(Installation(
        at="2026-07-20", machine=GPU, build=nightly(BUILDS), parts=("torch", "triton"), python="3.11", installer="pip",
        status="failed",
        why="no such wheel", log_tail=f"ERROR: {PAYLOAD}"))
    casts = Store(folder, CastRecord)
    for night, overflow in ((BUILDS - 2, "nan"), (BUILDS - 1, "saturate")):
        casts.append(CastRecord(conversion=Conversion(operation="cast", source="fp32", target="e4m3fn", engine="eager",
                                                      device="cuda"),
                                    build=nightly(night), machine=GPU, verdict=Verdict(status=Status.OK),
                                    behaviour=Behaviour(overflow=overflow),
                                    inputs=3, inputs_digest="abc", differing=0))
    return folder


@pytest.fixture(scope="module")
def site(results: Path) -> Path:
    summary = build_site(results, results.parent / "site", builds=IN_FULL)
    assert not any("could not be made" in trouble for trouble in summary.troubles)
    return results.parent / "site"


def tag(night: int) -> str:
    return f"nightly-{nightly(night).date.replace('-', '')}"


def page(site: Path, path: str) -> str:
    return (site / path).read_text(encoding="utf-8")


def series_page(site: Path, of, machine=GPU) -> str:
    [found] = (site / "machines" / machine.name / "history").glob(of.id.replace("/", "__") + "-*.html")
    return found.read_text(encoding="utf-8")


def section(html: str, name: str) -> str:
    """Return the text of the section whose heading has this id; empty without one."""
    found = re.search(rf'<section[^>]*aria-labelledby="{name}">(.*?)</section>', html, re.DOTALL)
    return Page(found[1]).text if found else ""


def case_page(site: Path, of, night: int, machine=GPU) -> str:
    return page(site, f"machines/{machine.name}/{nightly(night).label}-cu130/{of.slug}.html")


# ---- states ----------------------------------------------------------------------------------------------------------

def test_each_regression_is_under_the_state_that_it_is_in(site: Path) -> None:
    html = page(site, "regressions.html")
    assert FUSED.id in section(html, "confirmed") and "confirmed +9.7% [8.7, 10.7]" in section(html, "confirmed")
    assert EAGER.id in section(html, "open") and CRASHING[0].id in section(html, "open")
    assert MENDED.id in section(html, "fixed") and f"ended with {tag(RIGHT_SINCE)}" in section(html, "fixed")
    assert REFUTED.id in section(html, "refuted") and REFUTED.id not in section(html, "open")
    assert "requested by hand" in section(html, "undecided") and tag(9) in section(html, "undecided")
    for state in State:
        assert f'id="state-{state}"' in html, "what a state means is said"


def test_what_moved_with_the_dense_product_is_told_as_the_machine(site: Path) -> None:
    html = page(site, "regressions.html")
    assert tag(CLOCK_SINCE) in section(html, "machine")
    assert MOVED.id not in section(html, "open") + section(html, "confirmed")


def test_a_cause_that_hits_several_cases_is_told_once(site: Path) -> None:
    told = section(page(site, "regressions.html"), "open")
    assert told.count("ok → crash (compiler_abort)") == 1
    assert "2 cases" in told


def test_an_open_finding_comes_with_the_command_that_looks_again(site: Path, results: Path) -> None:
    suspect = max((one for one in find_changes(results).suspects if one.series.case == EAGER.id),
                  key=lambda suspect: suspect.change)
    assert f"fpxbench confirm {suspect.id}" in section(page(site, "regressions.html"), "open")
    good, bad = (f"nightly-{build.date.replace('-', '')}" for build in (suspect.surely_good, suspect.raised_at))
    assert f"fpxbench bisect {EAGER.id} {good} {bad}" in Page(series_page(site, EAGER)).text


def test_the_first_page_has_what_is_confirmed_and_counts_what_is_suspected(site: Path) -> None:
    text = Page(page(site, "index.html")).text
    confirmed = text.index("triton_fused on e4m3fn-row, llama2-7b.o/m1/bf16: is slower, +9.7% [8.7, 10.7],")
    assert text.index("aborts inside the compiler") < confirmed < text.index(
        "2 cases look slower than on earlier builds, not yet confirmed")
    assert "1 confirmed regression" in text and "+0.1%" not in text


def test_a_confirmed_crash_is_told_once_on_the_first_page(tmp_path: Path) -> None:
    nights(tmp_path / "results", 4, CRASHING[:1], edit=lambda night, one: history(night + CRASHING_SINCE - 2, one))
    [event] = find_changes(tmp_path / "results").events
    Store(tmp_path / "results", Confirmation).append(Confirmation(
        suspect=event.id, case=CRASHING[0], metric="verdict", machine=GPU, good=event.last_good, build=event.first_bad,
        outcome=ConfirmationOutcome.CONFIRMED, said="crash in 5 of 5 runs", good_counts={"ok": 5},
        bad_counts={"crash": 5}))
    summary = build_site(tmp_path / "results", tmp_path / "site")
    assert [problem.severity for problem in summary.problems] == ["crash"]
    assert "crash in 5 of 5 runs" in section(page(tmp_path / "site", "regressions.html"), "confirmed")


# ---- a page for each series that changed -----------------------------------------------------------------------------

def figure(html: str, name: str) -> dict:
    return json.loads(re.search(rf'id="figure-{name}">(.*?)</script>', html, re.DOTALL)[1])["figure"]


def traces(drawn: dict) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for trace in drawn["data"]:
        found.setdefault(trace["name"], []).append(trace)
    return found


def test_a_series_is_drawn_with_its_noise_its_change_its_control_and_the_second_look(site: Path) -> None:
    drawn = figure(series_page(site, FUSED), "time")
    shown = traces(drawn)
    assert len(shown["time"][0]["x"]) == len(shown["dense, same run"][0]["x"]) == BUILDS
    before, after = shown["level ± 1.96 σ"]
    assert before["y"][2] < 105 < after["y"][0], "the level before lies below the level after, bands and all"
    assert len(shown["95% interval of the change"]) == 1
    assert 109 < shown["both builds again"][0]["y"][0] < 110.5
    [step] = [shape for shape in drawn["layout"]["shapes"] if shape["type"] == "line"]
    assert abs(step["x0"] - (SLOW_SINCE - 0.5)) <= 1


def test_builds_that_were_not_ok_are_bands_in_the_drawing_and_have_no_time(site: Path) -> None:
    drawn = figure(series_page(site, MENDED), "time")
    bands = [(shape["x0"], shape["x1"]) for shape in drawn["layout"]["shapes"] if shape["type"] == "rect"]
    assert bands == [(WRONG_SINCE - 0.5, RIGHT_SINCE - 0.5)]
    times = traces(drawn)["time"][0]["y"]
    assert [night for night, time in enumerate(times) if time is None] == list(range(WRONG_SINCE, RIGHT_SINCE))


def test_marks_lead_to_cases_that_have_a_page_and_nowhere_else(site: Path) -> None:
    links = traces(figure(series_page(site, FUSED), "time"))["time"][0]["customdata"]
    assert [bool(link) for link in links] == [False] * (BUILDS - IN_FULL) + [True] * IN_FULL
    assert all((site / "machines/x/history" / link).resolve().is_file() for link in links if link)


def test_only_series_that_changed_have_a_page(site: Path) -> None:
    having = {path.name.rpartition("-")[0] for path in (site / "machines" / GPU.name / "history").iterdir()}
    assert {FUSED.slug, MENDED.slug, CRASHING[0].slug} <= having
    assert UNRIGHT.slug not in having, "it has always been wrong"
    assert not (site / "machines" / CPU.name / "history").exists()


# ---- a page for each build -------------------------------------------------------------------------------------------

def test_a_build_tells_what_it_changed_and_what_it_is(site: Path) -> None:
    html = page(site, f"builds/{tag(CRASHING_SINCE)}.html")
    assert "ok → crash (compiler_abort)" in section(html, "worse")
    assert "2 crash" in section(html, "measured") and CPU.device in section(html, "measured")
    before = page(site, f"builds/{tag(CRASHING_SINCE - 1)}.html")
    assert "crash" not in section(before, "worse")
    assert f"{PYTORCH_COMMITS}{CRASHING_SINCE - 2:07x}...{CRASHING_SINCE - 1:07x}" in Page(before).links


def test_a_build_that_mended_something_says_so(site: Path) -> None:
    assert "wrong (nibble_swap): neighbours change places → ok" in section(
        page(site, f"builds/{tag(RIGHT_SINCE)}.html"), "better")


def test_a_build_that_did_not_install_has_the_installers_last_words(site: Path) -> None:
    html = page(site, f"builds/{tag(BUILDS)}.html")
    assert "no such wheel" in section(html, "install") and "ERROR:" in section(html, "install")
    assert "Not measured" in html
    assert "did not install for cu130" in Page(page(site, "builds.html")).text


def test_casts_that_a_build_changed_are_on_its_page(site: Path) -> None:
    assert "overflow nan → saturate" in section(page(site, f"builds/{tag(BUILDS - 1)}.html"), "casts")


# ---- since when ------------------------------------------------------------------------------------------------------

def test_a_broken_case_says_since_when(site: Path) -> None:
    crashing = Page(case_page(site, CRASHING[0], BUILDS - 1)).text
    assert f"crash since {tag(CRASHING_SINCE)} ({BUILDS - CRASHING_SINCE} builds)" in crashing
    assert "before that" in crashing
    assert f"wrong since the first build measured ({BUILDS} builds)" in Page(case_page(site, UNRIGHT, BUILDS - 1)).text


def test_an_older_builds_page_knows_nothing_of_later_ones(site: Path) -> None:
    assert f"crash since {tag(CRASHING_SINCE)} (1 build)" in Page(case_page(site, CRASHING[0], CRASHING_SINCE)).text


def test_the_matrix_says_since_when_and_shows_the_builds_before(site: Path) -> None:
    html = page(site, f"machines/{GPU.name}/{nightly(BUILDS - 1).label}-cu130/index.html")
    assert f'href="../../../builds/{tag(BUILDS - 1)}.html">What this build changed' in html
    assert f"compiled_mixed_mm, e5m2-row: 1 of 1 crash since {tag(CRASHING_SINCE)} (3 builds)" in html
    cell = re.search(r'title="compiled_mixed_mm, e5m2-row:.*?</td>', html, re.DOTALL)[0]
    assert re.findall(r'class="(s-\w+)" style="flex-grow:(\d+)"', cell) == [("s-ok", "9"), ("s-crash", "3")]
    assert 'class="recent"' not in re.search(r'title="triton_fused, nvfp4:.*?</td>', html,
                                             re.DOTALL)[0], "it was never another one"


def test_builds_on_which_a_case_was_not_measured_interrupt_nothing(tmp_path: Path) -> None:
    def edit(night, one):
        if night == 2:
            return None
        return record(FUSED, WRONG, machine=one.machine, build=one.build) if night else one

    nights(tmp_path / "results", 4, (FUSED,), edit=edit)
    build_site(tmp_path / "results", tmp_path / "site")
    assert f"wrong since {tag(1)} (2 builds)" in Page(case_page(tmp_path / "site", FUSED, 3)).text


def test_the_only_build_there_is_says_nothing_of_time(tmp_path: Path) -> None:
    nights(tmp_path / "results", 1, (UNRIGHT,), edit=history)
    summary = build_site(tmp_path / "results", tmp_path / "site")
    assert "since" not in summary.problems[0].message
    assert "One build was measured" in page(tmp_path / "site", "regressions.html")


def test_builds_that_no_machine_has_two_of_are_not_said_to_be_alike(tmp_path: Path) -> None:
    nights(tmp_path / "results", 1, (FUSED,))
    nights(tmp_path / "results", 1, (FUSED,), first=1, machine=CPU)
    build_site(tmp_path / "results", tmp_path / "site")
    text = Page(page(tmp_path / "site", "regressions.html")).text
    assert "Nothing to compare yet" in text and "No two of 2 builds were measured on one machine" in text
    assert "Nothing to compare with" in page(tmp_path / "site", f"builds/{tag(1)}.html")


# ---- the whole site --------------------------------------------------------------------------------------------------

def test_every_link_leads_somewhere(site: Path) -> None:
    assert dead_links(site) == [] and unlinked_pages(site) == []


def test_old_builds_have_no_pages_of_cases_and_are_counted(site: Path) -> None:
    folders = {path.name for path in (site / "machines" / GPU.name).iterdir() if path.is_dir()} - {"history"}
    assert folders == {f"{nightly(night).label}-cu130" for night in range(BUILDS - IN_FULL, BUILDS)}
    assert f"{BUILDS} builds measured" in Page(page(site, f"machines/{GPU.name}/index.html")).text
    assert f"{BUILDS - IN_FULL} older builds have no pages of cases" in Page(
        page(site, f"machines/{GPU.name}/index.html")).text


def test_nothing_from_elsewhere_becomes_markup(site: Path) -> None:
    assert scripts_of_their_own(site) == []
    assert "<script>alert(1)</script>" in Page(series_page(site, CRASHING[0])).text
    assert "<script>alert(1)" not in series_page(site, CRASHING[0]) + page(site, "regressions.html") + page(
        site, f"builds/{tag(BUILDS)}.html")


def test_the_same_records_give_the_same_pages_again(site: Path, results: Path, tmp_path: Path) -> None:
    build_site(results, tmp_path, builds=IN_FULL)
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.html")} == {
        path.relative_to(site): path.read_bytes() for path in site.rglob("*.html")}


def test_the_timeline_dates_builds_that_do_not_know_their_own_date(tmp_path: Path) -> None:
    """2.9.1 came out after 2.10.0: by version it would stand before it."""
    def at(version, date=None):
        return nightly(0).model_copy(update={"torch": f"{version}+cu130", "channel": "release", "date": date})

    for version in ("2.9.1", "2.10.0"):
        Store(tmp_path / "results").append(record(FUSED, WRONG if version == "2.9.1" else None, machine=GPU,
                                                  build=at(version)))
    build_site(tmp_path / "results", tmp_path / "without")
    assert "→ ok" in section(page(tmp_path / "without", "builds/2.10.0.html"), "better")
    timeline = Timeline(tmp_path / "timeline")
    timeline.add([at("2.10.0", "2026-01-21"), at("2.9.1", "2026-03-01")])
    build_site(tmp_path / "results", tmp_path / "with", timeline)
    assert "→ wrong" in section(page(tmp_path / "with", "builds/2.9.1.html"), "worse")


def test_a_record_without_a_place_in_time_still_has_its_page(tmp_path: Path) -> None:
    nights(tmp_path / "results", 2, (FUSED,))
    Store(tmp_path / "results").append(record(FUSED, machine=GPU,
                                              build=nightly(5).model_copy(update={"torch": "master"})))
    summary = build_site(tmp_path / "results", tmp_path / "site")
    assert "'master' is not a version" in summary.troubles[0]
    assert list((tmp_path / "site").glob("machines/*/master-*/*.html"))
    assert "&#39;master&#39; is not a version" in page(tmp_path / "site", "regressions.html")
    assert len(pages_of(tmp_path / "site" / "builds")) == 2


def test_a_timeline_that_cannot_be_read_is_named_and_the_report_before_it_stays(tmp_path: Path) -> None:
    nights(tmp_path / "results", 1, (FUSED,))
    (tmp_path / "timeline/objects/pack").mkdir(parents=True)
    asked = "report --results", tmp_path / "results", "--output", tmp_path / "site"
    assert command(*asked).exit_code == 0
    before = case_page(tmp_path / "site", FUSED, 0)
    refused = command(*asked, "--timeline", tmp_path / "timeline")
    assert refused.exception is not None and "not a git repository" in str(refused.exception)
    assert case_page(tmp_path / "site", FUSED, 0) == before


def test_a_feed_of_confirmed_regressions_lies_beside_the_report_and_every_page_names_it(site: Path) -> None:
    feed = page(site, "feed.xml")
    assert feed.count("<entry>") == 1 and f"{FUSED.id}: slower since" in feed and REFUTED.id not in feed
    assert 'type="application/atom+xml" title="Confirmed regressions" href="feed.xml"' in page(site, "index.html")
    assert 'href="../../../feed.xml"' in series_page(site, FUSED)

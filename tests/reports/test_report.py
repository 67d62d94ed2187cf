"""The report is complete, the same each time, and nothing in a record can do more than be shown."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sample_records as sample
from sites import Page, dead_links, pages_of, scripts_of_their_own, unlinked_pages

from fpxbench.records.kinds import Kind
from fpxbench.records.record import DeviceState, Flag, Properties
from fpxbench.records.verdict import SEVERITY, SIGNS, Status, Verdict
from fpxbench.reports.pages import FOLDERS, Pages
from fpxbench.reports.site import SiteSummary, build_site
from fpxbench.reports.sweep import problems
from fpxbench.reports.sweep.case_row import page_of_id
from fpxbench.reports.sweep.dot_plot import dot_plot_of
from fpxbench.reports.sweep.sweep_table import sweep_of

pytestmark = pytest.mark.usefixtures("few_targets")

SWEEP = Path("machines/cpu-epyc-2c/2.13.0-cpu")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SiteSummary]:
    folder = tmp_path_factory.mktemp("report")
    sample.write(folder / "results", sample.varied())
    summary = build_site(folder / "results", folder / "site")
    assert summary.troubles == [], "every page could be made"
    return folder / "site", summary


def test_one_cause_in_many_cases_is_one_sentence_with_a_count(site) -> None:
    crashes = [problem for problem in site[1].problems if problem.severity == "crash"]
    assert [problem.message for problem in crashes] == [
        "compiled_mixed_mm on e5m2fnuz-row aborts inside the compiler (SIGABRT), in 4 of 4 cases: died by SIGABRT: "
        "size mismatch when packing elements for LLVM struct expected 4 but got 8."
    ]
    assert len(crashes[0].cases) == 4


def test_findings_come_worst_first(site) -> None:
    ranks = [problem.rank for problem in site[1].problems]
    assert ranks == sorted(ranks)
    assert [problem.severity for problem in site[1].problems[:3]] == ["nonfinite", "crash",
                                                                      "wrong"], "a common scheme first, then FNUZ ones"
    assert set(problems.SEVERITIES) >= {str(status) for status in SEVERITY} | {str(flag) for flag in Flag}


def test_the_overview_begins_with_what_is_wrong(site) -> None:
    text = Page(site[1].index.read_text()).text
    assert "3 faults in matmul results, 4 slow or suspicious" in text
    order = [text.index(problem.message) for problem in site[1].problems]
    assert order == sorted(order)
    assert order[2] < text.index("What to choose") < order[3], "wrong results, then the choice, then what is slow"
    assert max(order) < text.index("Every implementation with every scheme") < text.index("What was not measured")


def test_the_overview_says_how_much_is_right_before_what_is_wrong(site) -> None:
    text = " ".join(Page(site[1].index.read_text()).text.split())
    assert re.search(r"of \d+ cases right", text).start() < text.index(site[1].problems[0].message)


def test_of_many_findings_of_a_kind_the_first_are_in_full_and_the_rest_is_folded_away(tmp_path: Path) -> None:
    many = [sample.record(sample.case(f"impl_{letter}"), Verdict(status=Status.WRONG, summary=f"mistake {letter}"))
            for letter in "abcdefg"]
    sample.write(tmp_path / "results", many)
    summary = build_site(tmp_path / "results", tmp_path / "site")
    shown, _, folded = summary.index.read_text().partition('<details class="rest"><summary>2 more</summary>')
    assert len(summary.problems) == 7
    assert [f"impl_{letter}" in shown for letter in "abcdefg"] == [True] * 5 + [False] * 2
    assert all(f"impl_{letter}" in folded for letter in "fg")


def test_canaries_are_counted_over_those_that_ran(site) -> None:
    ran = [r for r in sample.varied() if r.case.workload == "canary.codes"
           and r.verdict.status is not Status.UNSUPPORTED]
    right = sum(r.verdict.status is Status.OK for r in ran)
    assert f"{right} of {len(ran)} right." in Page(site[1].index.read_text()).text
    assert 0 < right < len(ran)


def test_one_refusal_of_many_schemes_is_one_row() -> None:
    refused = [sample.record(sample.case("x", scheme),
                             Verdict(status=Status.UNSUPPORTED, summary=f"takes int8-row only, not {scheme}"))
               for scheme in ("mxfp4", "e4m3fn-row", "nvfp4")]
    [gap] = sweep_of(("m", "b"), refused).not_measured
    assert (gap.reason, gap.schemes) == ("takes int8-row only, not this scheme", ["e4m3fn-row", "mxfp4", "nvfp4"])


def test_every_case_has_a_page_with_its_verdict_and_a_script(site) -> None:
    for record in sample.varied():
        page = Page((site[0] / SWEEP / page_of_id(record.case.id)).read_text())
        assert str(record.verdict.status) in page.text and SIGNS[record.verdict.status] in page.text
        assert f"implementation={record.case.implementation!r}" in page.text
        assert record.case.id in page.text


def test_a_timed_case_shows_its_time_beside_the_baseline_and_the_roofline(site) -> None:
    page = (site[0] / SWEEP / "native_float8__e5m2-row__llama2-7b.o__m1__bf16.html").read_text()
    assert "<svg" in page and ">dense</text>" in page and ">roofline</text>" in page
    assert "Bottleneck:" in page and "95% interval" in page


def test_a_wrong_case_shows_its_evidence_and_no_time(site) -> None:
    page = (site[0] / SWEEP / "native_float8__e4m3fnuz-row__llama2-7b.o__m1__bf16.html").read_text()
    assert "0.4997" in page and "codes off" in page
    assert "<svg" not in page and "median of" not in page


def test_every_link_of_the_site_leads_somewhere(site) -> None:
    pages = pages_of(site[0])
    assert sum(path.name.count("__") == 4 for path in pages) == len(sample.varied())
    assert dead_links(site[0]) == []


def test_every_page_of_the_site_can_be_reached_from_the_first(site) -> None:
    assert unlinked_pages(site[0]) == []


def test_links_with_filters_name_what_the_page_can_filter_by(site) -> None:
    page = (site[0] / SWEEP / "index.html").read_text()
    for problem in site[1].problems:
        for part in filter(None, urlsplit(problem.link).fragment.split("&")):
            name, value = part.split("=")
            choices = re.search(rf'<select name="{name}">(.*?)</select>', page, re.DOTALL)[1]
            assert f">{value}<" in choices or f'value="{value}"' in choices, problem.link


def test_no_page_loads_anything_from_elsewhere(site) -> None:
    for path, page in pages_of(site[0]).items():
        assert not [url for url in page.loads + page.links if urlsplit(url).scheme not in ("", "data")], path
        assert not page.handlers, path
        for script in page.scripts:
            assert script.get("src") or script.get("type") == "application/json", f"{path}: a script in the page itself"
        assert "Content-Security-Policy" in path.read_text()
    for asset in ("style.css", "report.js", "charts.js"):
        text = (site[0] / "assets" / asset).read_text()
        assert "http://" not in text and "https://" not in text and "@import" not in text


def test_the_same_records_give_the_same_bytes(site, tmp_path: Path) -> None:
    sample.write(tmp_path / "results", sample.varied())
    build_site(tmp_path / "results", tmp_path / "again")
    for path in site[0].rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(site[0])).read_bytes(), path


def test_the_newest_record_of_a_case_counts(tmp_path: Path) -> None:
    sample.write(tmp_path, [sample.record(sample.case("x"), Verdict(status=Status.WRONG)),
                            sample.record(sample.case("x"), speedup=2.0)])
    assert build_site(tmp_path, tmp_path / "site").problems == []


def test_pages_of_cases_that_are_gone_do_not_stay(tmp_path: Path) -> None:
    sample.write(tmp_path / "one", [sample.record(sample.case("x"), speedup=2.0)])
    sample.write(tmp_path / "two", [sample.record(sample.case("y"), speedup=2.0)])
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "notes.txt").write_text("not the report's")
    build_site(tmp_path / "one", tmp_path / "site")
    for folder in FOLDERS:
        (tmp_path / "site" / folder).mkdir(exist_ok=True)
        (tmp_path / "site" / folder / "gone.html").write_text("of an earlier report")
    build_site(tmp_path / "two", tmp_path / "site")
    assert {folder for folder in FOLDERS if (tmp_path / "site" / folder / "gone.html").exists()} == set()
    assert "checkpoints" in FOLDERS and "machines" in FOLDERS
    assert [path.name[:1] for path in (tmp_path / "site" / SWEEP).glob("*__*.html")] == ["y"]
    assert (tmp_path / "site" / "notes.txt").exists()


def test_the_overview_speaks_of_the_newest_build_of_each_machine(tmp_path: Path) -> None:
    old = sample.BUILD.model_copy(update={"torch": "2.9.0+cpu", "date": "2025-10-15"})
    wrong = Verdict(status=Status.WRONG, kind=Kind.SIGN_LOST)
    sample.write(tmp_path, [
        sample.record(sample.case("x"), wrong, build=old), sample.record(sample.case("x"), speedup=2.0),
        sample.record(sample.case("x"), wrong, machine=sample.GPU, build=sample.GPU_BUILD),
    ])
    summary = build_site(tmp_path, tmp_path / "site")
    assert [[found.sweep.machine.name for found in problem.cases] for problem in summary.problems] == [["nvidia-h100"]]
    index = Page(summary.index.read_text()).text
    assert "1 older sweep is listed" in index and "AMD EPYC" in index and "H100" in index
    machine = Page((tmp_path / "site" / SWEEP.parent / "index.html").read_text()).text
    assert machine.index("2.13.0") < machine.index("2.9.0")


def test_one_cause_on_several_machines_is_one_sentence(tmp_path: Path) -> None:
    wrong = Verdict(status=Status.WRONG, kind=Kind.SIGN_LOST, summary="every negative weight is positive")
    for machine in (sample.CPU, sample.GPU):
        sample.write(tmp_path, [sample.record(sample.case("x"), wrong, machine=machine)])
    assert [problem.message for problem in build_site(tmp_path, tmp_path / "site").problems] == [
        "x on e4m3fn-row loses the sign, in 2 of 2 cases, on AMD EPYC 7B13 and NVIDIA H100 80GB HBM3: every negative "
        "weight is positive."
    ]


def test_a_machines_facts_are_shown_in_words_with_units(tmp_path: Path) -> None:
    machine = sample.CPU.model_copy(update={"facts": {"power_limit_w": 700.0, "memory_bus_bits": 5120,
                                                      "of_its_own": "<b>x"}})
    sample.write(tmp_path / "results", [sample.record(sample.case("x"), machine=machine)])
    build_site(tmp_path / "results", tmp_path / "site")
    page = (tmp_path / "site" / "machines" / machine.name / "index.html").read_text()
    assert "<dt>power limit</dt><dd>700 W</dd>" in page and "<dt>memory bus</dt><dd>5120 bits</dd>" in page
    assert "<dt>of its own</dt><dd>&lt;b&gt;x</dd>" in page


def test_a_page_lies_in_a_folder_from_which_pages_that_are_gone_are_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chapter/page.html is in none of .*machines, .* add its folder to FOLDERS"):
        Pages(tmp_path).write("chapter/page.html", lambda: "")


def test_no_page_prints_a_number_with_all_its_digits(tmp_path: Path) -> None:
    """Records as stored and scripts have them; sentences of a verdict have the digits that they came with."""
    ugly = 0.040959700261617535
    machine = sample.GPU.model_copy(update={"facts": {"clock_offset_s": ugly, "fleet": {"offset_s": ugly}},
                                            "read_gb_per_s": 1000 * ugly})
    evidence = {"value": repr(ugly), "bound": ugly, "worst_at": [1, 2], "gain": repr(-1e9 / 3),
                "rows": [[ugly, repr(ugly)]], "experiments": {"table": {"0x38": [ugly, repr(1 / ugly)]}}}
    wrong = Verdict(status=Status.WRONG, kind=Kind.INACCURATE, summary="off", evidence=evidence)
    timed = sample.record(sample.case("x"), speedup=1 + ugly, machine=machine)
    state = DeviceState(readings=3, sm_clock_mhz=1e5 * ugly, sm_clock_min_mhz=1e5 * ugly, memory_clock_mhz=1e5 * ugly,
                        power_w=1e4 * ugly, temperature_c=1e3 * ugly, joules_per_call=ugly, joules_per_gb=ugly,
                        energy_calls=7, energy_s=ugly)
    properties = Properties(error_factor=ugly, error_threshold=1 + ugly, first_call_s=ugly)
    timed = timed.model_copy(update={"device_state": state, "properties": properties, "elapsed_s": ugly})
    sample.write(tmp_path, [timed, sample.record(sample.case("y"), wrong, machine=machine)])
    summary = build_site(tmp_path, tmp_path / "site")
    assert summary.troubles == [] and summary.broken_lines == []
    long = {}
    for path in (tmp_path / "site").rglob("*.html"):
        page = re.sub(r"<(script|pre)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        shown = Page(page).text + " ".join(re.findall(r'(?:title|aria-label)="([^"]*)"', page))
        if found := re.findall(r"\d+\.\d{6,}\S*", shown):
            long[str(path.relative_to(tmp_path))] = found
    assert long == {}


# What other machines may send.


PAYLOAD = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\" ' {{ 7 * 7 }} \x1b[31m\x07"


def test_nothing_in_a_record_becomes_markup(tmp_path: Path) -> None:
    machine = sample.CPU.model_copy(update={"device": PAYLOAD, "arch": PAYLOAD, "host": PAYLOAD,
                                            "facts": {PAYLOAD: PAYLOAD}})
    verdict = Verdict(status=Status.WRONG, summary=PAYLOAD, evidence={PAYLOAD: [PAYLOAD]}, signal=PAYLOAD,
                      log_tail=PAYLOAD)
    refused = Verdict(status=Status.UNSUPPORTED, summary=PAYLOAD)
    timed = sample.record(sample.case("z"), speedup=0.5, machine=machine, flags=(Flag.UNFUSED,))
    traffic = timed.traffic.model_copy(update={"bottleneck": PAYLOAD, "kernels": [PAYLOAD]})
    timed = timed.model_copy(update={"about": PAYLOAD, "traffic": traffic})
    records = [sample.record(sample.case("x"), verdict, machine=machine),
               sample.record(sample.case("y"), refused, machine=machine),
               sample.record(sample.case("w", workload="canary.codes"), machine=machine, no_timing=PAYLOAD), timed]
    refused_lines = [timed.model_copy(update={name: PAYLOAD}) for name in ("started_at", "source")]
    refused_lines += [timed.model_copy(update={"build": sample.BUILD.model_copy(update={name: PAYLOAD})})
                      for name in ("triton", "git", "date", "key")]
    sample.write(tmp_path, records + refused_lines)
    summary = build_site(tmp_path, tmp_path / "site")
    assert len(summary.problems) == 2 and len(summary.broken_lines) == len(refused_lines)
    assert scripts_of_their_own(tmp_path / "site") == []
    for path, page in pages_of(tmp_path / "site").items():
        assert "alert(1)" not in "".join(page.loads), path
    assert "<script>alert(1)</script>" in Page(
        (tmp_path / "site" / SWEEP / page_of_id(sample.case("x").id)).read_text()).text


def test_a_script_in_a_log_shows_as_text(site) -> None:
    page = (site[0] / SWEEP / "compiled_mixed_mm__e5m2fnuz-row__llama2-7b.o__m1__bf16.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(&#39;log&#39;)&lt;/script&gt;" in page
    assert "[31m" not in Page(page).text.split("As stored, JSON")[0]


def test_names_that_are_too_long_or_alike_get_pages_of_their_own() -> None:
    long = sample.case("x" * 80, "y" * 80, "z" * 80)
    assert len(page_of_id(long.id)) < 255
    alike = (sample.case("a__b", "c"), sample.case("a", "b__c"))
    assert alike[0].slug == alike[1].slug and page_of_id(alike[0].id) != page_of_id(alike[1].id)


def test_times_that_make_no_sense_are_a_broken_line_and_do_not_stop_the_report(tmp_path: Path) -> None:
    timed = sample.record(sample.case("x"), speedup=2.0)
    strange = timed.timing.model_copy(update={"samples_us": [], "median_us": 0.0, "ci95_us": (0.0, 0.0),
                                              "speedup": 0.0, "speedup_ci95": None})
    sample.write(tmp_path, [timed.model_copy(update={"timing": strange})])
    summary = build_site(tmp_path, tmp_path / "site")
    (broken,) = summary.broken_lines
    assert "timing.samples_us" in str(broken)
    assert "could not be read" in Page(summary.index.read_text()).text


def test_a_roofline_that_is_next_to_nothing_is_drawn_and_has_no_tick_at_zero() -> None:
    one = sample.record(sample.case("x"), speedup=2.0)
    machine = one.machine.model_copy(update={"read_gb_per_s": 1e300})
    one = one.model_copy(update={"machine": machine, "traffic": one.traffic.model_copy(update={"bytes_min": 1e-20})})
    assert 0 < min(us for _, us in dot_plot_of(one).ticks) < 1e-250


# Little or nothing.


def test_without_records_the_report_says_what_to_do(tmp_path: Path) -> None:
    summary = build_site(tmp_path / "nothing", tmp_path / "site")
    text = Page(summary.index.read_text()).text
    assert "There are no records yet" in text and "fpxbench run" in text
    assert summary.problems == [] and summary.broken_lines == []


def test_broken_lines_are_listed_with_their_reason(tmp_path: Path) -> None:
    sample.write(tmp_path, [sample.record(sample.case("x"), speedup=2.0)])
    [file] = (tmp_path).glob("*/records/*.jsonl")
    with open(file, "a") as records:
        records.write('{"half a reco\n<script>alert(2)</script>\n')
    summary = build_site(tmp_path, tmp_path / "site")
    page = summary.index.read_text()
    assert len(summary.broken_lines) == 2
    assert "2 lines could not be read" in Page(page).text and f"{file.name}:2" in Page(page).text
    assert "<script>alert(2)" not in page


def test_broken_lines_alone_still_make_a_report(tmp_path: Path) -> None:
    (tmp_path / "m" / "records").mkdir(parents=True)
    (tmp_path / "m" / "records" / "b-cpu.jsonl").write_text("nonsense\n")
    text = Page(build_site(tmp_path, tmp_path / "site").index.read_text()).text
    assert "There are no records yet" in text and "1 line could not be read" in text


def test_a_page_that_cannot_be_made_gives_the_reason_and_ends_no_other(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(record):
        if record.case.implementation == "y":
            raise OverflowError("Numerical result <out> of range")
        return dot_plot_of(record)

    monkeypatch.setattr("fpxbench.reports.pages.dot_plot_of", refuse)
    sample.write(tmp_path / "results", [sample.record(sample.case(name), speedup=2.0) for name in "xyz"])
    summary = build_site(tmp_path / "results", tmp_path / "site")
    pages = {name: (tmp_path / "site" / SWEEP / page_of_id(sample.case(name).id)).read_text() for name in "xyz"}
    assert ["could not be made" in pages[name] for name in "xyz"] == [False, True, False]
    assert "OverflowError: Numerical result &lt;out&gt; of range" in pages["y"]
    assert summary.troubles == [
        f"{SWEEP}/{page_of_id(sample.case('y').id)} could not be made: OverflowError: Numerical result <out> of range"]
    assert dead_links(tmp_path / "site") == []


def test_a_file_in_the_reports_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "site").write_text("")
    with pytest.raises(NotADirectoryError, match="site is a file"):
        build_site(tmp_path, tmp_path / "site")


# Colours.


def luminance(colour: str) -> float:
    """Return relative luminance, WCAG 2.2."""
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_text_stands_out_from_its_ground(site, mode: str) -> None:
    style = (site[0] / "assets" / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\n\s*\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-fA-F]{6});", light if mode == "light" else dark))
    pairs = [(name, f"{name}-bg") for name in (*map(str, Status), "flag")] + [
        (ink, "page") for ink in ("ink", "quiet", "link")] + [("quiet", "soft")]
    for ink, ground in pairs:
        brighter, darker = sorted((luminance(colours[ink]), luminance(colours[ground])), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= 4.5, f"{ink} on {ground}, {mode}"

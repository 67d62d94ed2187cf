"""The support page says what each GPU takes since which Triton, tells what was checked from what only compiled, and
lets nothing in a matrix act."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import sample_records as sample
from test_report import PAYLOAD, Page

from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status
from fpxbench.reports.site import build_site
from fpxbench.reports.targets.support_build import build_diffs
from fpxbench.reports.targets.support_row import Scripts, row_detail
from fpxbench.reports.targets.support_table import SHIPPED, Gpu, SupportMatrix, chosen_matrix
from fpxbench.targets.architectures import ARCHITECTURES, Architecture
from fpxbench.targets.matrix import (
    CellOutcome,
    CompilingMachine,
    Matrix,
    OperationSummary,
    Probe,
    Run,
    TritonBuild,
    read_matrix,
)
from fpxbench.targets.operations import probes_like
from fpxbench.targets.reproduction import newest_failure, script

OK = CellOutcome(status=Status.OK, check="table")
COMPILES = CellOutcome(status=Status.OK, cause="compiles")
WRONG = CellOutcome(status=Status.WRONG, kind=Kind.FNUZ_AS_FN, cause="every normal code decodes to twice its value",
                    check="table", message="by cvt.rn.f16x2.e4m3x2")
REFUSED = CellOutcome(status=Status.UNSUPPORTED, kind=Kind.UNSUPPORTED_DTYPE,
                      cause="type fp8e4b8 not supported in this architecture")
CRASH = CellOutcome(status=Status.CRASH, kind=Kind.COMPILER_ABORT, cause="LLVM ERROR", signal="SIGABRT")
UNKNOWN = CellOutcome(status=Status.MISSING, cause="not known to this build")

NEWER = datetime(2100, 1, 1, tzinfo=UTC)


def matrix_of(*histories: list[CellOutcome | None], versions: tuple[str, ...] = ("3.0.0", "3.1.0", "3.2.0", "3.3.1"),
              **more) -> Matrix:
    """Return a matrix of decode/e4m3fnuz on sm_90, a probe for each history, of which each has an outcome a build."""
    outcomes, details = [], ("bf16", "fp16", "fp32")
    probes = []
    for history, detail in zip(histories, details, strict=False):
        runs = []
        for at, outcome in enumerate(history):
            if outcome is not None:
                outcomes.append(outcome)
                runs.append(Run(builds=(at, at), outcome=len(outcomes) - 1))
        probes.append(Probe(id=f"decode/e4m3fnuz/{detail}", operation="decode", format="e4m3fnuz",
                            cells={"sm_90": runs}))
    fields = {
        "generator": "fpxbench", "generated": NEWER,
        "machine": CompilingMachine(system="Linux", processor="one", cores=2),
        "builds": [TritonBuild(triton=version) for version in versions], "architectures": [ARCHITECTURES["sm_90"]],
        "operations": [OperationSummary(name="decode", title="decode", about="an fp8 dtype to a float")],
        "outcomes": outcomes, "probes": probes,
    }
    return Matrix.model_validate(fields | more)


def support_of(matrix: Matrix, **gpus: Gpu) -> SupportMatrix:
    return SupportMatrix(matrix, True, gpus)


def cell_of(*histories: list[CellOutcome | None]):
    [row] = support_of(matrix_of(*histories)).rows
    return row.cells["sm_90"]


def shown(*histories: list[CellOutcome | None]) -> str:
    cell = cell_of(*histories)
    return " ".join(filter(None, [cell.now.state.sign + cell.newest.marks, cell.word, cell.since, *cell.earlier]))


@pytest.fixture(scope="module")
def shipped() -> Matrix:
    return read_matrix(SHIPPED)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a report on a GPU."""
    folder = tmp_path_factory.mktemp("support")
    sample.write(folder / "results", [sample.record(sample.case("x"), speedup=2.0, machine=sample.GPU,
                                                    build=sample.GPU_BUILD)])
    assert build_site(folder / "results", folder / "site").troubles == []
    return folder / "site"


# ---- cells ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("history", "says"), [
    ([OK, OK, OK, OK], "✓"), ([UNKNOWN, UNKNOWN, OK, OK], "✓ since 3.2"),
    ([REFUSED, REFUSED, REFUSED, OK], "✓ since 3.3.1"), ([REFUSED] * 4, "– never"),
    ([WRONG, WRONG, REFUSED, REFUSED], "– never 3.0–3.1 wrong"), ([OK, OK, REFUSED, REFUSED], "– until 3.1"),
    ([REFUSED, WRONG, WRONG, WRONG], "✗ wrong since 3.1"), ([CRASH, CRASH, CRASH, OK], "✓ since 3.3.1 3.0–3.2 crash"),
    ([None, OK, OK, OK], "✓")
])
def test_a_cell_says_what_holds_since_when_and_what_was_broken_before(history, says) -> None:
    assert shown(history) == says


def test_what_only_compiles_is_not_shown_as_checked() -> None:
    assert shown([OK] * 4) == "✓"
    assert shown([COMPILES] * 4) == "✓°"
    assert shown([OK] * 4, [COMPILES] * 4) == "✓°"
    assert "1 of 2 ok only compiled, not checked" in cell_of([OK] * 4, [COMPILES] * 4).title


def test_a_product_that_is_not_one_kernel_is_flagged_and_a_change_of_that_is_a_change() -> None:
    unfused = COMPILES.model_copy(update={"flags": ("unfused",)})
    assert shown([unfused] * 4) == "✓°⚑" and shown([REFUSED, REFUSED, REFUSED, unfused]).startswith("✓°⚑")
    assert cell_of([COMPILES, COMPILES, unfused, unfused]).changed == ("3.2.0",)
    assert cell_of([unfused] * 4, [OK] * 4).title.endswith("1 of 2 ok unfused")


def test_what_some_of_the_options_do_is_not_called_all_of_it() -> None:
    assert shown([OK] * 4, [REFUSED] * 4) == "◐ 1 of 2"
    assert shown([OK] * 4, [WRONG] * 4) == "✗ 1 of 2 wrong"
    assert shown([WRONG] * 4, [WRONG] * 4) == "✗ wrong"


def test_a_build_that_was_not_asked_is_not_spoken_for() -> None:
    assert cell_of([OK, OK, None, None]).tested_to == "3.1.0" and "builds after 3.1.0 were not tested" in cell_of(
        [OK, OK, None, None]).title
    assert cell_of([None, None, OK, OK]).tested_to == ""
    builds = [TritonBuild(triton="3.0.0"), TritonBuild(triton="3.1.0", unusable="no wheel")]
    [row] = support_of(matrix_of([OK, None], builds=builds)).rows
    assert row.cells["sm_90"].tested_to == "", "what could not be asked of anything is no gap of this cell"


def test_no_wrong_build_is_left_out_of_a_long_history() -> None:
    version = tuple(f"3.{minor}.0" for minor in range(10))
    [row] = support_of(matrix_of([WRONG, CRASH, OK, CRASH, OK, CRASH, OK, CRASH, OK, OK], versions=version)).rows
    assert row.cells["sm_90"].earlier == ["3.7 crash", "3.5 crash", "3.0 wrong", "…"]


def test_that_a_build_learns_of_an_architecture_is_no_change_of_what_it_does() -> None:
    assert cell_of([UNKNOWN, UNKNOWN, OK, OK]).changed == ()
    assert cell_of([REFUSED, REFUSED, OK, CRASH]).changed == ("3.2.0", "3.3.1")
    assert cell_of([OK] * 4, [OK, OK, REFUSED, REFUSED]).changed == ("3.2.0",), "a change of one of the options is one"


# ---- silent wrongness -----------------------------------------------------------------------------------------------

def test_the_gibberish_that_this_suite_began_with_is_a_sentence(shipped) -> None:
    assert any(miscompile.message() == (
        "decode and fused dequantize + dot (8 of 10 kernels) of e4m3fnuz: every normal code decodes to twice its "
        "value: read with bias 7, the format's is 8 (as e4m3fn): sm_89, sm_90 with Triton 3.0.0 to 3.1.0.")
        for miscompile in support_of(shipped).miscompiles)


def test_a_mistake_that_came_back_is_said_with_both_ranges_and_one_that_lasts_as_lasting() -> None:
    assert support_of(matrix_of([WRONG, REFUSED, WRONG,
                                 REFUSED])).miscompiles[0].message().endswith(": sm_90 with Triton 3.0.0 and 3.2.0.")
    assert support_of(matrix_of([REFUSED, WRONG, WRONG,
                                 WRONG])).miscompiles[0].message().endswith(": sm_90 with Triton 3.1.0 and later.")


def test_a_mistake_of_one_kernel_is_not_told_of_the_others() -> None:
    assert support_of(matrix_of([WRONG] * 4, [OK] * 4)).miscompiles[0].message().startswith(
        "decode (bf16) of e4m3fnuz: ")
    assert support_of(matrix_of([WRONG] * 4, [WRONG] * 4)).miscompiles[0].message().startswith("decode of e4m3fnuz: ")


def test_formats_taken_for_another_come_before_roundings_and_what_lasts_before_what_is_over(shipped) -> None:
    miscompiles = support_of(shipped).miscompiles
    misread = [miscompile.kind is Kind.FNUZ_AS_FN for miscompile in miscompiles]
    assert misread == sorted(misread, reverse=True) and any(misread) and not all(misread)
    lasting = [miscompile.lasts for miscompile in miscompiles if miscompile.kind is not Kind.FNUZ_AS_FN]
    assert lasting == sorted(lasting, reverse=True)


def test_on_my_gpu_what_my_triton_does_comes_first(shipped) -> None:
    support = support_of(shipped, sm_90=Gpu("NVIDIA H100", "3.8.0"))
    miscompiles = support.miscompiles_on("sm_90")
    made = [miscompile.made_by("3.8.0", "sm_90") for miscompile in miscompiles]
    assert made == sorted(made, reverse=True) and {True, False} == set(made)
    assert all("sm_89" not in miscompile.message("sm_90") for miscompile in miscompiles)


def test_the_overview_of_a_gpu_speaks_of_that_gpu(site: Path) -> None:
    text = " ".join(Page((site / "index.html").read_text()).text.split())
    assert f"miscompiled for this report's GPU, {sample.GPU.arch} ({sample.GPU.device})" in text
    assert "gfx1201" not in text


def test_the_overview_without_a_gpu_or_any_record_tells_the_worst_anywhere(tmp_path: Path) -> None:
    text = " ".join(Page(build_site(tmp_path, tmp_path / "site").index.read_text()).text.split())
    assert "There are no records yet" in text and "Compiled for 12 GPU architectures" in text
    assert "goes through an instruction for e4m3fn, and nothing makes up for it" in text


# ---- which matrix ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("generated", "own"), [
    (NEWER, True), (NEWER.replace(tzinfo=None), True), (datetime(2020, 1, 1, tzinfo=UTC), False),
])
def test_the_newer_of_the_two_matrices_is_shown(tmp_path: Path, generated: datetime, own: bool) -> None:
    matrix_of([OK] * 4, generated=generated).write(tmp_path / "targets.json")
    matrix, file, broken = chosen_matrix(tmp_path)
    assert (file.parent == tmp_path, len(matrix.builds) == 4, broken) == (own, own, [])


@pytest.mark.parametrize(("content", "says"), [
    ("{", "is not a matrix of targets"), ('{"schema": 99}', "newer fpxbench"), (None, "has no usable build"),
])
def test_a_file_that_is_no_matrix_is_said_and_the_packages_is_shown(tmp_path: Path, content: str | None,
                                                                    says: str) -> None:
    file = tmp_path / "targets.json"
    if content is None:
        matrix_of([OK], versions=("3.0.0",), builds=[TritonBuild(triton="3.0.0", unusable="no wheel")]).write(file)
    else:
        file.write_text(content)
    matrix, chosen, [broken] = chosen_matrix(tmp_path)
    assert chosen == SHIPPED and len(matrix.builds) > 1 and broken.path == file and says in broken.reason


def test_the_page_names_machine_date_and_builds_and_hands_the_matrix_on(site: Path, shipped) -> None:
    text = Page((site / "support" / "index.html").read_text()).text
    assert all(word in text for word in (shipped.machine.processor, f"{shipped.generated:%Y-%m-%d}", "3.0.0 to 3.9.0"))
    assert "ld.lld-19 (instead of ROCm's)" in text
    assert (site / "support" / "targets.json").read_bytes() == SHIPPED.read_bytes()


# ---- a row in full --------------------------------------------------------------------------------------------------

def test_a_script_on_the_page_is_the_one_that_the_command_prints(shipped) -> None:
    support = support_of(shipped)
    row = next(row for row in support.rows if row.page == "decode-e4m3fnuz.html")
    found, scripts = row_detail(support, row)
    [entry] = [entry for on in found if on.architecture.name == "sm_90"
               for entry in on.entries if entry.outcome.status is Status.WRONG]
    assert entry.builds == "3.0.0 to 3.1.0" and entry.every
    [question] = probes_like([entry.probes[0].id])
    version, told = newest_failure(shipped, question.id, "sm_90", "3.1.0")
    assert version == "3.1.0" and told.startswith(
        f"with 3.1.0, and from 3.0.0 on: wrong (fnuz_as_fn): {entry.outcome.cause}\n")
    assert scripts.text(entry.script) == script(question, ARCHITECTURES["sm_90"], version, told)
    assert '#   pip install "triton==3.1.0"' in scripts.text(entry.script)


def test_a_script_for_what_is_silently_wrong_begins_with_the_codes_and_what_they_should_be(shipped) -> None:
    version, told = newest_failure(shipped, "decode/e5m2/bf16", "sm_90")
    [question] = probes_like(["decode/e5m2/bf16"])
    head, _, _ = script(question, ARCHITECTURES["sm_90"], version, told).partition("import")
    assert f'pip install "triton=={shipped.builds[-1].triton}"' in head and "wrong (nan_code_lost)" in head
    assert "0x7c 0.11111.00 to 65536 instead of inf" in head
    assert newest_failure(shipped, "decode/e5m2/fp16", "sm_90") == ("", ""), "of what is right there is nothing to tell"


def test_whatever_is_refused_or_broken_can_be_shown_again(shipped) -> None:
    support = support_of(shipped)
    for row in support.rows:
        found, scripts = row_detail(support, row)
        for entry in (entry for on in found for entry in on.entries):
            assert (entry.script is not None) == (entry.shows_something
                                                  and row.operation.name != "triton_fused"), (row.page, entry)
        for number in range(len(scripts.scripts)):
            compile(scripts.text(number), row.page, "exec")


def test_scripts_share_their_parts() -> None:
    scripts = Scripts()
    for number in range(100):
        scripts.add(f"# {number}\n\n" + "the same\n\n" * 50)
    assert len(scripts.parts) == 102 and scripts.text(7) == "# 7\n\n" + "the same\n\n" * 50


@pytest.mark.parametrize("version", ["3.0.0\nimport os", '3.0.0"; rm -rf', "3.0.0\r__import__('os')"])
def test_a_version_that_is_none_never_becomes_part_of_a_program(version: str) -> None:
    support = support_of(matrix_of([CRASH], versions=(version,)))
    [on], scripts = row_detail(support, support.rows[0])
    assert on.entries[0].script is None and scripts.scripts == []


def test_a_cause_from_elsewhere_stays_a_comment_of_the_script() -> None:
    cause = "boom\nimport os\r\x0cos.system('x')\x85\u2028os.abort()"
    support = support_of(matrix_of([CRASH.model_copy(update={"cause": cause})], versions=("3.0.0",)))
    [on], scripts = row_detail(support, support.rows[0])
    told = scripts.text(on.entries[0].script)
    assert "boom" in told and not re.search(r"^\s*(import os|os\.)", told, re.MULTILINE)
    compile(told, "script", "exec")


# ---- builds ---------------------------------------------------------------------------------------------------------

def test_each_build_is_held_against_the_one_before_that_could_be_asked() -> None:
    builds = [TritonBuild(triton="3.0.0"), TritonBuild(triton="3.1.0", unusable="no wheel"),
              TritonBuild(triton="3.2.0"), TritonBuild(triton="3.3.1")]
    found = build_diffs(support_of(matrix_of([OK, None, CRASH, OK], builds=builds)))
    assert [(step.before, step.cells("lost"), step.cells("gained"))
            for step in found] == [("", 0, 0), ("", 0, 0), ("3.0.0", 1, 0), ("3.2.0", 0, 1)]


# ---- pages ----------------------------------------------------------------------------------------------------------

def test_pages_stay_small_enough_to_open_at_once(site: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in (site / "support").glob("*.html")}
    assert sizes.pop("index.html") < 400_000
    assert max(sizes.values()) < 250_000


def test_rows_whose_names_make_the_same_file_get_pages_of_their_own() -> None:
    probes = [Probe(id=f"decode/{name}/x", operation="decode", format=name,
                    cells={"sm_90": [Run(builds=(0, 0), outcome=0)]})
              for name in ("a×b", "a/b", "A B", "../../x", "")]
    pages = [row.page for row in support_of(matrix_of(probes=probes, outcomes=[OK])).rows]
    assert len(set(pages)) == len(pages) and not any("/" in page for page in pages)


def test_nothing_in_a_matrix_becomes_markup(tmp_path: Path) -> None:
    hostile = CellOutcome(status=Status.WRONG, cause=PAYLOAD, message=PAYLOAD, signal=PAYLOAD, check="table")
    matrix = matrix_of(
        machine=CompilingMachine(system=PAYLOAD, processor=PAYLOAD, cores=1), versions=("3.0.0", PAYLOAD),
        builds=[TritonBuild(triton=name, linker=PAYLOAD, python=PAYLOAD) for name in ("3.0.0", PAYLOAD)],
        architectures=[Architecture(name=PAYLOAD, generation=PAYLOAD, cards=PAYLOAD)],
        operations=[OperationSummary(name=PAYLOAD, title=PAYLOAD, about=PAYLOAD)], outcomes=[hostile, OK],
        probes=[Probe(id=PAYLOAD, operation=PAYLOAD, format=PAYLOAD,
                      cells={PAYLOAD: [Run(builds=(0, 0), outcome=1), Run(builds=(1, 1), outcome=0)]})],
    )
    matrix.write(tmp_path / "targets.json")
    build_site(tmp_path, tmp_path / "site")
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(list((tmp_path / "site" / "support").glob("*.html"))) == 3
    for path in pages:
        page = Page(path.read_text())
        assert not page.handlers and all(script.get("src") or script.get("type") == "application/json"
                                         for script in page.scripts), path
        assert "alert(1)" not in "".join(page.loads), path
    assert "<script>alert(1)</script>" in Page((tmp_path / "site" / "support" / "index.html").read_text()).text


# ---- in a browser ---------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def rendered(url: str, profile: Path) -> str:
    """Return the page as the browser has it once its scripts have run."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
               "--no-first-run", "--window-size=1400,1000",
               f"--user-data-dir={profile}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def rows_shown(dom: str) -> list[str]:
    rows = re.findall(r'<tr ([^>]*)><th scope="row"><a [^>]*>([^<]*)', dom)
    return [html.unescape(name) for attributes, name in rows if "hidden" not in attributes]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_the_address_filters_the_table(site: Path, shipped, tmp_path: Path) -> None:
    page = (site / "support" / "index.html").as_uri()
    support = support_of(shipped)
    wrong = [row.format for row in support.rows if "sm_90" in row.cells and row.cells["sm_90"].wrong]
    changed = [row.format for row in support.rows if any("3.8.0" in cell.changed for cell in row.cells.values())]
    dom = rendered(f"{page}#arch=sm_90&wrong=1", tmp_path)
    assert rows_shown(dom) == wrong and f"{len(wrong)} of {len(support.rows)} rows" in dom
    assert re.search(r'<th [^>]*data-arch="sm_89"[^>]*hidden',
                     dom) and not re.search(r'<th [^>]*data-arch="sm_90"[^>]*hidden', dom)
    assert rows_shown(rendered(f"{page}#changed=3.8.0", tmp_path)) == changed
    assert 0 < len(wrong) < len(support.rows) and 0 < len(changed) < len(support.rows)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_script_appears_whole_when_it_is_opened(site: Path, shipped, tmp_path: Path) -> None:
    row = next(row for row in support_of(shipped).rows if row.page == "decode-e4m3fnuz.html")
    _, scripts = row_detail(support_of(shipped), row)
    copy = shutil.copytree(site, tmp_path / "site") / "support"
    (copy / "click.js").write_text('document.querySelector("[data-script] summary").click();')
    (copy / row.page).write_text((copy / row.page).read_text().replace("</head>",
                                                                       '<script defer src="click.js"></script></head>'))
    dom = rendered((copy / row.page).as_uri(), tmp_path / "profile")
    assert html.unescape(re.search(r'<pre id="script-0">(.*?)</pre>', dom, re.DOTALL)[1]) == scripts.text(0)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("filters", ["", "#arch=nvidia"])
def test_all_architectures_fit_beside_each_other_at_1400_pixels(site: Path, tmp_path: Path, filters: str) -> None:
    page = shutil.copytree(site, tmp_path / "site") / "support" / "index.html"
    (page.parent / "measure.js").write_text(
        'const box = document.getElementById("support").parentElement; '
        "document.title = `${document.documentElement.clientWidth} ${box.scrollWidth} ${box.clientWidth}`;")
    page.write_text(page.read_text().replace("</head>", '<script defer src="measure.js"></script></head>'))
    dom = rendered(page.as_uri() + filters, tmp_path / "profile")
    window, content, box = map(int, re.search(r"<title>(\d+) (\d+) (\d+)", dom).groups())
    assert window <= 1400 and content <= box

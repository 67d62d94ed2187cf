"""Turns a results folder into a static site that opens from ``file://``.

One records file is read, rendered and dropped before the next, so that memory holds one machine and build at a time;
of each only its small rows are kept, and only of the newest build of each machine. Of older builds no record is read: what
changed since is told from the digest of all (`fpxbench.reports.history.chapter`).
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from plotly.offline import get_plotlyjs

from fpxbench.builds.timeline import Timeline
from fpxbench.casts.cast_record import CastRecord
from fpxbench.records.store import BrokenLine, Store, latest
from fpxbench.reports.casts.conversion_pages import (
    Judged,
    Since,
    findings_on,
    judged_of,
    matrix_of,
    since_earlier,
    worth_pages,
)
from fpxbench.reports.history.chapter import BUILDS_IN_FULL, OverTime
from fpxbench.reports.history.status_history import Standings
from fpxbench.reports.pages import Pages, static_files, write_page
from fpxbench.reports.sweep import problems as findings
from fpxbench.reports.sweep.problems import Finding
from fpxbench.reports.sweep.table import Heading, Sweep, sweep_of
from fpxbench.reports.targets.support_build import steps
from fpxbench.reports.targets.support_row import row_in_full
from fpxbench.reports.targets.support_table import FILE as MATRIX_FILE, INDEX as SUPPORT, Gpu, Support, chosen_matrix

_PLOTLY = "plotly.min.js"


@dataclass(frozen=True)
class SiteSummary:
    """What was built, and the worst of it.

    index : the page to open
    findings : of the newest build of each machine, worst first; links are relative to the site's folder
    broken_lines : lines of the results that are no records
    troubles : what else is to be known of the records, in sentences
    empty : there is no record in the results
    """

    index: Path
    findings: list[Finding]
    broken_lines: list[BrokenLine]
    troubles: list[str]
    empty: bool


def build_site(results: Path, output: Path, timeline: Timeline | None = None, builds: int = BUILDS_IN_FULL,
               say: Callable[[str], None] = lambda line: None) -> SiteSummary:
    """Write the site of the records under `results` to the folder `output`.

    `timeline` knows the builds' dates; without it they are ordered by what their records say. The newest `builds` of each machine,
    channel and variant have a page for every case, older ones only what they changed. Pages of an earlier report are replaced. The
    same records give the same bytes. Without any record the first page says what to do. `say` is told what is being done: the first
    report over years takes a while. Raises NotADirectoryError if `output` is a file, and TimelineError as `timeline` does.
    """
    results, output = Path(results), Path(output)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; give a folder for the report")
    store, pages = Store(results), Pages()
    over_time = OverTime(results, timeline, pages, output, builds, say)   # reads the timeline: before an earlier report is gone
    _clear(output)
    _write_assets(output / "assets")
    sweep_files = store.files()
    numerics = Store(results, CastRecord)
    brief, broken_lines = _judged(numerics, builds)
    newest: dict[tuple[str, str, str], Sweep] = {}
    by_machine: dict[str, list[Heading]] = defaultdict(list)
    for paths, standings in over_time.machines(sweep_files):
        for path in paths:
            say(f"{path.parent.parent.name}: {path.stem}")
            sweep, broken = _write_sweep(store, path, output, pages, brief.get(_folder(path), (None, None))[0], standings)
            broken_lines += broken
            if sweep is None:
                continue
            rival = newest.get(sweep.series)
            if rival is None or sweep.age >= rival.age:
                newest[sweep.series] = sweep
            by_machine[sweep.folder[0]].append(sweep.heading())
    judged = _write_numerics(numerics, brief, output, pages, {sweep.folder for sweeps in by_machine.values() for sweep in sweeps})
    newest_judged: dict[tuple[str, str], tuple[Judged, Since | None]] = {}
    for one, since in sorted(judged.values(), key=lambda pair: _newest_first(pair[0])):
        newest_judged[one.folder[0], one.build.channel] = one, since
    for machine in {folder[0] for folder in judged} | set(by_machine):
        sweeps = sorted(by_machine[machine], key=_newest_first, reverse=True)
        of_machine = [pair for folder, pair in judged.items() if folder[0] == machine]
        of_machine.sort(key=lambda pair: _newest_first(pair[0]), reverse=True)
        write_page(output / "machines" / machine / "index.html", pages.machine(sweeps, of_machine, over_time.older[machine]))

    shown = sorted(newest.values(), key=_gpu_first)
    casts = sorted(newest_judged.values(), key=lambda pair: _gpu_first(pair[0]))
    troubles = over_time.write_rest(judged.values(), set(map(str, broken_lines)))
    broken_cases = {(sweep.folder[0], row.case.id) for sweep in shown for row in sweep.rows if row.broken}
    found = [*findings.find(shown), *over_time.findings(broken_cases), *findings_on(casts)]
    found.sort(key=lambda finding: finding.rank)
    older = sum(map(len, by_machine.values())) + over_time.older.total() - len(shown)
    support, unreadable = _write_support(results, output, pages, [*shown, *(one for one, _ in casts)])
    broken_lines += unreadable
    write_page(output / "about.html", pages.about())
    write_page(output / "index.html", pages.overview(shown, found, broken_lines, older, [one for one, _ in casts], support))
    return SiteSummary(output / "index.html", found, broken_lines, troubles, empty=not (shown or casts))


def _folder(path: Path) -> tuple[str, str]:
    """Machine and build of a records file, by the names of its folder and itself: whatever the records in it say of themselves."""
    return path.parent.parent.name, path.stem


def _newest_first(heading: Heading) -> tuple:
    return heading.age, heading.folder


def _gpu_first(heading: Heading) -> tuple:
    return heading.machine.kind == "cpu", heading.folder


def _judged(store: Store[CastRecord], builds: int) -> tuple[dict[tuple[str, str], tuple[Judged, Since | None]], list[BrokenLine]]:
    """In brief, the conversions of every build that gets pages, with what changed since the build before it. Of the others no more is
    held than one machine's at a time.
    """
    judged: dict[tuple[str, str], tuple[Judged, Since | None]] = {}
    broken_lines: list[BrokenLine] = []
    for _, paths in groupby(store.files(), lambda path: path.parent.parent):
        of_machine: list[Judged] = []
        for path in paths:
            records, broken = _newest_records(store, path)
            broken_lines += broken
            if records:
                of_machine.append(judged_of(_folder(path), records).brief())
        since = since_earlier(of_machine)
        shown = worth_pages(of_machine, since, builds)
        judged |= {one.folder: (one, since.get(one.folder)) for one in of_machine if one.folder in shown}
    return judged, broken_lines


def _write_numerics(store: Store[CastRecord], judged: dict[tuple[str, str], tuple[Judged, Since | None]], output: Path, pages: Pages,
                    swept: set[tuple[str, str]]) -> dict[tuple[str, str], tuple[Judged, Since | None]]:
    """The pages of the conversions of each build in `judged`, which is returned in full: their records are read once more, and none are
    held meanwhile but those of mistakes."""
    full = {}
    for path in store.files():
        if _folder(path) not in judged:
            continue
        records, since = _newest_records(store, path)[0], judged[_folder(path)][1]
        one, matrix = judged_of(_folder(path), records), matrix_of(records)
        full[one.folder] = one, since
        folder = output / "machines" / one.folder[0] / one.folder[1]
        write_page(folder / "numerics.html", pages.numerics(one, since, matrix, one.folder in swept))
        for row in matrix.rows:
            write_page(folder / row.page, pages.conversion(one, row))
    return full


def _newest_records(store: Store, path: Path) -> tuple[list, list[BrokenLine]]:
    """The newest record of each case or conversion in a file, whatever machine and build they name, and its broken lines."""
    records, broken = store.read(path)
    return list({record.id: record for record in latest(records)}.values()), broken


def _write_sweep(store: Store, path: Path, output: Path, pages: Pages, judged: Judged | None, standings: Standings,
                 ) -> tuple[Sweep | None, list[BrokenLine]]:
    """The pages of one records file; no sweep if it holds no record."""
    newest, broken = _newest_records(store, path)
    if not newest:
        return None, broken
    sweep = sweep_of(_folder(path), newest, standings.of)
    folder = output / "machines" / sweep.folder[0] / sweep.folder[1]
    write_page(folder / "index.html", pages.sweep(sweep, findings.find([sweep]), judged, standings.tag(newest[-1])))
    for row, record in zip(sweep.rows, newest, strict=True):
        write_page(folder / row.page, pages.case(sweep, row, record))
    return sweep, broken


def _write_support(results: Path, output: Path, pages: Pages, headings: list[Heading]) -> tuple[Support, list[BrokenLine]]:
    """The pages of the newest matrix of targets; and the file of the results folder, if it should hold one and does not."""
    matrix, file, unreadable = chosen_matrix(results)
    of_gpus = sorted((heading for heading in headings if heading.machine.kind != "cpu"), key=lambda heading: heading.age)
    gpus = {heading.machine.arch: Gpu(heading.machine.device, heading.build.triton or "") for heading in of_gpus}
    support = Support(matrix, file.parent != results, gpus)
    folder, history = (output / SUPPORT).parent, steps(support)
    write_page(output / SUPPORT, pages.support(support, history))
    shutil.copyfile(file, folder / MATRIX_FILE)
    for row in support.rows:
        write_page(folder / row.page, pages.support_row(support, row, *row_in_full(support, row)))
    for step in history:
        if step.page:
            write_page(folder / step.page, pages.support_build(support, step))
    return support, unreadable


def _clear(output: Path) -> None:
    """Remove the pages of an earlier report: cases that are gone must not look current. Nothing else is touched."""
    for folder in (output / "machines", output / "builds"):
        if (output / "assets" / _PLOTLY).is_file() and folder.is_dir():
            shutil.rmtree(folder)
    if (output / "assets" / _PLOTLY).is_file() and (output / SUPPORT).is_file():
        shutil.rmtree((output / SUPPORT).parent)


def _write_assets(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in static_files().items():
        (folder / name).write_bytes(content)
    (folder / _PLOTLY).write_text(get_plotlyjs(), encoding="utf-8")

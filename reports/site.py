"""Turn a results folder into a static site that opens from ``file://``.

Records files are read, rendered and dropped one by one, so that memory holds one machine and build at a time; only the
small rows of each machine's newest build are kept. Records of older builds are not read: their changes come from the
series index (`fpxbench.reports.history.chapter`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from plotly.offline import get_plotlyjs

from fpxbench.builds.timeline import Timeline
from fpxbench.casts.cast_record import CastRecord
from fpxbench.checkpoint.stored_reports import read_reports
from fpxbench.records.record import Record
from fpxbench.records.store import BrokenLine, Store, folder_of
from fpxbench.reports.casts.cast_index import brief_sweeps
from fpxbench.reports.casts.conversion_pages import (
    CastChanges,
    CastSweep,
    builds_with_pages,
    cast_changes,
    cast_problems,
    cast_sweep_of,
    conversion_matrix,
)
from fpxbench.reports.checkpoint.checkpoint_page import CheckpointPage, checkpoint_page
from fpxbench.reports.history.chapter import BUILDS_IN_FULL, HistoryChapter
from fpxbench.reports.history.feed import FILE as FEED, feed
from fpxbench.reports.kept_pages import KeptPages, content_of, digest
from fpxbench.reports.machine_pages import MachineTask, write_machines
from fpxbench.reports.model.generation_table import model_problems
from fpxbench.reports.model.model_chapter import ModelChapter, write_models
from fpxbench.reports.pages import FOLDERS, Pages
from fpxbench.reports.static_files import static_files
from fpxbench.reports.sweep.device_spread_table import newest_spread
from fpxbench.reports.sweep.problems import ReportProblem, find_problems
from fpxbench.reports.sweep.sweep_table import SweepHeading, SweepTable
from fpxbench.reports.targets.support_build import build_diffs
from fpxbench.reports.targets.support_row import row_detail
from fpxbench.reports.targets.support_table import (
    FILE as MATRIX_FILE,
    INDEX as SUPPORT,
    Gpu,
    SupportMatrix,
    chosen_matrix,
)
from fpxbench.whole_file import write_whole

_PLOTLY = "plotly.min.js"
_Casts = dict[tuple[str, str], tuple[CastSweep, CastChanges | None]]
"""Cast sweeps with their changes since the build before, by the names of their machine's folder and their file."""


@dataclass(frozen=True)
class SiteSummary:
    """The built site, and its worst findings.

    index : the page to open
    choices : a message for each machine about the recommended schemes
    problems : problems of the newest build of each machine, worst first; links are relative to the site's folder
    broken_lines : lines of the results that are not records
    troubles : other messages about the records
    empty : whether the results hold no record
    """

    index: Path
    choices: list[str]
    problems: list[ReportProblem]
    broken_lines: list[BrokenLine]
    troubles: list[str]
    empty: bool


def build_site(results: Path, output: Path, timeline: Timeline | None = None, builds: int = BUILDS_IN_FULL,
               say: Callable[[str], None] = lambda line: None, jobs: int = 1) -> SiteSummary:
    """Write the site of the records under `results` to the folder `output`.

    Without `timeline` builds are ordered by the dates in their records. The newest `builds` of each machine, channel
    and variant have a page for every case; older ones show only their changes. The same records give the same bytes.
    Pages of an earlier report are replaced atomically, each after the pages that it links to, and unlinked pages are
    removed last, so that links never break. Without records the first page says how to make some. `say` receives
    progress messages; `jobs` processes write machines in parallel. Raise NotADirectoryError if `output` is a file, and
    TimelineError if `timeline` cannot be read."""
    results, output = Path(results), Path(output)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; give a folder for the report")
    store: Store[Record] = Store(results)
    pages = Pages(output)
    chapter = HistoryChapter(results, timeline, pages, builds)      # reads the timeline before anything is written
    kept = KeptPages(output, from_report=(output / "assets" / _PLOTLY).is_file())
    _write_assets(output / "assets")
    numerics = Store(results, CastRecord)
    brief, broken_lines, messages = _read_casts(numerics, builds)
    newest: dict[tuple[str, str, str], SweepTable] = {}
    by_machine: dict[str, list[SweepHeading]] = defaultdict(list)
    machines = [MachineTask(name, list(paths), {folder: one for folder, (one, _) in brief.items() if folder[0] == name},
                            chapter.inputs, output, kept.from_report)
                for name, paths in groupby(store.files(), lambda path: path.parent.parent.name)]
    for machine in write_machines(machines, jobs, say):
        chapter.add(machine.name, machine.history)
        broken_lines += machine.broken
        newest |= {sweep.series: sweep for sweep in machine.newest}
        if machine.sweeps:
            by_machine[machine.name] = machine.sweeps
        pages.failures += machine.failures
        pages.written |= machine.written
        kept.kept |= machine.kept
    casts = _write_casts(numerics, brief, pages, kept,
                         {sweep.folder for sweeps in by_machine.values() for sweep in sweeps})
    with_page = set(by_machine) | {name for name, _ in casts}
    models = write_models(results, pages, with_page)
    broken_lines += _write_machines(results, by_machine, casts, chapter.older, models, pages)
    broken_lines += models.broken_lines

    checkpoints, broken = _write_checkpoints(results, pages)
    broken_lines += broken

    shown = sorted(newest.values(), key=_gpu_first)
    newest_casts = _newest_casts(casts)
    troubles = chapter.write_rest(casts.values(), set(map(str, broken_lines)))
    broken_cases = {(sweep.folder[0], row.case.id) for sweep in shown for row in sweep.rows if row.broken}
    problems = [*find_problems(shown), *chapter.problems(broken_cases), *cast_problems(newest_casts),
                *model_problems(models.models)]
    problems.sort(key=lambda problem: problem.rank)
    older = sum(map(len, by_machine.values())) + chapter.older.total() - len(shown)
    support, unreadable = _write_support(results, output, pages, [*shown, *(sweep for sweep, _ in newest_casts)])
    broken_lines += unreadable
    pages.write("about.html", pages.about)
    write_whole(output / FEED, feed(results))
    pages.write("index.html", pages.overview, shown, problems, broken_lines, older,
                [sweep for sweep, _ in newest_casts], support, models, checkpoints)
    kept.remove_others({*pages.written, (output / SUPPORT).with_name(MATRIX_FILE)}, FOLDERS)
    return SiteSummary(output / "index.html", [message for sweep in shown if (message := sweep.choice_message)],
                       problems, broken_lines, [*messages, *troubles, *pages.failures],
                       empty=not (shown or newest_casts or checkpoints) and models.empty)


def _newest_first(heading: SweepHeading) -> tuple:
    return heading.age, heading.folder


def _gpu_first(heading: SweepHeading) -> tuple:
    return heading.machine.kind == "cpu", heading.folder


def _newest_casts(casts: _Casts) -> list[tuple[CastSweep, CastChanges | None]]:
    """Return the newest cast sweep of each machine and channel, GPUs first."""
    newest: dict[tuple[str, str], tuple[CastSweep, CastChanges | None]] = {}
    for sweep, changes in sorted(casts.values(), key=lambda pair: _newest_first(pair[0])):
        newest[sweep.folder[0], sweep.build.channel] = sweep, changes
    return sorted(newest.values(), key=lambda pair: _gpu_first(pair[0]))


def _read_casts(store: Store[CastRecord], builds: int) -> tuple[_Casts, list[BrokenLine], list[str]]:
    """Return, in brief, the cast sweeps of every build that gets pages; broken lines; and other messages. The sweeps of
    other builds are in memory for one machine at a time."""
    casts: _Casts = {}
    broken_lines: list[BrokenLine] = []
    messages: list[str] = []
    for folder, paths in groupby(store.files(), lambda path: path.parent.parent):
        of_machine, broken, troubles = brief_sweeps(store, folder.name, list(paths))
        broken_lines += broken
        messages += troubles
        changes = cast_changes(of_machine)
        shown = builds_with_pages(of_machine, changes, builds)
        casts |= {one.folder: (replace(one, snapshots=()), changes.get(one.folder))
                  for one in of_machine if one.folder in shown}
    return casts, broken_lines, messages


def _write_casts(store: Store[CastRecord], brief: _Casts, pages: Pages, kept: KeptPages,
                 swept: set[tuple[str, str]]) -> _Casts:
    """Write the pages of the conversions of each build in `brief`, unless those of an earlier report are current.
    Return `brief`, with mistakes and disagreements for builds that were written and for the newest, which the first
    page shows. Only the records of these builds are read again, and only those of mistakes are kept."""
    full, newest = dict(brief), {sweep.folder for sweep, _ in _newest_casts(brief)}
    for path in store.files():
        place = folder_of(path)
        if place not in brief:
            continue
        changes, folder = brief[place][1], f"machines/{place[0]}/{place[1]}/"
        inputs = digest(content_of(path), changes, place in swept)
        made = kept.has(folder + "numerics", inputs)
        if made and place not in newest:
            continue
        records = store.read_newest(path)[0]
        sweep = cast_sweep_of(place, records)
        full[place] = sweep, changes
        if made:
            continue
        matrix, failures = conversion_matrix(records), len(pages.failures)
        for row in matrix.rows:
            pages.write(folder + row.page, pages.conversion, sweep, row)
        pages.write(folder + "numerics.html", pages.numerics, sweep, changes, matrix, place in swept)
        if len(pages.failures) == failures:
            kept.made(folder + "numerics", inputs,
                      [folder + "numerics.html", *(folder + row.page for row in matrix.rows)])
    return full


def _write_checkpoints(results: Path, pages: Pages) -> tuple[list[CheckpointPage], list[BrokenLine]]:
    """Write the page of each examined checkpoint; return the pages, and the files that are not examinations."""
    reports, broken = read_reports(results)
    found = [checkpoint_page(name, report) for name, report in reports]
    for page in found:
        pages.write(page.path, pages.checkpoint, page)
    return found, broken


def _write_machines(results: Path, by_machine: dict[str, list[SweepHeading]], casts: _Casts, older: dict[str, int],
                    models: ModelChapter, pages: Pages) -> list[BrokenLine]:
    """Write the page of each machine; return the broken lines of the comparisons of devices."""
    broken_lines: list[BrokenLine] = []
    for machine in {folder[0] for folder in casts} | set(by_machine):
        sweeps = sorted(by_machine.get(machine, ()), key=_newest_first, reverse=True)
        of_machine = sorted((pair for folder, pair in casts.items() if folder[0] == machine),
                            key=lambda pair: _newest_first(pair[0]), reverse=True)
        spread, broken = newest_spread(results, machine, [sweep.folder[1] for sweep in sweeps])
        broken_lines += broken
        pages.write(f"machines/{machine}/index.html", pages.machine, sweeps, of_machine, older[machine],
                    models.of(machine), spread)
    return broken_lines


def _write_support(results: Path, output: Path, pages: Pages,
                   headings: list[SweepHeading]) -> tuple[SupportMatrix, list[BrokenLine]]:
    """Write the pages of the newest support matrix; return the results folder's own file as a broken line if it cannot
    be read."""
    matrix, file, unreadable = chosen_matrix(results)
    of_gpus = sorted((heading for heading in headings if heading.machine.kind != "cpu"),
                     key=lambda heading: heading.age)
    gpus = {heading.machine.arch: Gpu(heading.machine.device, heading.build.triton or "") for heading in of_gpus}
    support = SupportMatrix(matrix, file.parent != results, gpus)
    diffs, folder = build_diffs(support), SUPPORT.rpartition("/")[0]
    for row in support.rows:
        pages.write(f"{folder}/{row.page}", pages.support_row, support, row, *row_detail(support, row))
    for diff in diffs:
        if diff.page:
            pages.write(f"{folder}/{diff.page}", pages.support_build, support, diff)
    pages.write(SUPPORT, pages.support, support, diffs)
    write_whole(output / folder / MATRIX_FILE, file.read_bytes())
    return support, unreadable


def _write_assets(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (static_files() | {_PLOTLY: get_plotlyjs().encode()}).items():
        write_whole(folder / name, content)

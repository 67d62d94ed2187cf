"""Turns a results folder into a static site that opens from ``file://``.

One records file is read, rendered and dropped before the next, so that memory holds one machine and build at a time;
of each only its small rows are kept, and only of the newest build of each machine.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from plotly.offline import get_plotlyjs

from fpxbench.numerics.record import NumericsRecord
from fpxbench.reports import findings
from fpxbench.reports.findings import Finding
from fpxbench.reports.numerics import Judged, Since, findings_on, judged_of, matrix_of, since_earlier
from fpxbench.reports.pages import Pages, static_files
from fpxbench.reports.support import FILE as MATRIX_FILE, INDEX as SUPPORT, Gpu, Support, chosen_matrix
from fpxbench.reports.support_build import steps
from fpxbench.reports.support_row import row_in_full
from fpxbench.reports.sweep import Heading, Sweep, sweep_of
from fpxbench.store import BrokenLine, Store, latest

_PLOTLY = "plotly.min.js"


@dataclass(frozen=True)
class SiteSummary:
    """What was built, and the worst of it.

    index : the page to open
    findings : of the newest build of each machine, worst first; links are relative to the site's folder
    broken_lines : lines of the results that are no records
    """

    index: Path
    findings: list[Finding]
    broken_lines: list[BrokenLine]


def build_site(results: Path, output: Path) -> SiteSummary:
    """Write the site of the records under `results` to the folder `output`.

    Pages of an earlier report there are replaced. The same records give the same bytes. Without any record the site has
    one page, which says what to do. Raises NotADirectoryError if `output` is a file.
    """
    results, output = Path(results), Path(output)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; give a folder for the report")
    store, pages = Store(results), Pages()
    _clear(output)
    _write_assets(output / "assets")
    sweep_files = store.files()
    judged, broken_lines = _write_numerics(Store(results, NumericsRecord), output, pages, {_folder(path) for path in sweep_files})

    newest: dict[tuple[str, str, str], Sweep] = {}
    by_machine: dict[str, list[Heading]] = defaultdict(list)
    for path in sweep_files:
        sweep, broken = _write_sweep(store, path, output, pages, judged.get(_folder(path), (None, None))[0])
        broken_lines += broken
        if sweep is None:
            continue
        rival = newest.get(sweep.series)
        if rival is None or sweep.age >= rival.age:
            newest[sweep.series] = sweep
        by_machine[sweep.folder[0]].append(sweep.heading())
    newest_judged: dict[tuple[str, str], tuple[Judged, Since | None]] = {}
    for one, since in sorted(judged.values(), key=lambda pair: _newest_first(pair[0])):
        newest_judged[one.folder[0], one.build.channel] = one, since
    for machine in {folder[0] for folder in judged} | set(by_machine):
        sweeps = sorted(by_machine[machine], key=_newest_first, reverse=True)
        of_machine = [pair for folder, pair in judged.items() if folder[0] == machine]
        of_machine.sort(key=lambda pair: _newest_first(pair[0]), reverse=True)
        _write(output / "machines" / machine / "index.html", pages.machine(sweeps, of_machine))

    shown = sorted(newest.values(), key=_gpu_first)
    casts = sorted(newest_judged.values(), key=lambda pair: _gpu_first(pair[0]))
    found = sorted([*findings.find(shown), *(finding for pair in casts for finding in findings_on(*pair))], key=lambda finding: finding.rank)
    older = sum(map(len, by_machine.values())) - len(shown)
    support, unreadable = _write_support(results, output, pages, [*shown, *(one for one, _ in casts)])
    broken_lines += unreadable
    _write(output / "about.html", pages.about())
    _write(output / "index.html", pages.overview(shown, found, broken_lines, older, [one for one, _ in casts], support))
    return SiteSummary(output / "index.html", found, broken_lines)


def _folder(path: Path) -> tuple[str, str]:
    """Machine and build of a records file, by the names of its folder and itself: whatever the records in it say of themselves."""
    return path.parent.parent.name, path.stem


def _newest_first(heading: Heading) -> tuple:
    return heading.age, heading.folder


def _gpu_first(heading: Heading) -> tuple:
    return heading.machine.kind == "cpu", heading.folder


def _write_numerics(store: Store[NumericsRecord], output: Path, pages: Pages, swept: set[tuple[str, str]],
                    ) -> tuple[dict[tuple[str, str], tuple[Judged, Since | None]], list[BrokenLine]]:
    """The pages of every file of conversions; what is kept of each, with what changed since the build before it.

    Files are read twice: what changed is known once all are known, and none is held meanwhile.
    """
    judged: dict[tuple[str, str], Judged] = {}
    broken_lines: list[BrokenLine] = []
    for path in store.files():
        records, broken = _newest_records(store, path)
        broken_lines += broken
        if records:
            judged[_folder(path)] = judged_of(_folder(path), records)
    by_machine: dict[str, list[Judged]] = defaultdict(list)
    for one in judged.values():
        by_machine[one.folder[0]].append(one)
    since = {folder: change for builds in by_machine.values() for folder, change in since_earlier(builds).items()}
    for path in store.files():
        if (one := judged.get(_folder(path))) is None:
            continue
        matrix = matrix_of(_newest_records(store, path)[0])
        folder = output / "machines" / one.folder[0] / one.folder[1]
        _write(folder / "numerics.html", pages.numerics(one, since.get(one.folder), matrix, one.folder in swept))
        for row in matrix.rows:
            _write(folder / row.page, pages.conversion(one, row))
    return {folder: (one, since.get(folder)) for folder, one in judged.items()}, broken_lines


def _newest_records(store: Store, path: Path) -> tuple[list, list[BrokenLine]]:
    """The newest record of each case or conversion in a file, whatever machine and build they name, and its broken lines."""
    records, broken = store.read(path)
    return list({record.id: record for record in latest(records)}.values()), broken


def _write_sweep(store: Store, path: Path, output: Path, pages: Pages, judged: Judged | None) -> tuple[Sweep | None, list[BrokenLine]]:
    """The pages of one records file; no sweep if it holds no record."""
    newest, broken = _newest_records(store, path)
    if not newest:
        return None, broken
    sweep = sweep_of(_folder(path), newest)
    folder = output / "machines" / sweep.folder[0] / sweep.folder[1]
    _write(folder / "index.html", pages.sweep(sweep, findings.find([sweep]), judged))
    for row, record in zip(sweep.rows, newest, strict=True):
        _write(folder / row.page, pages.case(sweep, row, record))
    return sweep, broken


def _write_support(results: Path, output: Path, pages: Pages, headings: list[Heading]) -> tuple[Support, list[BrokenLine]]:
    """The pages of the newest matrix of targets; and the file of the results folder, if it should hold one and does not."""
    matrix, file, unreadable = chosen_matrix(results)
    of_gpus = sorted((heading for heading in headings if heading.machine.kind != "cpu"), key=lambda heading: heading.age)
    gpus = {heading.machine.arch: Gpu(heading.machine.device, heading.build.triton or "") for heading in of_gpus}
    support = Support(matrix, file.parent != results, gpus)
    folder, history = (output / SUPPORT).parent, steps(support)
    _write(output / SUPPORT, pages.support(support, history))
    shutil.copyfile(file, folder / MATRIX_FILE)
    for row in support.rows:
        _write(folder / row.page, pages.support_row(support, row, *row_in_full(support, row)))
    for step in history:
        if step.page:
            _write(folder / step.page, pages.support_build(support, step))
    return support, unreadable


def _clear(output: Path) -> None:
    """Remove the pages of an earlier report: cases that are gone must not look current. Nothing else is touched."""
    if (output / "assets" / _PLOTLY).is_file() and (output / "machines").is_dir():
        shutil.rmtree(output / "machines")
    if (output / "assets" / _PLOTLY).is_file() and (output / SUPPORT).is_file():
        shutil.rmtree((output / SUPPORT).parent)


def _write_assets(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in static_files().items():
        (folder / name).write_bytes(content)
    (folder / _PLOTLY).write_text(get_plotlyjs(), encoding="utf-8")


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")

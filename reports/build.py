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

from fpxbench.reports import findings
from fpxbench.reports.findings import Finding
from fpxbench.reports.pages import Pages, static_files
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

    newest: dict[tuple[str, str, str], Sweep] = {}
    by_machine: dict[str, list[Heading]] = defaultdict(list)
    broken_lines: list[BrokenLine] = []
    for path in store.files():
        sweep, broken = _write_sweep(store, path, output, pages)
        broken_lines += broken
        if sweep is None:
            continue
        rival = newest.get(sweep.series)
        if rival is None or sweep.age >= rival.age:
            newest[sweep.series] = sweep
        by_machine[sweep.folder[0]].append(sweep.heading())
    for sweeps in by_machine.values():
        sweeps.sort(key=lambda sweep: (sweep.age, sweep.folder), reverse=True)
        _write(output / "machines" / sweeps[0].folder[0] / "index.html", pages.machine(sweeps))

    shown = sorted(newest.values(), key=lambda sweep: (sweep.machine.kind == "cpu", sweep.folder))
    found = findings.find(shown)
    older = sum(map(len, by_machine.values())) - len(shown)
    _write(output / "about.html", pages.about())
    _write(output / "index.html", pages.overview(shown, found, broken_lines, older))
    return SiteSummary(output / "index.html", found, broken_lines)


def _write_sweep(store: Store, path: Path, output: Path, pages: Pages) -> tuple[Sweep | None, list[BrokenLine]]:
    """The pages of one records file; no sweep if it holds no record."""
    records, broken = store.read(path)
    newest = list({record.case.id: record for record in latest(records)}.values())
    if not newest:
        return None, broken
    # The folder's and the file's names tell sweeps apart, whatever the records in them say of themselves.
    sweep = sweep_of((path.parent.parent.name, path.stem), newest)
    folder = output / "machines" / sweep.folder[0] / sweep.folder[1]
    _write(folder / "index.html", pages.sweep(sweep, findings.find([sweep])))
    for row, record in zip(sweep.rows, newest, strict=True):
        _write(folder / row.page, pages.case(sweep, row, record))
    return sweep, broken


def _clear(output: Path) -> None:
    """Remove the pages of an earlier report: cases that are gone must not look current. Nothing else is touched."""
    if (output / "assets" / _PLOTLY).is_file() and (output / "machines").is_dir():
        shutil.rmtree(output / "machines")


def _write_assets(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in static_files().items():
        (folder / name).write_bytes(content)
    (folder / _PLOTLY).write_text(get_plotlyjs(), encoding="utf-8")


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")

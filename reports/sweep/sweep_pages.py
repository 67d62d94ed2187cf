"""Write the pages of one sweep: its table, and a page for each case. Current pages of an earlier report are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fpxbench.casts.decode_speed import DecodeSpeed
from fpxbench.records.record import Record
from fpxbench.records.store import BrokenLine, Store, folder_of
from fpxbench.reports.casts.conversion_pages import CastSweep
from fpxbench.reports.casts.decode_speed_table import DecodeTable, decode_table
from fpxbench.reports.history.status_history import StatusHistories
from fpxbench.reports.kept_pages import INDEX, KeptPages, Stamp, content_of, digest
from fpxbench.reports.pages import Pages
from fpxbench.reports.sweep.problems import find_problems
from fpxbench.reports.sweep.sweep_table import SweepHeading, SweepTable, sweep_of
from fpxbench.reports.targets.support_table import FILE as MATRIX_FILE, chosen_matrix


def write_sweep(store: Store, path: Path, pages: Pages, kept: KeptPages, casts: CastSweep | None,
                histories: StatusHistories) -> tuple[SweepHeading | None, list[BrokenLine]]:
    """Write those pages of one records file that an earlier report lacks. Return the sweep (None for a file without
    records) and broken lines."""
    folder = "machines/{}/{}/".format(*folder_of(path))
    inputs = digest(content_of(path), content_of(_decodes_of(path)), content_of(store.root / MATRIX_FILE), casts,
                    histories.state(path.stem), histories.links(path.stem))
    earlier = kept.find(folder)
    if earlier and earlier.inputs == inputs:
        kept.keep(folder, earlier)
        return earlier.heading, earlier.broken
    newest, broken = store.read_newest(path)
    if not newest:
        return None, broken
    decodes, broken_decodes = _decodes(store.root, path)
    broken += broken_decodes
    sweep = sweep_of(folder_of(path), newest, histories.of)
    failures = len(pages.failures)
    made_from = dict(_case_inputs(sweep, newest))
    same = {name: of for name, of in made_from.items() if earlier and earlier.pages.get(name) == of}
    kept.write(folder, Stamp("", same, sweep.heading(), broken))    # in case this process is killed midway
    for row, record in zip(sweep.rows, newest, strict=True):
        if row.page in same:
            pages.keep(folder + row.page)
        else:
            pages.write(folder + row.page, pages.case, sweep, row, record)
    pages.write(folder + INDEX, pages.sweep, sweep, find_problems([sweep]), casts, histories.tag(newest[-1]), decodes)
    if len(pages.failures) == failures:
        kept.write(folder, Stamp(inputs, made_from, sweep.heading(), broken))
    return sweep, broken


def _case_inputs(sweep: SweepTable, records: list[Record]) -> Iterator[tuple[str, str]]:
    """Yield the name of each case's page and a digest of its contents: the record, and its rivals' rows."""
    as_rival = {id(row): repr(replace(row, status_history=None)) for row in sweep.rows}
    for row, record in zip(sweep.rows, records, strict=True):
        rivals = sweep.rivals[row.case.scheme, row.case.layer]
        yield row.page, digest(sweep.folder, record.to_json(), *(as_rival[id(rival)] for rival in rivals), row)


def newest_of(store: Store, sweeps: list[tuple[Path, SweepHeading]], histories: StatusHistories) -> list[SweepTable]:
    """Return the newest sweep of each series of one machine, with its cases."""
    newest: dict[tuple[str, str, str], tuple[Path, SweepHeading]] = {}
    for path, sweep in sweeps:
        rival = newest.get(sweep.series)
        if rival is None or sweep.age >= rival[1].age:
            newest[sweep.series] = path, sweep
    found: list[SweepTable] = []
    for path, sweep in newest.values():
        if isinstance(sweep, SweepTable):
            found.append(sweep)
        elif records := store.read_newest(path)[0]:
            found.append(sweep_of(folder_of(path), records, histories.of))
    return found


def _decodes_of(path: Path) -> Path:
    """Return the file of decode speeds beside a records file."""
    return path.parent.parent / DecodeSpeed.FOLDER / path.name


def _decodes(results: Path, path: Path) -> tuple[DecodeTable | None, list[BrokenLine]]:
    """Return the table of decode speeds measured on the machine and build of a records file, and its broken lines."""
    store: Store[DecodeSpeed] = Store(results, DecodeSpeed)
    file = _decodes_of(path)
    if not file.is_file():
        return None, []
    records, broken = store.read_newest(file)
    return decode_table(records, chosen_matrix(results)[0]), broken

"""An index of cast sweeps for comparing builds, so that a nightly run reads only its own build's records.

``RESULTS/<machine>/.casts.json`` is derived from the records: it may be deleted, and is rebuilt if it cannot be read. A
file of records is read again only if its size or its times changed and its content differs. Builds with the same
conversions share one entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fpxbench.casts.cast_changes import CastSnapshot
from fpxbench.casts.cast_record import CastRecord
from fpxbench.records.store import BrokenLine, Store, folder_of
from fpxbench.regressions.series_index import FileState, file_state
from fpxbench.reports.casts.conversion_pages import CastSweep, brief_sweep_of
from fpxbench.reports.sweep.sweep_table import SweepHeading
from fpxbench.whole_file import write_whole

NAME = ".casts.json"
VERSION = 1
"""Raise it when a snapshot's definition changes."""

_SNAPSHOTS = TypeAdapter(tuple[CastSnapshot, ...])


@dataclass(frozen=True)
class IndexedFile:
    """A file of records when it was read.

    heading : None for a file without a record; snapshots : their digest
    """

    state: FileState
    heading: SweepHeading | None
    snapshots: str
    broken: list[BrokenLine]


@dataclass(frozen=True)
class CastIndex:
    """The cast sweeps of one machine: files by name, snapshots by digest."""

    version: int
    files: dict[str, IndexedFile]
    snapshots: dict[str, tuple[CastSnapshot, ...]]


_INDEXES = TypeAdapter(CastIndex)


def brief_sweeps(store: Store[CastRecord], machine: str, paths: Sequence[Path],
                 ) -> tuple[list[CastSweep], list[BrokenLine], list[str]]:
    """Return, in brief, the cast sweeps in the files of one machine, their broken lines, and other messages."""
    place, troubles = store.root / machine / NAME, list[str]()
    known = _read(place)
    snapshots, files = dict(known.snapshots), dict[str, IndexedFile]()
    for path in paths:
        indexed = known.files.get(path.name)
        if indexed is None or not indexed.state.is_of(path):
            state = file_state(path)
            if indexed is not None and indexed.state.digest == state.digest:
                indexed = replace(indexed, state=state)
            else:
                indexed = _indexed(store, path, state, snapshots)
        files[path.name] = indexed
    used = {one.snapshots for one in files.values()}
    found = CastIndex(VERSION, files, {of: those for of, those in snapshots.items() if of in used})
    if found != known:
        try:
            write_whole(place, _INDEXES.dump_json(found))
        except OSError as error:
            troubles.append(f"{place}: {error.strerror or error}; missing rows are read from the records each time")
    sweeps = [_sweep(folder_of(path), one.heading, found.snapshots[one.snapshots])
              for path in paths if (one := files[path.name]).heading is not None]
    return sweeps, [line for one in files.values() for line in one.broken], troubles


def _read(place: Path) -> CastIndex:
    try:
        found = _INDEXES.validate_json(place.read_bytes())
    except (OSError, ValidationError):      # there is none yet, or it is damaged: rebuilt from the records
        return CastIndex(VERSION, {}, {})
    complete = all(one.heading is None or one.snapshots in found.snapshots for one in found.files.values())
    return found if found.version == VERSION and complete else CastIndex(VERSION, {}, {})


def _indexed(store: Store[CastRecord], path: Path, state: FileState,
             snapshots: dict[str, tuple[CastSnapshot, ...]]) -> IndexedFile:
    """Read a file, and add its snapshots."""
    records, broken = store.read_newest(path)
    brief = brief_sweep_of(folder_of(path), records) if records else None
    those = brief.snapshots if brief is not None else ()
    of = hashlib.sha256(_SNAPSHOTS.dump_json(those)).hexdigest()[:32]
    snapshots.setdefault(of, those)
    return IndexedFile(state, brief.heading() if brief is not None else None, of, broken)


def _sweep(folder: tuple[str, str], heading: SweepHeading, snapshots: tuple[CastSnapshot, ...]) -> CastSweep:
    return CastSweep(folder, heading.machine, heading.build, heading.as_of, heading.counts, snapshots, (), ())

"""The series index: the metrics of each record that series need, so that a night's run reads the new build only.

``RESULTS/<machine>/.series.sqlite`` holds nothing that the records do not: it may be deleted, and is made anew if it is
damaged. A file of records is read again only if its size or time of change differs. Where the index cannot be written
(a read-only folder, a full disk), it is made in memory.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fpxbench.builds.timeline import commit_hash
from fpxbench.records.record import Build, Record
from fpxbench.records.store import Store

NAME = ".series.sqlite"
VERSION = 2
"""Raise it when a table or a metric's definition changes."""

METRICS = ("median_us", "baseline_us", "speedup", "relative_error", "sqnr_db", "packed_bytes", "kernels_launched",
           "peak_bytes")

_TABLES = f"""
CREATE TABLE files (name TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, broken TEXT) WITHOUT ROWID;
CREATE TABLE builds (id INTEGER PRIMARY KEY, key TEXT, variant TEXT, build TEXT, UNIQUE (key, variant));
CREATE TABLE devices (id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE cases (id INTEGER PRIMARY KEY, name TEXT UNIQUE, outputs INTEGER, weights INTEGER);
CREATE TABLE sources (id INTEGER PRIMARY KEY, name TEXT UNIQUE);
CREATE TABLE verdicts (id INTEGER PRIMARY KEY, status TEXT, kind TEXT, message TEXT, summary TEXT,
                       UNIQUE (status, kind, message));
CREATE TABLE points (device INTEGER, build INTEGER, "case" INTEGER, file TEXT, verdict INTEGER, source INTEGER,
                     seed INTEGER, {", ".join(f"{name} REAL" for name in METRICS)},
                     PRIMARY KEY (device, build, "case")) WITHOUT ROWID;
CREATE INDEX points_of_file ON points (file);
"""


# What differs between runs of one failure: addresses, process and line numbers, temporary files, hashes.
_VARYING = (
    (re.compile(r"0x[0-9a-fA-F]+"), "0x…"),
    (re.compile(r"(?:/[\w.+~@-]+)+/(?=[\w.+~@-])"), ""),
    (re.compile(r"\b[0-9a-f]{12,}\b"), "…"),
    (re.compile(r"\btmp\w{6,}\b"), "tmp…"),
    (re.compile(r"(?<=:)\d+(?=[:,\s]|$)"), "…"),
    (re.compile(r"\b(line|pid|process|thread) \d+", re.IGNORECASE), r"\1 …"),
    (re.compile(r"\d+(?:\.\d+)?(?= ?(?:s|ms|us|GiB|MiB|KiB|GB|MB|kB|bytes)\b)"), "…"),
    (re.compile(r"\b\d+ of \d+ outputs\b|\[\d+(?:, \d+)*\](?:: \S+)?"), "…"),
    (re.compile(r"\b\d+\.\d+(?:e[-+]?\d+)?\b"), "…"),
    (re.compile(r"\s+"), " "),
)


def normalized(text: str) -> str:
    """Return a failure's message without what varies from run to run."""
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    return text.strip()


@contextmanager
def open_index(results: Path, machine: str) -> Iterator[tuple[sqlite3.Connection, list[str]]]:
    """Open the index of one machine's records, brought up to date, with a message for each thing that is unreadable.

    Raise sqlite3.DatabaseError, here or while it is read, if the file is damaged: `discard_index` it then.
    """
    store = Store(results)
    paths = [path for path in store.files() if path.parent.parent.name == machine]
    troubles: list[str] = []
    try:
        connection = _opened(results / machine / NAME)
        _update(connection, store, paths)
    except sqlite3.OperationalError as error:
        troubles.append(f"{results / machine / NAME}: {error}; every record is read instead")
        connection = _opened(Path(":memory:"))
        _update(connection, store, paths)
    with closing(connection):
        for (broken,) in connection.execute("SELECT broken FROM files WHERE broken != '[]' ORDER BY name"):
            troubles += json.loads(broken)
        yield connection, troubles


def discard_index(results: Path, machine: str) -> None:
    """Delete the index: it is made anew when it is next opened."""
    (results / machine / NAME).unlink(missing_ok=True)


def machines(results: Path) -> list[str]:
    """Return the machines that have records, sorted."""
    return sorted({path.parent.parent.name for path in Store(results).files()})


def _opened(path: Path) -> sqlite3.Connection:
    """Return the connection with its tables, empty if they were of another version."""
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    try:
        with _writing(connection):
            if connection.execute("PRAGMA user_version").fetchone() != (VERSION,):
                for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                    connection.execute(f'DROP TABLE "{name}"')
                for statement in _TABLES.split(";\n"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


@contextmanager
def _writing(connection: sqlite3.Connection) -> Iterator[None]:
    """Run the block as one transaction: all or nothing, one writer at a time."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _update(connection: sqlite3.Connection, store: Store, paths: list[Path]) -> None:
    """Read what is new or has changed, forget what is gone."""
    known = {name: (size, mtime) for name, size, mtime in connection.execute("SELECT name, size, mtime_ns FROM files")}
    for path in paths:
        stat = path.stat()
        if known.pop(path.name, None) != (stat.st_size, stat.st_mtime_ns):
            with _writing(connection):
                _take(connection, store, path, stat.st_size, stat.st_mtime_ns)
    for name in known:
        with _writing(connection):
            _forget(connection, name)


def _forget(connection: sqlite3.Connection, name: str) -> None:
    connection.execute("DELETE FROM points WHERE file = ?", (name,))
    connection.execute("DELETE FROM files WHERE name = ?", (name,))


def _take(connection: sqlite3.Connection, store: Store, path: Path, size: int, mtime_ns: int) -> None:
    records, broken = store.read(path)
    _forget(connection, path.name)
    connection.execute("INSERT INTO files VALUES (?, ?, ?, ?)",
                       (path.name, size, mtime_ns, json.dumps([str(line) for line in broken])))
    ids = _Ids(connection)
    columns = 7 + len(METRICS)
    # A case that was measured again counts as it was last.
    connection.executemany(
        f"INSERT OR REPLACE INTO points VALUES ({', '.join('?' * columns)})",
        (_point(ids, path.name, record) for record in records))


def _point(ids: _Ids, file: str, record: Record) -> tuple:
    timing, accuracy, traffic, verdict = record.timing, record.accuracy, record.traffic, record.verdict
    return (
        ids.of("devices", f"{record.machine.device} ({record.machine.arch})"), ids.build(record.build),
        ids.of("cases", record.case.id, record.case.m * record.case.n, record.case.n * record.case.k), file,
        ids.verdict(str(verdict.status), str(verdict.kind or ""), normalized(verdict.summary), verdict.summary),
        ids.of("sources", record.source), record.seed,
        timing and timing.median_us, timing and timing.baseline_us, timing and timing.speedup, accuracy.relative_error,
        accuracy.sqnr_db, traffic.packed_bytes, traffic.kernels_launched, traffic.peak_bytes,
    )


class _Ids:
    """Numbers that stand for builds, cases, devices and verdicts in a point."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._known: dict[tuple, int] = {}

    def of(self, table: str, name: str, *more: int) -> int:
        return self._number(table, ("name",), (name,), (name, *more))

    def build(self, build: Build) -> int:
        # Not the record's own key: an older fpxbench may have hashed otherwise, or not at all.
        key = commit_hash(build)
        return self._number("builds", ("key", "variant"), (key, build.variant),
                            (key, build.variant, build.model_copy(update={"key": key}).model_dump_json()))

    def verdict(self, status: str, kind: str, message: str, summary: str) -> int:
        identity = status, kind, message
        return self._number("verdicts", ("status", "kind", "message"), identity, (*identity, summary))

    def _number(self, table: str, names: tuple[str, ...], identity: tuple, row: tuple) -> int:
        known = (table, *identity)
        if known not in self._known:
            where = " AND ".join(f"{name} = ?" for name in names)
            found = self._connection.execute(f"SELECT id FROM {table} WHERE {where}", identity).fetchone()
            if found is None:
                marks = ", ".join("?" * len(row))
                found = (self._connection.execute(f"INSERT INTO {table} VALUES (NULL, {marks})", row).lastrowid,)
            self._known[known] = found[0]
        return self._known[known]

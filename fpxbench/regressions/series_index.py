"""The series index: the record fields that series need, in Parquet, so that nightly jobs read only new builds.

``RESULTS/<machine>/.series/<part>.parquet`` is derived from the records: it may be deleted, and is rebuilt if damaged.
A part holds the nightlies of one month, or the other builds of one minor version, so that a night changes one part. A
records file is read again only if its size or its times changed and its content differs.

One process at a time changes a machine's index, under a lock, and replaces each part atomically. If the index cannot be
written (a read-only folder, a full disk), the missing rows are kept in memory.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from fpxbench.builds.timeline import commit_hash
from fpxbench.records.record import Build, Record
from fpxbench.records.store import Store
from fpxbench.whole_file import write_whole

NAME = ".series"
VERSION = 3
"""Increment it when a column or a metric's definition changes."""

METRICS = ("median_us", "baseline_us", "relative_error", "sqnr_db", "packed_bytes", "kernels_launched", "peak_bytes")

SCHEMA: dict[str, Any] = {
    **dict.fromkeys(("file", "device", "build", "case"), pl.Categorical),
    "outputs": pl.Int64, "weights": pl.Int64,
    **dict.fromkeys(("status", "kind", "message", "summary", "source"), pl.Categorical),
    "seed": pl.Float64, **dict.fromkeys(METRICS, pl.Float64),
}
"""Columns of a part, with one row per case and file, its last record: ``build`` is a `Build` as JSON with its key,
``outputs`` M·N, ``weights`` N·K; ``message`` is `normalized`, ``summary`` one of the texts that give that message."""

_FOOTER = "fpxbench"

# Text that differs between runs of one failure: addresses, process and line numbers, temporary files, hashes.
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


class DamagedIndexError(Exception):
    """A part of the index cannot be read: `discard_index` it."""


def normalized(text: str) -> str:
    """Return a failure's message without the parts that vary from run to run."""
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    return text.strip()


def part_of(stem: str) -> str:
    """Return the name of the part that holds a records file: ``2026-06`` for nightlies of June 2026, else ``2.13``."""
    if nightly := re.search(r"\.dev(\d{4})(\d{2})\d{2}", stem):
        return f"{nightly[1]}-{nightly[2]}"
    release = re.match(r"\d{1,4}\.\d{1,4}(?!\d)", stem)
    return release[0] if release else "other"


@dataclass(frozen=True)
class FileState:
    """The state of a records file when it was read."""

    size: int
    mtime_ns: int
    ctime_ns: int
    digest: str
    broken: list[str]
    """A message for each line that is not a record."""

    def is_of(self, path: Path) -> bool:
        """Return whether the file has not been touched since."""
        stat = path.stat()
        return (self.size, self.mtime_ns, self.ctime_ns) == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass(frozen=True)
class Part:
    """A part of an index: its rows, in memory or as a query of a file, and the files that they come from."""

    rows: pl.LazyFrame
    files: dict[str, FileState]

    def write(self, path: Path) -> None:
        """Replace the file `path` by this part. Raise OSError if it cannot be written."""
        footer = {"version": VERSION, "files": {name: asdict(state) for name, state in self.files.items()}}
        content = io.BytesIO()
        self.rows.collect().write_parquet(content, compression="zstd", metadata={_FOOTER: json.dumps(footer)})
        write_whole(path, content.getvalue())

    @classmethod
    def open(cls, path: Path) -> Part:
        """Open a part without reading its rows. Raise DamagedIndexError if it is damaged or of another version."""
        with reading_parts():
            footer = json.loads(pl.read_parquet_metadata(path)[_FOOTER])
            if footer["version"] != VERSION:
                raise ValueError(f"it has version {footer['version']}, but this fpxbench writes {VERSION}")
            return cls(pl.scan_parquet(path, schema=SCHEMA),
                       {name: FileState(**state) for name, state in footer["files"].items()})


@contextmanager
def reading_parts() -> Iterator[None]:
    """Turn the exceptions of reading a damaged file into DamagedIndexError."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, KeyError, TypeError, ValueError) as error:
        raise DamagedIndexError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


@contextmanager
def open_index(results: Path, machine: str) -> Iterator[tuple[list[Part], list[str]]]:
    """Open the up-to-date index of one machine's records, with a message for each unreadable line or file.

    Raise DamagedIndexError, here or from `reading_parts`, if a part's rows are damaged: call `discard_index` then.
    """
    folder, store = results / machine / NAME, Store(results)
    by_part: dict[str, list[Path]] = {}
    for path in store.files(machine):
        by_part.setdefault(part_of(path.stem), []).append(path)
    troubles: list[str] = []
    with _locked(folder, troubles) as writable:
        parts = [_updated(folder / f"{name}.parquet", store, paths, troubles, writable)
                 for name, paths in sorted(by_part.items())]
        for path in folder.glob("*.parquet") if writable else ():
            if path.stem not in by_part:
                path.unlink()
        troubles += (line for part in parts for _, state in sorted(part.files.items()) for line in state.broken)
        yield parts, troubles


def discard_index(results: Path, machine: str) -> None:
    """Delete the index; it is rebuilt when next opened."""
    shutil.rmtree(results / machine / NAME, ignore_errors=True)


@contextmanager
def _locked(folder: Path, troubles: list[str]) -> Iterator[bool]:
    """Lock the index. Yield whether it can be written; if not, append the reason to `troubles`."""
    with ExitStack() as stack:
        writable = True
        try:
            folder.mkdir(exist_ok=True)
            lock = stack.enter_context(open(folder / ".lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            troubles.append(_unwritable(folder, error))
            writable = False
        yield writable


def _unwritable(path: Path, error: OSError) -> str:
    return f"{path}: {error.strerror or error}; missing rows are read from the records each time"


def _updated(path: Path, store: Store, files: list[Path], troubles: list[str], writable: bool) -> Part:
    """Return a part with new and changed files read and deleted ones dropped; write it if it changed."""
    part = _opened(path, troubles)
    states: dict[str, FileState] = {}
    read: dict[str, pl.DataFrame] = {}
    for file in files:
        known = part.files.get(file.name)
        if known is None or not known.is_of(file):
            state = file_state(file)
            if known is None or known.digest != state.digest:
                records, broken = store.read(file)
                read[file.name] = frame_of(file.name, records)
                known = replace(state, broken=[str(line) for line in broken])
            else:
                known = replace(state, broken=known.broken)
        states[file.name] = known
    if states == part.files:
        return part
    file_name = pl.col("file").cast(pl.String)
    with reading_parts():
        kept = part.rows.filter(file_name.is_in([name for name in states if name not in read])).collect()
    part = Part(pl.concat([kept, *read.values()]).sort(file_name, maintain_order=True).lazy(), states)
    if writable:
        try:
            part.write(path)
            return Part.open(path)
        except OSError as error:
            troubles.append(_unwritable(path, error))
    return part


def _opened(path: Path, troubles: list[str]) -> Part:
    """Return the part; an empty one if it is missing or unusable."""
    if path.exists():
        try:
            return Part.open(path)
        except DamagedIndexError as error:
            troubles.append(f"{path} cannot be used and is rebuilt from the records: {error}")
    return Part(pl.DataFrame(schema=SCHEMA).lazy(), {})


def file_state(path: Path) -> FileState:
    """Return the current state of a records file."""
    stat = path.stat()      # before reading, so that lines appended meanwhile show as a change
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return FileState(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, digest, [])


def frame_of(file: str, records: Iterable[Record]) -> pl.DataFrame:
    """Return the rows of one file's records, oldest first; the last record of each case counts."""
    builds: dict[Build, Build] = {}
    summaries: dict[tuple[str, str, str], str] = {}
    rows: dict[tuple[str, str, str, str], tuple] = {}
    for record in records:
        if record.build not in builds:
            # Not the record's own key: an older fpxbench may have hashed differently, or not at all.
            builds[record.build] = record.build.model_copy(update={"key": commit_hash(record.build)})
        build, device = builds[record.build], f"{record.machine.device} ({record.machine.arch})"
        case, verdict = record.case, record.verdict
        failure = str(verdict.status), str(verdict.kind or ""), normalized(verdict.summary)
        identity = device, build.key, build.variant, case.id
        rows.pop(identity, None)
        rows[identity] = (
            file, device, build.model_dump_json(), case.id, case.m * case.n, case.n * case.k,
            *failure, summaries.setdefault(failure, verdict.summary), record.source, record.seed, *_metrics(record),
        )
    return pl.DataFrame(list(rows.values()), schema=SCHEMA, orient="row")


def _metrics(record: Record) -> tuple[float | None, ...]:
    """Return the values of `METRICS`."""
    timing, accuracy, traffic = record.timing, record.accuracy, record.traffic
    return (timing.median_us if timing else None, timing.baseline_us if timing else None, accuracy.relative_error,
            accuracy.sqnr_db, traffic.packed_bytes, traffic.kernels_launched, traffic.peak_bytes)

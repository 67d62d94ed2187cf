"""Append records to files and read them back.

A file is ``RESULTS/<machine>/<folder>/<build>-<variant>.jsonl``, one JSON object a line, appended as each case ends.
The folder is ``records`` for cases, ``numerics`` for conversions (`fpxbench.casts`). One file holds one machine and
build, so that reading a page's worth never means reading history. Several processes may append at once.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic

from pydantic import ValidationError
from typing_extensions import TypeVar

from fpxbench.records.record import Build, Record, StoredRecord

# A record is a few kB; a much longer line is corrupt, and not worth the memory.
MAX_LINE_BYTES = 4 << 20


@dataclass(frozen=True)
class BrokenLine:
    """A line that is not a record, with the reason."""

    path: Path
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.reason}; skipped"


R = TypeVar("R", bound=StoredRecord, default=Record)


class Store(Generic[R]):
    """The records of one kind under one results folder."""

    def __init__(self, root: str | Path, of: type[R] = Record) -> None:  # type: ignore[assignment]
        self.root = Path(root)
        self.of = of

    def file(self, machine: str, build: Build) -> Path:
        """Return the file of one build on one machine. Raise ValueError for a name that would leave the folder."""
        return self.root / _checked(machine) / self.of.FOLDER / f"{_checked(build.stem)}.jsonl"

    def files(self, machine: str | None = None) -> list[Path]:
        """Return every file of such records, or those of one machine, sorted."""
        where = "*" if machine is None else glob.escape(machine)
        return sorted(self.root.glob(f"{where}/{self.of.FOLDER}/*.jsonl"))

    def machines(self) -> list[str]:
        """Return the machines that have such records, sorted."""
        return sorted(path.parent.name for path in self.root.glob(f"*/{self.of.FOLDER}") if any(path.glob("*.jsonl")))

    def make_folder(self) -> None:
        """Make the results folder, before anything is measured. Raise OSError with its name if that fails."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = "a file is there" if isinstance(error, FileExistsError) else error.strerror
            raise OSError(error.errno, f"cannot be made a folder of records: {why}", str(self.root)) from None

    def append(self, record: R) -> None:
        """Add one record, in one write under a lock, so that two sweeps into one folder lose nothing.

        A partial line that a killed writer left behind is terminated first, so that only it is lost.
        """
        path = self.file(record.machine.name, record.build)
        path.parent.mkdir(parents=True, exist_ok=True)
        line = record.to_json().encode() + b"\n"
        with open(path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()

    def read(self, path: Path) -> tuple[list[R], list[BrokenLine]]:
        """Return the records of one file, oldest first, and its broken lines."""
        records: list[R] = []
        broken: list[BrokenLine] = []
        with open(path, "rb") as file:
            for number, line in enumerate(lines_of(file), 1):
                if not line.strip():
                    continue
                try:
                    if len(line) > MAX_LINE_BYTES:
                        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
                    records.append(self.of.model_validate_json(line))
                except ValueError as error:
                    broken.append(BrokenLine(path, number, first_mistake(error)))
        return records, broken

    def read_newest(self, path: Path) -> tuple[list[R], list[BrokenLine]]:
        """Return the newest record of each id in one file, regardless of machine and build, and its broken lines."""
        records, broken = self.read(path)
        return list({record.id: record for record in latest(records)}.values()), broken

    def read_all(self) -> tuple[list[R], list[BrokenLine]]:
        """Return all records under the folder, and the broken lines."""
        records: list[R] = []
        broken: list[BrokenLine] = []
        for path in self.files():
            more, more_broken = self.read(path)
            records += more
            broken += more_broken
        return records, broken


def folder_of(path: Path) -> tuple[str, str]:
    """Return the names of a records file's machine folder and of the file, which may differ from its records' contents.
    """
    return path.parent.parent.name, path.stem


def latest(records: list[R]) -> list[R]:
    """Return the last record of each (case or conversion, build, machine), in order of first appearance."""
    newest: dict[tuple[str | None, ...], R] = {}
    for record in records:
        build = record.build
        # Source builds of one version may differ in their commit and their Triton.
        source = (build.git, build.triton) if build.channel == "source" else ()
        newest[(record.machine.name, build.torch, build.variant, *source, record.id)] = record
    return list(newest.values())


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines, those longer than `MAX_LINE_BYTES` cut to one byte more."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE_BYTES + 1)) and not rest.endswith(b"\n"):
                pass
        yield line


def first_mistake(error: ValueError) -> str:
    """Return why a line is broken, in one sentence; for a ValidationError, the first field and its error."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(map(str, first["loc"]))[:200]
    fault = first["msg"].removeprefix("Value error, ")[:500]
    return f"{field}: {fault}" if field else fault


def _checked(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise ValueError(f"{name!r} cannot be a folder or file name: letters, digits, '_', '.', '+' and '-' only")
    return name

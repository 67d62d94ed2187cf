"""Keep the pages of an earlier report whose inputs have not changed.

A sweep's pages have a file `FILE`, the digest of everything that they show (its records, its casts and decode speeds,
since when each case has its status, links to the pages of series, fpxbench itself), and one for the page of each case:
while a sweep goes on, only the pages of cases that ended, and of their rivals, are written again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fpxbench.records.store import BrokenLine
from fpxbench.reports.sweep.sweep_table import SweepHeading
from fpxbench.whole_file import write_whole

FILE, INDEX = ".inputs.json", "index.html"


@dataclass(frozen=True)
class Stamp:
    """Digests of the inputs of a sweep's pages, and what other pages show of the sweep."""

    inputs: str
    """Of all pages; empty while they are being written."""
    pages: dict[str, str]
    """File names of the pages of its cases, with the digest of what each was made from."""
    heading: SweepHeading
    broken: list[BrokenLine]


@dataclass(frozen=True)
class MadePages:
    """The pages of a folder, with the digest of their inputs."""

    inputs: str
    pages: list[str]


_STAMPS, _MADE = TypeAdapter(Stamp), TypeAdapter(MadePages)


class KeptPages:
    """The sweeps of an earlier report in a folder."""

    def __init__(self, output: Path, from_report: bool) -> None:
        """Take whether the folder holds an earlier report: then whatever is not of this one is removed."""
        self._output, self.from_report = output, from_report
        self.kept: dict[Path, frozenset[str]] = {}
        """The pages that stay, by folder."""

    def find(self, folder: str) -> Stamp | None:
        """Return the stamp of a sweep's pages, of those that are there."""
        path = self._output / folder / FILE
        if not (self.from_report and path.is_file()):
            return None
        try:
            stamp = _STAMPS.validate_json(path.read_bytes())
        except ValidationError:     # of another version, or cut off: the pages are made again
            return None
        there = {one.name for one in path.parent.iterdir()}
        if there.issuperset((INDEX, *stamp.pages)):
            return stamp
        return replace(stamp, inputs="", pages={name: of for name, of in stamp.pages.items() if name in there})

    def has(self, folder: str, inputs: str) -> bool:
        """Return whether the pages of a folder that has no cases were made from `inputs` and are all there; keep them
        then."""
        path = self._output / folder / FILE
        try:
            made = _MADE.validate_json(path.read_bytes()) if self.from_report else None
        except (OSError, ValidationError):
            return False
        if made is None or made.inputs != inputs or not all((self._output / name).is_file() for name in made.pages):
            return False
        for name in made.pages:
            place = self._output / name
            self.kept[place.parent] = self.kept.get(place.parent, frozenset()) | {place.name}
        return True

    def made(self, folder: str, inputs: str, pages: list[str]) -> None:
        """Note what pages of a folder were made from; `pages` are relative to the report's folder."""
        write_whole(self._output / folder / FILE, _MADE.dump_json(MadePages(inputs, pages)))

    def keep(self, folder: str, stamp: Stamp) -> None:
        """Keep the pages of a sweep as they are."""
        self.kept[self._output / folder] = frozenset((INDEX, *stamp.pages))

    def write(self, folder: str, stamp: Stamp) -> None:
        """Note what the pages of a sweep were made from."""
        (self._output / folder).mkdir(parents=True, exist_ok=True)
        write_whole(self._output / folder / FILE, _STAMPS.dump_json(stamp))

    def remove_others(self, written: set[Path], folders: Iterable[str]) -> None:
        """Remove from these folders the pages that are neither kept nor written: cases that are gone must not look
        current."""
        if not self.from_report:
            return
        used = (*written, *self.kept)
        alive = {*used, *(parent for path in used for parent in path.parents)}
        for folder in folders:
            self._remove(self._output / folder, alive)

    def _remove(self, folder: Path, alive: set[Path]) -> None:
        if not folder.is_dir():
            return
        kept = self.kept.get(folder, frozenset())
        for path in folder.iterdir():
            if path.name == FILE or path.name in kept:
                continue
            if path not in alive:
                _delete(path)
            elif path.is_dir():
                self._remove(path, alive)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def digest(*inputs: object) -> str:
    """Return a digest of values whose ``repr`` says all of them, and of fpxbench itself."""
    return hashlib.sha256("\n".join([_program(), *map(repr, inputs)]).encode()).hexdigest()


def content_of(path: Path) -> str | None:
    """Return a digest of a file's content; None without it."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _program() -> str:
    """Return a digest of fpxbench's files and of the libraries that make pages."""
    total = hashlib.sha256(f"{version('jinja2')} {version('plotly')}".encode())

    def add(place: Traversable) -> None:
        for each in sorted(place.iterdir(), key=lambda one: one.name):
            if each.is_dir() and each.name != "__pycache__":
                add(each)
            elif each.name.endswith((".py", ".html", ".j2", ".json")):
                total.update(each.name.encode() + each.read_bytes())

    add(files("fpxbench"))
    return total.hexdigest()

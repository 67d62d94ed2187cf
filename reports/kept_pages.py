"""Keep the pages of an earlier report whose inputs have not changed.

The file `FILE` beside a sweep's pages has the digest of everything that they show (records, casts, decode speeds,
status histories, links to pages of series, fpxbench itself), and one for each case's page: while a sweep runs, only the
pages of cases that ended, and of their rivals, are written again.
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
    """Digests of the inputs of a sweep's pages, and the data that other pages show of the sweep."""

    inputs: str
    """Digest of the inputs of all pages; empty while they are being written."""
    pages: dict[str, str]
    """File names of the cases' pages, with the digest of each one's inputs."""
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
        """Open a folder. If it holds an earlier report (`from_report`), pages that are not in the new one are removed.
        """
        self._output, self.from_report = output, from_report
        self.kept: dict[Path, frozenset[str]] = {}
        """The pages that stay, by folder."""

    def find(self, folder: str) -> Stamp | None:
        """Return the stamp of those of a sweep's pages that exist; None without any."""
        path = self._output / folder / FILE
        if not (self.from_report and path.is_file()):
            return None
        try:
            stamp = _STAMPS.validate_json(path.read_bytes())
        except ValidationError:     # another version's, or truncated: the pages are made again
            return None
        there = {one.name for one in path.parent.iterdir()}
        if there.issuperset((INDEX, *stamp.pages)):
            return stamp
        return replace(stamp, inputs="", pages={name: of for name, of in stamp.pages.items() if name in there})

    def has(self, folder: str, inputs: str) -> bool:
        """Return whether the pages of a folder without cases were made from `inputs` and all exist; if so, keep them.
        """
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
        """Note the inputs of a folder's pages; `pages` are relative to the report's folder."""
        write_whole(self._output / folder / FILE, _MADE.dump_json(MadePages(inputs, pages)))

    def keep(self, folder: str, stamp: Stamp) -> None:
        """Keep the pages of a sweep."""
        self.kept[self._output / folder] = frozenset((INDEX, *stamp.pages))

    def write(self, folder: str, stamp: Stamp) -> None:
        """Note the inputs of a sweep's pages."""
        (self._output / folder).mkdir(parents=True, exist_ok=True)
        write_whole(self._output / folder / FILE, _STAMPS.dump_json(stamp))

    def remove_others(self, written: set[Path], folders: Iterable[str]) -> None:
        """Remove the pages in these folders that are neither kept nor written, so that removed cases do not look
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
    """Return a digest of fpxbench itself and of `inputs`, whose ``repr`` must be complete."""
    return hashlib.sha256("\n".join([_program(), *map(repr, inputs)]).encode()).hexdigest()


def content_of(path: Path) -> str | None:
    """Return a digest of a file's content; None if it does not exist."""
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

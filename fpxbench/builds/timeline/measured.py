"""Find which builds have been measured on which machine, without reading the whole history of the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from fpxbench.builds.timeline.commit import commit_hash
from fpxbench.builds.timeline.entry import EPOCH, Entry
from fpxbench.records.record import Build, Record
from fpxbench.records.store import Store, lines_of


@dataclass(frozen=True)
class BuildRecords:
    """The records of one build in one file."""

    machine: str
    build: Build
    records: int


def measured(results: Path) -> Iterator[BuildRecords]:
    """Yield every build that the records under `results` are about, for each machine and variant.

    The first readable record of a file identifies the build, and the other lines are counted. Source builds of one
    version share a file whatever their commit and Triton, so that every line of theirs is read. Broken lines are
    skipped; sweeps and reports name them.
    """
    for path in Store(results).files():
        machine = path.parent.parent.name
        with open(path, "rb") as lines:
            build = next(filter(None, map(_build_of_record, lines_of(lines))), None)
            if build is None:
                continue
            if build.channel != "source":
                lines.seek(0)
                yield BuildRecords(machine, build,
                               sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(1 << 20), b"")))
                continue
            lines.seek(0)
            builds = [found for line in lines_of(lines) if (found := _build_alone(line)) is not None]
        counts = Counter(map(commit_hash, builds))
        for key, known in {commit_hash(one): one for one in builds}.items():
            yield BuildRecords(machine, known, counts[key])


class _BuildAlone(BaseModel):
    """What a record says of its build."""

    build: Build


def _build_of_record(line: bytes) -> Build | None:
    try:
        return _possible(Record.model_validate_json(line).build)
    except ValueError:
        return None


def _build_alone(line: bytes) -> Build | None:
    try:
        return _possible(_BuildAlone.model_validate_json(line).build)
    except ValueError:
        return None


def _possible(build: Build) -> Build:
    """Return `build` if it can be on a timeline, since records come from other machines. Raise ValueError."""
    Entry.of(build, today=EPOCH.isoformat())
    return build

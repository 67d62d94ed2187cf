"""Which builds have been measured on which machine, told from the results folder without reading its history."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fpxbench.builds.timeline.commit import commit_hash
from fpxbench.builds.timeline.entry import EPOCH, Entry
from fpxbench.records.record import Build, Record
from fpxbench.records.store import Store


@dataclass(frozen=True)
class Measured:
    """What one file of records holds of one build."""

    machine: str
    build: Build
    records: int


def measured(results: Path) -> Iterator[Measured]:
    """Every build that the records under `results` are about, a machine and a variant at a time. Sweeps and reports name lines that
    are broken; here they are passed over.

    Of a file the first record that can be read tells the build, and the rest is counted in lines. Source builds of one version
    share a file whatever their commit and Triton, so that there every line is asked.
    """
    for path in Store(results).files():
        machine = path.parent.parent.name
        with open(path, "rb") as lines:
            build = next(filter(None, map(_build_of_record, lines)), None)
            if build is None:
                continue
            if build.channel != "source":
                lines.seek(0)
                yield Measured(machine, build, sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(1 << 20), b"")))
                continue
            lines.seek(0)
            builds = [found for line in lines if (found := _build_alone(line)) is not None]
        counts = Counter(map(commit_hash, builds))
        for key, known in {commit_hash(one): one for one in builds}.items():
            yield Measured(machine, known, counts[key])


def _build_of_record(line: bytes) -> Build | None:
    try:
        return _possible(Record.model_validate_json(line).build)
    except ValueError:
        return None


def _build_alone(line: bytes) -> Build | None:
    try:
        return _possible(Build.model_validate(json.loads(line)["build"]))
    except (ValueError, KeyError, TypeError):
        return None


def _possible(build: Build) -> Build:
    """`build`, if it can have a place on a timeline; records come from other machines. Raises ValueError."""
    Entry.of(build, today=EPOCH.isoformat())
    return build

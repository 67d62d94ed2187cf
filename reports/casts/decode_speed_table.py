"""A table of decode speeds by engine, next to a plain copy, for one machine and build."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpxbench.casts.decode_speed import ENGINES, DecodeSpeed
from fpxbench.targets.matrix import Matrix


@dataclass(frozen=True)
class DecodeRow:
    """One format decoded to one dtype.

    instructions : per weight, of Triton's cast (or of the integer decode, if Triton lacks the dtype) on this
        architecture with this build's Triton, without loads and stores; None if the matrix has no such kernel
    """

    record: DecodeSpeed
    instructions: float | None


@dataclass(frozen=True)
class DecodeTable:
    """All rows of a machine and build, by device."""

    engines: tuple[str, ...]
    rows: tuple[DecodeRow, ...]
    instructions: bool
    """Whether the matrix of targets has this architecture and Triton."""


def decode_table(records: Sequence[DecodeSpeed], matrix: Matrix | None) -> DecodeTable | None:
    """Return the table of these records, at most one for each format, dtype and device; None without any."""
    if not records:
        return None
    rows = tuple(DecodeRow(record, instructions_of(record, matrix)) for record in records)
    return DecodeTable(tuple(ENGINES), rows, any(row.instructions is not None for row in rows))


def instructions_of(record: DecodeSpeed, matrix: Matrix | None) -> float | None:
    """Return the instructions that decoding one weight takes, from the matrix of targets; None if it has no entry."""
    if matrix is None or record.device == "cpu" or record.build.triton is None:
        return None
    builds = [build.triton for build in matrix.builds]
    if record.build.triton not in builds:
        return None
    build = builds.index(record.build.triton)
    wanted = {f"{operation}/{record.format}/{record.target}" for operation in ("decode", "integer_decode")}
    for probe in matrix.probes:
        if probe.id in wanted:
            for run in probe.cells.get(record.machine.arch, ()):
                if run.builds[0] <= build <= run.builds[1] and run.metrics:
                    return run.metrics.instructions_a_weight
    return None

"""Examinations of checkpoints in a results folder: ``RESULTS/checkpoints/NAME-DIGEST.json``, one for each checkpoint.

The digest is of the checkpoint's path: another examination of the same path replaces the first. Imports no torch.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fpxbench.checkpoint.checkpoint_report import CheckpointReport
from fpxbench.records.store import BrokenLine
from fpxbench.whole_file import write_whole

FOLDER = "checkpoints"
_MOST_BYTES = 1 << 28


def stored_name(path: str) -> str:
    """Return the file's name, without its suffix, for the checkpoint at `path`."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).name)[:60].strip("-") or "checkpoint"
    return f"{safe}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"


def store_report(report: CheckpointReport, results: Path) -> Path:
    """Write `report` to its file in a results folder, and return that file."""
    file = results / FOLDER / f"{stored_name(report.path)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, report.model_dump_json())
    return file


def read_reports(results: Path) -> tuple[list[tuple[str, CheckpointReport]], list[BrokenLine]]:
    """Return the reports of a results folder, with the names of their files, and a message for each file that is not
    one.
    """
    found, broken = [], []
    for file in sorted((results / FOLDER).glob("*.json")):
        try:
            if file.stat().st_size > _MOST_BYTES:
                raise ValueError(f"over {_MOST_BYTES >> 20} MiB")
            found.append((file.stem, CheckpointReport.model_validate_json(file.read_bytes())))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            broken.append(BrokenLine(file, 1, f"not an examination of a checkpoint ({reason})"))
    return found, broken

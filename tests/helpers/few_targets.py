"""A few rows of the package's matrix of targets, whose pages take half of a small report's time."""

from __future__ import annotations

import json
from pathlib import Path

from fpxbench.reports.targets import support_table


def write_few_targets(folder: Path) -> Path:
    """Write them where a report takes them if `folder` holds its results; return the file."""
    document = json.loads(support_table.SHIPPED.read_text(encoding="utf-8"))
    document["probes"] = document["probes"][::60]
    file = folder / support_table.FILE
    file.write_text(json.dumps(document), encoding="utf-8")
    return file

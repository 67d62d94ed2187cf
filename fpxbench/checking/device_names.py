"""Names of devices for records and links. Imports no torch, so that watchers can use it."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def slug(text: str) -> str:
    """Return `text` as a name for files and links: ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"


def cpu_model() -> str:
    """Return the processor as it calls itself, or its architecture."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return " ".join(match[1].split()) if match else platform.machine()


def cpu_name() -> str:
    """Return the name under which records of this CPU are filed: model and number of cores."""
    return slug(f"cpu-{cpu_model()}-{len(os.sched_getaffinity(0))}c")

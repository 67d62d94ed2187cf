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
    """Return the processor's model name, or its architecture if unknown."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return " ".join(match[1].split()) if match else platform.machine()


def cpu_name() -> str:
    """Return the machine name of this CPU's records: model and number of cores."""
    return slug(f"cpu-{cpu_model()}-{len(os.sched_getaffinity(0))}c")

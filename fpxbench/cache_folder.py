"""The cache folder: compiled kernels, tuned tiles, downloaded Tritons. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return ``$XDG_CACHE_HOME/fpxbench``, or ``~/.cache/fpxbench``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpxbench"

"""Whether implementations tune on a shape's first call, or take a tile from a table. Imports no torch."""

from __future__ import annotations

import os

TUNE_VARIABLE = "FPX_TUNE"
"""Environment variable: 1 makes implementations tune on a shape's first call."""


def tuning() -> bool:
    """Return whether tuning is enabled."""
    return os.environ.get(TUNE_VARIABLE, "") not in ("", "0")

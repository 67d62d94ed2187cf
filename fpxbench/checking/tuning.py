"""Whether implementations tune at the first call of a shape, or take a tile from a table. Imports no torch."""

from __future__ import annotations

import os

TUNE_VARIABLE = "FPX_TUNE"
"""The environment variable that asks implementations to tune at the first call of a shape: 1, or nothing."""


def tuning() -> bool:
    """Return whether tuning was asked for."""
    return os.environ.get(TUNE_VARIABLE, "") not in ("", "0")

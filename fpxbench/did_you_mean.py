"""The way out of an unknown name: the known ones that are spelled most like it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], otherwise: str, *, cutoff: float = 0.6) -> str:
    """Return ``did you mean a or b?`` for the names in `known` nearest to `name`, at most three; `otherwise` if none is
    near.

    cutoff : how alike names must be, from 0 to 1, as difflib counts it
    """
    near = difflib.get_close_matches(name, known, n=3, cutoff=cutoff)
    return f"did you mean {' or '.join(near)}?" if near else otherwise

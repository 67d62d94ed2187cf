"""A diagnosis: the fault, in one sentence, with its evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fpxbench.records.kinds import Kind

CORRELATED = 0.9
"""An unknown fault is an inaccuracy above this correlation with the right answer, and gibberish below."""


@dataclass(frozen=True)
class Diagnosis:
    """A fault: its kind, one sentence, and the evidence.

    `kind` is None if nothing is known beyond the status (a NaN that no known fault explains).
    """

    kind: Kind | None
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)


def nearness(likeness: float) -> Kind:
    """Return the kind of an unknown fault, from the correlation of the result with the right one."""
    return Kind.INACCURATE if likeness > CORRELATED else Kind.GIBBERISH

"""A diagnosis: which fault, in one sentence, with its evidence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fpxbench.records.kinds import Kind

CORRELATED = 0.9
"""Above this correlation with the right answer an unknown fault is an inaccuracy, below it is gibberish."""


@dataclass(frozen=True)
class Diagnosis:
    """A fault: its kind, one sentence, and the evidence.

    `kind` is None where the status already says all that is certain (a NaN that no known fault explains).
    """

    kind: Kind | None
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)


def nearness(likeness: float) -> Kind:
    """Return the kind of a fault without a name, from the correlation of what was seen with what is right."""
    return Kind.INACCURATE if likeness > CORRELATED else Kind.GIBBERISH

"""Whose mistake does this look like: from what an implementation does, without reading it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fpxbench.conduct import Operands
from fpxbench.implementation import Implementation
from fpxbench.verdict import Kind


@dataclass(frozen=True)
class Diagnosis:
    """Which mistake, in one sentence, and what it was told by."""

    kind: Kind
    sentence: str
    evidence: dict[str, Any] = field(default_factory=dict)


def diagnose_product(implementation: Implementation, operands: Operands) -> Diagnosis:
    """Name the mistake of an implementation whose product is wrong or not finite."""
    return Diagnosis(Kind.GIBBERISH, "finite, and no known mistake fits")


def diagnose_quantization(original: Tensor, operands: Operands) -> Diagnosis | None:
    """Name the mistake of codes or scales that are not the oracle's; None if they are."""
    return None

"""What goes to a child that carries out conversions, and what comes back. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, TypeAdapter

from fpxbench.casts.cast_record import Behaviour, Difference
from fpxbench.casts.conversion import Conversion
from fpxbench.records.verdict import Verdict


class NumericsRequest(BaseModel):
    """Conversions of one engine and device."""

    conversions: list[Conversion]


class NumericsResult(BaseModel):
    """What became of one: its part of a record."""

    conversion: Conversion
    verdict: Verdict
    inputs: int = 0
    inputs_digest: str = ""
    differing: int | None = None
    behaviour: Behaviour = Behaviour()
    differences: list[Difference] = []


RESULTS = TypeAdapter(list[NumericsResult])

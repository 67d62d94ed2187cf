"""Result of one experiment on an implementation, as JSON. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel

from fpxbench.records.kinds import Kind


class Difference(BaseModel):
    """One entry of a recovered map that differs from the definition."""

    entry: str
    definition: str
    effective: str


class Experiment(BaseModel):
    """The result of one experiment: on the decode table, the scale factors, the block map, or the order of codes.

    `right` is None if the experiment was impossible or inconclusive; the message then says why.
    """

    name: str
    right: bool | None
    message: str
    tried: int = 0
    """How many codes, scales or weights were tried."""
    kinds: list[Kind] = []
    """The known faults that this experiment shows by itself."""
    differences: list[Difference] = []

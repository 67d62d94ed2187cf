"""Request and result of an inspection, as JSON. Imports no torch: the parent process never does."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from fpxbench.diagnosis.experiment import Experiment
from fpxbench.records.case import Activation
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict


class InspectRequest(BaseModel):
    """An implementation, or ``package.module:factory``, and what to try it on."""

    subject: str
    scheme: str
    workload: str | None = None
    """Take N and K from this workload in place of `n` and `k`."""
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    m: int = Field(ge=1)
    given: bool = True
    """The user gave the shape. If not, an implementation that names a limit gets a shape within it."""
    activation: Activation = "bf16"
    device: str | None = None
    seed: int
    impls: list[str] = []


class Inspection(BaseModel):
    """Outcome of an inspection."""

    subject: str
    scheme: str
    n: int
    k: int
    m: int
    activation: Activation
    device: str
    seed: int
    verdict: Verdict
    """`ok`; or `wrong` or `nonfinite` with the fault; or how it ended before that could be seen."""
    undeclared_rule: str | None = None
    """The rule, another right one than the scheme's, by which scales are chosen, and that is not declared."""
    kinds: list[Kind] = []
    """All kinds, where more than one fault was made."""
    weights_read: int = 0
    weights_wrong: int = 0
    experiments: list[Experiment] = []
    seconds: float = 0.0
    evidence: dict[str, Any] = {}
    not_loaded: list[str] = []
    """Files of other implementations, and why each could not be loaded."""

    @property
    def right(self) -> bool:
        return self.verdict.status is Status.OK

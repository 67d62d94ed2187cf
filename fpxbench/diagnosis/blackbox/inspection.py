"""Request and result of an inspection, as JSON. Imports no torch: the parent process never does."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from fpxbench.diagnosis.experiment import Experiment
from fpxbench.records.case import Activation
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict


class InspectRequest(BaseModel):
    """The subject to inspect, an implementation or ``package.module:factory``, with its scheme and shape."""

    subject: str
    scheme: str
    workload: str | None = None
    """Take N and K from this workload instead of `n` and `k`."""
    n: int = Field(ge=1)
    k: int = Field(ge=1)
    m: int = Field(ge=1)
    given: bool = True
    """Whether the user gave the shape. If not, an implementation with a size limit gets a shape within it."""
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
    """`ok`; `wrong` or `nonfinite` with the fault; or how the inspection ended early."""
    undeclared_rule: str | None = None
    """The valid rule other than the scheme's by which scales are chosen, if it is not declared."""
    kinds: list[Kind] = []
    """All kinds, if there is more than one fault."""
    weights_read: int = 0
    weights_wrong: int = 0
    experiments: list[Experiment] = []
    seconds: float = 0.0
    evidence: dict[str, Any] = {}
    not_loaded: list[str] = []
    """Files of other implementations that could not be loaded, each with the reason."""

    @property
    def right(self) -> bool:
        return self.verdict.status is Status.OK

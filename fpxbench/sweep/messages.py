"""Messages between a watched child and its watcher. Imports no torch."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel

from fpxbench.checkpoint.weight_source import TensorSource, WeightSource
from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.records.case import Case
from fpxbench.records.record import Accuracy, Coverage, DeviceState, Flag, Properties, Timing, Traffic
from fpxbench.records.verdict import Verdict


class TrialRequest(BaseModel):
    """A case to run, with its inputs and limits."""

    case: Case
    weight: WeightSource | None = None
    """A file's layer; None: a weight made from the seed."""
    activations: TensorSource | None = None
    """A file's activations; None: made from the seed."""
    device: str = "cpu"
    seed: int
    impls: list[str] = []
    read_gb_per_s: float | None = None
    cache_bytes: int = 32 << 20
    timing_budget_s: float = 0.5
    """0: no timing."""
    check_budget_s: float = 0.1
    """Seconds for checks beyond the case's own calls: other token counts, shapes, layouts, repeats, the accumulator."""
    cores: int | None = None
    """Number of cores for this case while it is prepared beside others; None: all."""


class TrialResult(BaseModel):
    """The result of one case, as fields of its record."""

    verdict: Verdict
    accuracy: Accuracy = Accuracy()
    properties: Properties = Properties()
    coverage: Coverage = Coverage()
    timing: Timing | None = None
    traffic: Traffic = Traffic()
    device_state: DeviceState | None = None
    flags: list[Flag] = []
    no_timing: str | None = None
    work_s: float = 0.0
    """Seconds from request to result in the child."""


class FileInspectRequest(InspectRequest):
    """An inspection with weights or activations from files: ``FILE[:NAME]`` each."""

    weights: str | None = None
    activations: str | None = None


class SetupCheck(NamedTuple):
    """The result of one check of the machine's setup."""

    state: Literal["yes", "no", "note"]
    what: str
    message: str
    advice: str = ""

"""Request and result of an examination, as JSON. Imports no torch: the parent process never does."""

from __future__ import annotations

from pydantic import BaseModel


class CheckpointRequest(BaseModel):
    """What to examine."""

    path: str
    layers: list[str] = []
    """Globs over layers' names; none: all."""
    against: str | None = None
    """An unquantized original of the same model."""
    deep: bool = False
    """Read every selected layer completely, instead of samples of a few."""


class Evidence(BaseModel):
    """Evidence from the numbers on one convention."""

    convention: str
    read_as: str
    fits_better: str = ""
    """The other reading if the numbers contradict the dialect's (a finding); else empty."""
    leans_to: str = ""
    """The other reading if the numbers favour it, but too weakly for a finding; else empty."""
    sureness: float = 0.0
    """Probability of the favoured reading against the other one, from 0.5 (undecided) to 1."""
    message: str


class ScaleStatistics(BaseModel):
    """Counts of block scales: all, and those that are not ordinary positive numbers."""

    count: int = 0
    nan: int = 0
    zero: int = 0
    negative: int = 0
    subnormal: int = 0
    largest: int = 0
    """Scales that are the largest number of their format."""
    min: float = 0.0
    max: float = 0.0


class LayerReport(BaseModel):
    """One quantized layer."""

    name: str
    dialect: str
    others: list[str] = []
    scheme: str | None
    stored_as: str = ""
    """The codes' dtype in the file; for GGUF, the block type."""
    n: int
    k: int
    experts: int
    nbytes: int
    problems: list[str] = []
    histogram: list[int] = []
    """How often each code occurs; empty if the layer was not read."""
    scales: ScaleStatistics | None = None
    evidence: list[Evidence] = []
    sqnr_db: float | None = None
    exact: bool = False
    """Whether the layer decodes to the original, bit for bit."""
    explained_by: str = ""
    """The scheme whose quantizer reproduces most of these codes from the original, with the share."""


class CheckpointReport(BaseModel):
    """A checkpoint, examined."""

    path: str
    files: int
    tensors: int
    nbytes: int
    declared: list[str]
    layers: list[LayerReport]
    plain: dict[str, int]
    """dtype -> bytes of tensors that belong to no quantized layer."""
    problems: list[str]
    read: int = 0
    """Layers whose codes were read."""

"""The record: one case on one build on one machine, as stored: one JSON line.

Other machines write records and other programs read them, so the schema is the contract: `SCHEMA` is its version,
readers accept older ones, and states that must not exist (a wrong result with a time) cannot be written down.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fpxbench.records.case import Case
from fpxbench.records.verdict import Status, Verdict

SCHEMA = 1


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{value} cannot be stored: JSON has no such number")
    return value


Finite = Annotated[float, AfterValidator(_finite)]
Positive = Annotated[float, AfterValidator(_finite), Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$", max_length=120)]


class Flag(StrEnum):
    """What is notable about a case that is right."""

    UNFUSED = "unfused"                # moves more bytes, or launches more kernels, than one pass over the packed weight
    OVER_ROOFLINE = "over_roofline"    # a figure that cannot be true
    NOISY = "noisy"                    # the time's interval is wide


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Build(_Part):
    """One PyTorch build with its Triton."""

    torch: Name
    """Full version, local part included: ``2.13.0+cpu``, ``2.14.0.dev20261120+cu130``."""
    triton: str | None = None
    git: str | None = None
    """The upstream commit that it was built from."""
    channel: Annotated[str, Field(pattern=r"^(release|nightly|source)$")]
    variant: Name
    """What it was made for: ``cpu``, ``cu130``, ``rocm7.2``."""
    date: str | None = None
    """YYYY-MM-DD."""
    key: str = ""
    """The commit that stands for this build on the timeline."""

    @property
    def label(self) -> str:
        """The build without its variant: ``2.13.0``, ``2.14.0.dev20261120``."""
        return self.torch.split("+")[0] if self.channel != "source" else self.torch

    @property
    def stem(self) -> str:
        """What its files of records are called, and the folder of its pages: ``2.13.0-cpu``."""
        return f"{self.label}-{self.variant}"


class Machine(_Part):
    """A device as measured."""

    name: Name
    device: str
    """As it calls itself: ``NVIDIA H100 80GB HBM3``."""
    arch: str
    """``sm_90``, ``gfx942``, ``x86_64 AVX512``."""
    host: str = ""
    kind: str = "cpu"
    """What torch calls it: ``cpu`` or ``cuda``."""
    memory_bytes: int | None = None
    read_gb_per_s: Finite | None = None
    """Read bandwidth, measured at the start of the same sweep, in 1e9 bytes per second."""
    cache_bytes: int | None = None
    """Last-level cache: L3 of a CPU, L2 of a GPU."""
    facts: dict[str, Any] = Field(default_factory=dict)


class Accuracy(_Part):
    """How far the output is from the exact product with the weight as stored, and the weight from the original."""

    relative_error: Finite | None = None
    """Frobenius norm of the error over that of the reference."""
    bound: Finite | None = None
    """The same norm of the elementwise tolerance: what `relative_error` could at most be in a right result."""
    worst_ulp: Finite | None = None
    """The largest error, in units in the last place of the output dtype at the reference."""
    sqnr_db: Finite | None = None
    """Signal to quantization noise of the stored weight; None for an exact one."""


class Timing(_Part):
    """Times of one call, in microseconds."""

    samples_us: Annotated[list[Positive], Field(min_length=1)]
    median_us: Positive
    ci95_us: tuple[Positive, Positive]
    """95% interval of the median, from order statistics."""
    baseline_us: Positive | None = None
    """Median of the dense 16-bit product of the same shape, measured in turn with this one."""
    speedup: Positive | None = None
    """baseline_us / median_us."""
    speedup_ci95: tuple[Positive, Positive] | None = None


class Traffic(_Part):
    """Bytes and kernels of one call."""

    packed_bytes: int | None = None
    """What the stored weight takes, scales included, measured on its tensors."""
    bytes_min: int | None = None
    """The least that one call must move: weight once, activation once, output once."""
    gb_per_s: Finite | None = None
    """bytes_min over the median time: useful bandwidth, in 1e9 bytes per second."""
    roofline_fraction: Finite | None = None
    """gb_per_s over the machine's measured read bandwidth."""
    kernels_launched: int | None = None
    heavy_kernels: int | None = None
    """Those of them that take 5% of the call or more."""
    kernels: list[str] = Field(default_factory=list)
    peak_bytes: int | None = None
    """The most memory that one call held beyond its operands."""
    bottleneck: str = ""
    """What holds it back, in one sentence, from the figures above."""


class Record(_Part):
    """One case on one build on one machine."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)

    FOLDER: ClassVar[str] = "records"
    SCHEMA: ClassVar[int] = SCHEMA

    schema_version: int = Field(default=SCHEMA, alias="schema", le=SCHEMA, ge=1)
    started_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    elapsed_s: Finite | None = None
    """Wall time of the whole case, from its start to its record."""
    overhead_s: Finite | None = None
    """What isolation added to that: `elapsed_s` less the time that the child worked."""
    case: Case
    build: Build
    machine: Machine
    verdict: Verdict
    accuracy: Accuracy = Accuracy()
    timing: Timing | None = None
    traffic: Traffic = Traffic()
    flags: list[Flag] = Field(default_factory=list)
    no_timing: str | None = None
    """Why a right case carries no timing."""
    about: str = ""
    """The first paragraph of the implementation's docstring."""
    source: str = ""
    """Digest of the implementation's source: an edited implementation is another one."""
    seed: int | None = None

    @property
    def id(self) -> str:
        return self.case.id

    @model_validator(mode="after")
    def _right_before_fast(self) -> Self:
        if self.timing is not None and self.verdict.status is not Status.OK:
            raise ValueError(f"a case that is {self.verdict.status} has no timing")
        if self.timing is None and self.verdict.status is Status.OK and not self.no_timing:
            raise ValueError("a right case without a timing must say why (no_timing)")
        return self

    def to_json(self) -> str:
        """One line."""
        return self.model_dump_json(by_alias=True)

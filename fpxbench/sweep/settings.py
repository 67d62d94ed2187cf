"""Settings of a sweep: the same fields from the command line, from asv's environment, and from Python.

Imports no torch, so that asv's benchmarks can read it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field

from fpxbench.records.fields import Name

Profile = Literal["smoke", "quick", "full"]

ENVIRONMENT_PREFIX = "FPX_"


def default_memory_limit() -> int:
    """Return how many bytes a case may take: three quarters of the machine's memory."""
    return psutil.virtual_memory().total * 3 // 4


class Settings(BaseModel):
    """Which cases, where, how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: Profile = "quick"
    device: str | None = None
    """``cpu`` or ``cuda``; None: a GPU if PyTorch sees one."""
    results: Path = Path("results")
    machine: Name | None = None
    """What records are filed under; None: the device's own name."""
    impls: tuple[Path, ...] = ()
    implementation: tuple[str, ...] = ()
    scheme: tuple[str, ...] = ()
    workload: tuple[str, ...] = ()
    """Globs; empty: what the profile says."""
    tp: tuple[int, ...] = ()
    """Sizes of tensor parallelism: layers as one rank holds them are workloads too (``llama3-70b.down.tp8``)."""
    cases: Path | None = None
    """A file of cases, one JSON object a line, to run instead of what profile and globs select."""
    checkpoint: Path | None = None
    """A file or folder of quantized weights: its layers are measured with their own codes, instead of a profile."""
    layer: tuple[str, ...] = ()
    """Globs over `checkpoint`'s layers; empty: one of each scheme and shape."""
    weights: str | None = None
    """``FILE[:NAME]``: unquantized weights to quantize, instead of random ones of the profile's workloads."""
    activations: str | None = None
    """``FILE[:NAME]``: a tensor ``[..., K]`` whose rows are multiplied, instead of random ones."""
    fresh: bool = False
    """Measure again what is already in `results`."""
    jobs: int | None = Field(default=None, gt=0)
    """How many cases are prepared at once; None: as many as there are cores, and memory for the largest case. Timing
    is always one case alone."""
    report: Path | None = None
    """A folder where the report is built, and built again while the sweep goes on."""
    timeout_s: float = Field(default=180.0, gt=0)
    """For one case, from start to result, without the time that it waits or stands still while another is timed."""
    memory_limit: int = Field(default_factory=default_memory_limit, gt=0)
    """Bytes of memory that a case and its children may hold."""
    seed: int | None = None
    timing_budget_s: float = Field(default=0.5, ge=0)

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the fields from FPX_PROFILE, FPX_DEVICE, FPX_RESULTS, …; lists are separated by commas.

        Raises pydantic's ValidationError for a value that is none.
        """
        values: dict[str, object] = {}
        for name, field in cls.model_fields.items():
            text = os.environ.get(ENVIRONMENT_PREFIX + name.upper(), "").strip()
            if text:
                values[name] = (
                    tuple(part for part in text.split(",") if part) if isinstance(field.default, tuple) else text
                )
        return cls.model_validate(values)

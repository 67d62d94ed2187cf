"""Settings of a sweep: the same fields from the command line, from asv's environment, and from Python.

Imports no torch, so that asv's benchmarks can import it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field

from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.fields import Name

Profile = Literal["smoke", "quick", "full"]

ENVIRONMENT_PREFIX = "FPX_"


def default_memory_limit() -> int:
    """Return the default memory limit of a case in bytes: three quarters of the machine's memory."""
    return psutil.virtual_memory().total * 3 // 4


class Settings(BaseModel):
    """The cases of a sweep, the machine, and the limits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: Profile = "quick"
    device: str | None = None
    """``cpu`` or ``cuda``; None: a GPU if PyTorch sees one."""
    results: Path = Path("results")
    machine: Name | None = None
    """The machine name of the records; None: the device's own name."""
    impls: tuple[Path, ...] = ()
    implementation: tuple[str, ...] = ()
    scheme: tuple[str, ...] = ()
    workload: tuple[str, ...] = ()
    """Globs; empty: the profile's."""
    tp: tuple[int, ...] = ()
    """Sizes of tensor parallelism: one rank's shards of layers are workloads too (``llama3-70b.down.tp8``)."""
    cases: Path | None = None
    """A file of cases, one JSON object per line, to run instead of those that profile and globs select."""
    checkpoint: Path | None = None
    """A file or folder of quantized weights: its layers are measured with their own codes, instead of a profile."""
    layer: tuple[str, ...] = ()
    """Globs over `checkpoint`'s layers; empty: one of each scheme and shape."""
    weights: str | None = None
    """``FILE[:NAME]``: unquantized weights to quantize, instead of random ones of the profile's workloads."""
    activations: str | None = None
    """``FILE[:NAME]``: a tensor ``[..., K]`` whose rows are multiplied, instead of random ones."""
    fresh: bool = False
    """Whether to measure cases again that have a record in `results`."""
    jobs: int | None = Field(default=None, gt=0)
    """How many cases to prepare at once; None: one per core, within memory. Cases are always timed one at a time."""
    report: Path | None = None
    """A folder where the report is built, and rebuilt during the sweep."""
    timeout_s: float = Field(default=180.0, gt=0)
    """Limit for one case, excluding the time that it waits or is stopped while another is timed."""
    memory_limit: int = Field(default_factory=default_memory_limit, gt=0)
    """Bytes of memory that a case and its child processes may hold."""
    seed: int | None = None
    timing_budget_s: float = Field(default=0.5, ge=0)

    def check_names(self) -> None:
        """Raise ValueError for a path of `impls` that is missing, and for a scheme that is none.

        The plan raises it too, but in a child, which takes seconds to import PyTorch.
        """
        for path in self.impls:
            if not path.exists():
                raise ValueError(f"--impls {path}: no such file or folder")
        for glob in self.scheme:
            if not set("*?[") & set(glob):
                scheme_named(glob)

    @classmethod
    def from_environment(cls) -> Settings:
        """Read the fields from FPX_PROFILE, FPX_DEVICE, FPX_RESULTS, …; lists are separated by commas.

        Raise pydantic's ValidationError for an invalid value.
        """
        values: dict[str, object] = {}
        for name, field in cls.model_fields.items():
            text = os.environ.get(ENVIRONMENT_PREFIX + name.upper(), "").strip()
            if text:
                values[name] = tuple(filter(None, text.split(","))) if isinstance(field.default, tuple) else text
        return cls.model_validate(values)

"""Speed of decoding codes to 16- and 32-bit numbers by each engine, beside a copy: the records of `fpxbench decode`.

If a layer's decode is not fused, it takes this much time in addition to the product. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import Field, model_validator

from fpxbench.records.fields import Label, Moment, Rate
from fpxbench.records.record import Build, Machine, RecordPart, StoredRecord, now
from fpxbench.records.verdict import Status, Verdict

if TYPE_CHECKING:
    from fpxbench.sweep.isolation import Isolation

FORMATS = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e3m4", "e3m2", "e2m3", "e2m1")
TARGETS = ("bf16", "fp16", "fp32")
ENGINES = {
    "eager": "PyTorch's cast from its own dtype of this format",
    "compiled": "the same under torch.compile",
    "triton": "Triton's cast, in a kernel that does nothing else",
    "own": "this suite's decode: by shifts in a Triton kernel on GPUs, the kernels of cpu_fused on CPUs",
}
BUDGET_S = 0.25
"""Seconds of timing for one format and dtype."""
_TIMEOUT_S = 120.0
_MEASURE = "fpxbench.casts.decode_timing:measure"


class EngineSpeed(RecordPart):
    """One engine: its decoding speed, or why it has none."""

    verdict: Verdict
    gb_per_s: Rate | None = None
    """Bytes read and written over the median time, in 1e9 bytes per second."""

    @model_validator(mode="after")
    def _right_before_fast(self) -> Self:
        if (self.gb_per_s is not None) != (self.verdict.status is Status.OK):
            raise ValueError("a decode has a speed if and only if it is right")
        return self


class DecodeSpeed(StoredRecord):
    """One format decoded to one dtype on one build and machine."""

    FOLDER: ClassVar[str] = "decodes"

    started_at: Moment = Field(default_factory=now)
    build: Build
    machine: Machine
    device: Label
    format: Label
    target: Label
    weights: Annotated[int, Field(gt=0)]
    """Codes decoded by a call."""
    copy_gb_per_s: Rate | None = None
    """Speed, in the same run, of a copy that moves as many bytes as decoding from one byte per code does."""
    engines: dict[Label, EngineSpeed]

    @property
    def id(self) -> str:
        return f"decode/{self.format}/{self.target}/{self.device}"

    @property
    def verdict(self) -> Verdict:
        """The verdict of the worst engine that ran."""
        not_run = (Status.MISSING, Status.UNSUPPORTED)
        ran = [one.verdict for one in self.engines.values() if one.verdict.status not in not_run]
        return next((one for one in ran if one.status is not Status.OK), Verdict(status=Status.OK))


class Measured(RecordPart):
    """What the child process returns for one format and dtype."""

    weights: int
    copy_gb_per_s: Rate
    engines: dict[str, EngineSpeed]


def measure_all(
    isolation: Isolation, build: Build, machine: Machine, formats: Sequence[str], device: str,
    budget_s: float = BUDGET_S, starting: Callable[[str], None] = lambda name: None,
) -> Iterator[DecodeSpeed]:
    """Yield a record for each of `formats` and each of `TARGETS`. If an engine ends the child, that is its verdict."""
    for fmt, target in product(formats, TARGETS):
        starting(f"{fmt} to {target}")
        engines: dict[str, EngineSpeed] = {}
        whole = None
        outcome = isolation.call(_MEASURE, fmt, target, device, list(ENGINES), budget_s, timeout_s=_TIMEOUT_S)
        if outcome.value is not None:
            whole = outcome.read(Measured)
            engines = whole.engines
        else:       # one of them ended the child: each by itself
            for engine in ENGINES:
                outcome = isolation.call(_MEASURE, fmt, target, device, [engine], budget_s, timeout_s=_TIMEOUT_S)
                if outcome.value is None:
                    engines[engine] = EngineSpeed(verdict=outcome.verdict)
                else:
                    whole = outcome.read(Measured)
                    engines |= whole.engines
        yield DecodeSpeed(build=build, machine=machine, device=device, format=fmt, target=target,
                          weights=whole.weights if whole else 1, copy_gb_per_s=whole.copy_gb_per_s if whole else None,
                          engines=engines)

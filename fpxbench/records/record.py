"""The record: one case on one build on one machine, as stored: one JSON line.

Other machines write records and other programs read them, so the schema is the contract. `Record.SCHEMA` is its
version, readers accept older ones, and states that must not exist (a wrong result with a time) cannot be written.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fpxbench.records.case import Case
from fpxbench.records.fields import (
    Count,
    Day,
    Finite,
    Integer,
    Label,
    Microseconds,
    Moment,
    Name,
    Positive,
    Rate,
    Revision,
    Seconds,
    Text,
    Tokens,
    Tree,
)
from fpxbench.records.verdict import Status, Verdict

OVER_ROOFLINE = 1.1
"""Useful bandwidth may exceed the measured one by this factor before it is called impossible: that is measured too."""


class Flag(StrEnum):
    """What is notable about a case that is right: its name in records, and what is seen."""

    seen: str

    def __new__(cls, name: str, seen: str = "") -> Flag:
        flag = str.__new__(cls, name)
        flag._value_ = name
        flag.seen = seen
        return flag

    UNFUSED = (
        "unfused",
        "Kernels beside the product take as long as writing the decoded weight to memory would, or more than a quarter"
        " of the 16-bit weight's size is allocated beside the output and a copy of the activation: the decoded weight"
        " goes to memory. Determined from kernels and allocations, not from a setting. With so many tokens that"
        " preparing them takes as long, the time of kernels does not tell: `coverage.not_asked` then has an entry.",
    )
    OVER_ROOFLINE = (
        "over_roofline",
        "More useful bytes per second than 1.1 times the machine's measured read bandwidth, with weights rotated out of"
        " the cache: a bug in the number, not a fast kernel.",
    )
    SLOW_BASELINE = (
        "slow_baseline",
        "With so many tokens that reading the dense weight takes less than half of the time, the dense product on a GPU"
        " took over 1.25 times as long as the quantized one, though both multiply 16-bit numbers by the same"
        " instructions: the speedup says that dense was slow here, not that the kernel is fast.",
    )
    NOISY = ("noisy", "The 95% interval of the median is wider than ±5%: small differences mean nothing.")
    KEEPS_DECODED_COPY = (
        "keeps_decoded_copy",
        "Memory as large as a decoded weight is allocated between calls, beyond what was stored.",
    )
    UNDECLARED_RULE = (
        "undeclared_rule",
        "Scales are chosen by another right rule than the scheme's, and the implementation does not declare it "
        "(`scale_rule`).",
    )
    NARROW_ACCUMULATOR = (
        "narrow_accumulator",
        "Products are summed in fewer significand bits than declared (24, fp32's, if nothing is), measured by"
        " cancellation.",
    )
    DIRECTED_ROUNDING = (
        "directed_rounding",
        "Outputs are rounded in one direction (toward zero, where a conversion cuts bits off) and not to nearest: each"
        " is up to one unit in the last place off, and all to the same side.",
    )
    THROTTLED = (
        "throttled",
        "The device lowered its clocks (power, heat, a hardware slowdown) while the case was timed: the time is what it"
        " took, and another run may be faster.",
    )


class RecordPart(BaseModel):
    """A part of a stored record: unchangeable, and fields that a newer fpxbench added are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class StoredRecord(RecordPart):
    """What `Store` keeps: one JSON line under ``RESULTS/<machine>/FOLDER/<build>-<variant>.jsonl``.

    A class sets `FOLDER`, raises `SCHEMA` when its fields change meaning, and reads lines of older schemas.
    """

    FOLDER: ClassVar[str]
    SCHEMA: ClassVar[int] = 1

    schema_version: int = Field(default=None, alias="schema", validate_default=True)

    if TYPE_CHECKING:       # every class has them, at the place in its line where they read best
        machine: Machine
        build: Build

        @property
        def id(self) -> str: ...

        @property
        def verdict(self) -> Verdict: ...

    @field_validator("schema_version", mode="before")
    @classmethod
    def _readable(cls, version: object) -> object:
        if version is None:
            return cls.SCHEMA
        if isinstance(version, int) and version > cls.SCHEMA:
            raise ValueError(f"written by a newer fpxbench than this one (which reads schema {cls.SCHEMA} and older)")
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"{version!r} is no schema")
        return version

    def to_json(self) -> str:
        """Return the record as one line."""
        return self.model_dump_json(by_alias=True)


def now() -> str:
    """Return the time as records have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Build(RecordPart):
    """One PyTorch build with its Triton."""

    torch: Name
    """Full version, local part included: ``2.13.0+cpu``, ``2.14.0.dev20261120+cu130``."""
    triton: Revision | None = None
    git: Revision | None = None
    """The upstream commit that it was built from."""
    channel: Annotated[str, Field(pattern=r"^(release|nightly|source)$")]
    variant: Name
    """What it was made for: ``cpu``, ``cu130``, ``rocm7.2``."""
    date: Day | None = None
    """YYYY-MM-DD."""
    key: Revision = ""
    """The commit that stands for this build on the timeline."""

    @property
    def label(self) -> str:
        """The build without its variant: ``2.13.0``, ``2.14.0.dev20261120``."""
        return self.torch.split("+")[0] if self.channel != "source" else self.torch

    @property
    def stem(self) -> str:
        """What its files of records are called, and the folder of its pages: ``2.13.0-cpu``."""
        return f"{self.label}-{self.variant}"


class Machine(RecordPart):
    """A device as measured."""

    name: Name
    device: Label
    """As it calls itself: ``NVIDIA H100 80GB HBM3``."""
    arch: Label
    """``sm_90``, ``gfx942``, ``x86_64 AVX512``."""
    host: Label = ""
    kind: Label = "cpu"
    """What torch calls it: ``cpu`` or ``cuda``."""
    memory_bytes: Count | None = None
    read_gb_per_s: Rate | None = None
    """Read bandwidth, measured at the start of the same sweep, in 1e9 bytes per second."""
    cache_bytes: Count | None = None
    """Last-level cache: L3 of a CPU, L2 of a GPU."""
    facts: Tree = Field(default_factory=dict)


class Accuracy(RecordPart):
    """How far the output is from the exact product with the weight as stored, and the weight from the original."""

    relative_error: Finite | None = None
    """Frobenius norm of the error over that of the reference."""
    bound: Finite | None = None
    """The same norm of the elementwise tolerance: what `relative_error` could at most be in a right result."""
    worst_ulp: Finite | None = None
    """The largest error, in units in the last place of the output dtype at the reference."""
    sqnr_db: Finite | None = None
    """Signal to quantization noise of the stored weight; None for an exact one."""


class Timing(RecordPart):
    """Times of one call, in microseconds."""

    samples_us: Annotated[list[Microseconds], Field(min_length=1, max_length=100_000)]
    median_us: Microseconds
    ci95_us: tuple[Microseconds, Microseconds]
    """95% interval of the median, from order statistics."""
    baseline_us: Microseconds | None = None
    """Median of the dense 16-bit product of the same shape, interleaved with this one."""
    speedup: Positive | None = None
    """baseline_us / median_us."""
    speedup_ci95: tuple[Positive, Positive] | None = None


class DeviceState(RecordPart):
    """What the device did while a case was timed, read and never set. None: the device or its bindings do not say."""

    sm_clock_mhz: Rate | None = None
    """Of the compute units: the median of the readings."""
    sm_clock_min_mhz: Rate | None = None
    memory_clock_mhz: Rate | None = None
    temperature_c: Finite | None = None
    """The highest."""
    power_w: Rate | None = None
    """The median."""
    readings: Count = 0
    throttle_reasons: Annotated[list[Label], Field(max_length=32)] = Field(default_factory=list)
    """Why clocks were lowered, in any reading."""
    throttled_samples: Annotated[list[Count], Field(max_length=100_000)] = Field(default_factory=list)
    """Indices into the timing's samples after which a reason was seen."""
    joules_per_call: Positive | None = None
    joules_per_gb: Positive | None = None
    """Joules of a call per 1e9 bytes of stored weight."""
    energy_calls: Count | None = None
    """Calls between the two steps of the energy counter that were used."""
    energy_s: Seconds | None = None
    """Time between these steps."""
    no_energy: Text = ""
    """Why the energy was not measured."""


class Traffic(RecordPart):
    """Bytes and kernels of one call."""

    packed_bytes: Count | None = None
    """What the stored weight takes, scales included, measured on its tensors."""
    bytes_min: Count | None = None
    """The least that one call must move: weight once, activation once, output once."""
    gb_per_s: Rate | None = None
    """bytes_min over the median time: useful bandwidth, in 1e9 bytes per second."""
    roofline_fraction: Rate | None = None
    """gb_per_s over the machine's measured read bandwidth."""
    kernels_launched: Count | None = None
    heavy_kernels: Count | None = None
    """Those of them that take 5% of the call or more."""
    kernels: Annotated[list[Label], Field(max_length=10_000)] = Field(default_factory=list)
    kept_bytes: Count | None = None
    """Memory held between calls beyond the stored weight, where it is as large as a copy of it; 0: none was."""
    peak_bytes: Count | None = None
    """The most memory that one call held beyond its operands."""
    bottleneck: Text = ""
    """What limits it, in one sentence, from the fields above."""


class Properties(RecordPart):
    """Measured facts about a right case that are no mistakes: users choose by them. None: not measured."""

    library: str | None = Field(default=None, max_length=200)
    """The library whose kernel it is, and its version: ``torchao 0.18.0``. None: the implementation's own."""
    first_call_s: Seconds | None = None
    """How long the first call took: compiling, what the compiler's cache had not, and tuning included."""
    repeatable: bool | None = None
    """The same call gives the same bits each time, over `repeats` calls."""
    repeats: Count | None = None
    batch_invariant: bool | None = None
    """A token's output has the same bits whatever other tokens are multiplied with it, over `tokens_checked`."""
    tokens_checked: Annotated[list[Tokens], Field(max_length=10_000)] | None = None
    """Token counts (M) whose products were checked."""
    accumulator_bits: Count | None = None
    """Significand bits of the narrowest sum that products go through: 24 for fp32."""
    accumulator_overflows: bool | None = None
    """Sums of 2**17 overflow, as in fp16."""
    sum_order: Label | None = None
    """The order of additions as text: ``in blocks of 32``."""
    sum_block: Count | None = None
    """How many neighbouring products are summed before they meet others."""
    error_factor: Rate | None = None
    """Root mean square error over the largest that the declared roundings allow; wrong above `error_threshold`."""
    error_threshold: Rate | None = None
    output_rounding: Label | None = None
    """How outputs are rounded: ``to nearest``, ``toward zero``. None where it cannot be told from them."""

    def messages(self) -> dict[str, str]:
        """Return what was measured as text, by property: ``{"sums": "in 24 bits, in blocks of 32"}``."""
        found: dict[str, str] = {}
        if self.repeatable is not None:
            found["repeats"] = (f"{'the same bits' if self.repeatable else 'different bits, all within the tolerance,'}"
                                f" in {self.repeats} calls with the same operands")
        if self.batch_invariant is not None:
            found["other tokens"] = (
                "a token's output has the same bits whatever tokens are multiplied with it" if self.batch_invariant
                else "a token's output depends on how many are multiplied with it")
        sums = [f"in {self.accumulator_bits} bits"] if self.accumulator_bits else []
        sums += [self.sum_order] if self.sum_order else []
        sums += ["overflowing as fp16 does"] if self.accumulator_overflows else []
        if sums:
            found["sums"] = ", ".join(sums)
        if self.output_rounding:
            found["outputs"] = f"rounded {self.output_rounding}"
        if self.error_factor is not None:
            found["errors"] = f"{self.error_factor:.2g} times the largest mean that the roundings allow"
        return found


class Coverage(RecordPart):
    """What was asked of a case beyond its own calls, by check, and what was not asked, with the reason."""

    covered: Annotated[dict[Label, Text], Field(max_length=1000)] = Field(default_factory=dict)
    not_asked: Annotated[dict[Label, Text], Field(max_length=1000)] = Field(default_factory=dict)


class Record(StoredRecord):
    """One case on one build on one machine."""

    FOLDER: ClassVar[str] = "records"

    started_at: Moment = Field(default_factory=now)
    elapsed_s: Seconds | None = None
    """Wall time of the whole case, from its start to its record."""
    overhead_s: Finite | None = None
    """What isolation added to that: `elapsed_s` less the time that the child worked."""
    case: Case
    build: Build
    machine: Machine
    verdict: Verdict
    accuracy: Accuracy = Accuracy()
    properties: Properties = Properties()
    coverage: Coverage = Coverage()
    timing: Timing | None = None
    traffic: Traffic = Traffic()
    device_state: DeviceState | None = None
    """Of the timing; None where nothing was timed or the device cannot be read."""
    flags: Annotated[list[Flag], Field(max_length=100)] = Field(default_factory=list)
    no_timing: Text | None = None
    """Why a right case carries no timing."""
    about: Text = ""
    """The first paragraph of the implementation's docstring."""
    source: Revision = ""
    """Digest of the implementation's source: an edited implementation is another one."""
    seed: Integer | None = None

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

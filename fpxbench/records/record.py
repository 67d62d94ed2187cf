"""The record of one case on one build on one machine, stored as one JSON line.

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
"""Useful bandwidth may exceed the machine's by this factor before it is flagged, since both are measured."""


class Flag(StrEnum):
    """A notable property of a correct case: its name in records, and its meaning."""

    seen: str

    def __new__(cls, name: str, seen: str = "") -> Flag:
        flag = str.__new__(cls, name)
        flag._value_ = name
        flag.seen = seen
        return flag

    UNFUSED = (
        "unfused",
        "The decoded weight is written to memory: kernels other than the product take as long as writing it would, or"
        " more than a quarter of the 16-bit weight's size is allocated in addition to the output and a copy of the"
        " activation. Determined from kernels and allocations, not from a setting. With many tokens, preparing them"
        " takes as long, so kernel times cannot decide: `coverage.not_asked` then has an entry.",
    )
    OVER_ROOFLINE = (
        "over_roofline",
        "More useful bytes per second than 1.1 times the machine's measured read bandwidth, although weights are"
        " rotated out of the cache: a measurement error, not a fast kernel.",
    )
    SLOW_BASELINE = (
        "slow_baseline",
        "The dense product on a GPU took over 1.25 times as long as the quantized one, at so many tokens that reading"
        " the dense weight takes less than half of the time. Both multiply 16-bit numbers with the same instructions,"
        " so the speedup means that dense was slow here, not that the kernel is fast.",
    )
    SHARED_DEVICE = (
        "shared_device",
        "Another process used the GPU when the timing began: it did not become idle within seconds, although all other"
        " cases of the sweep were paused. Times and speedup are those of a share of the device.",
    )
    NOISY = ("noisy", "The 95% interval of the median is wider than ±5%: small differences are not significant.")
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
        "Products are summed in fewer significand bits than declared (by default 24, as in fp32), measured by"
        " cancellation.",
    )
    DIRECTED_ROUNDING = (
        "directed_rounding",
        "Outputs are rounded in one direction (toward zero, if a conversion truncates bits) and not to nearest: each is"
        " off by up to one unit in the last place, always to the same side.",
    )
    THROTTLED = (
        "throttled",
        "The device lowered its clocks (power, heat, a hardware slowdown) while the case was timed, so another run may"
        " be faster.",
    )


class RecordPart(BaseModel):
    """A part of a stored record: immutable; unknown fields, from a newer fpxbench, are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, populate_by_name=True)


class StoredRecord(RecordPart):
    """A record that `Store` stores: one JSON line in ``RESULTS/<machine>/FOLDER/<build>-<variant>.jsonl``.

    A class sets `FOLDER`, raises `SCHEMA` when its fields change meaning, and reads lines of older schemas.
    """

    FOLDER: ClassVar[str]
    SCHEMA: ClassVar[int] = 1

    schema_version: int = Field(default=None, alias="schema", validate_default=True)

    if TYPE_CHECKING:       # each class defines them, where they read best in its line
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
            raise ValueError(f"{version!r} is not a schema version")
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
    """Full version, including the local part: ``2.13.0+cpu``, ``2.14.0.dev20261120+cu130``."""
    triton: Revision | None = None
    git: Revision | None = None
    """The upstream commit from which it was built."""
    channel: Annotated[str, Field(pattern=r"^(release|nightly|source)$")]
    variant: Name
    """The platform that it was built for: ``cpu``, ``cu130``, ``rocm7.2``."""
    date: Day | None = None
    """YYYY-MM-DD."""
    key: Revision = ""
    """The commit of this build on the timeline."""

    @property
    def label(self) -> str:
        """The build without its variant: ``2.13.0``, ``2.14.0.dev20261120``."""
        return self.torch.split("+")[0] if self.channel != "source" else self.torch

    @property
    def stem(self) -> str:
        """The stem of its records files, and the folder of its pages: ``2.13.0-cpu``."""
        return f"{self.label}-{self.variant}"


class Machine(RecordPart):
    """A device as measured."""

    name: Name
    device: Label
    """The name that the driver reports: ``NVIDIA H100 80GB HBM3``."""
    arch: Label
    """``sm_90``, ``gfx942``, ``x86_64 AVX512``."""
    host: Label = ""
    kind: Label = "cpu"
    """torch's device type: ``cpu`` or ``cuda``."""
    memory_bytes: Count | None = None
    read_gb_per_s: Rate | None = None
    """Read bandwidth, measured at the start of the same sweep, in 1e9 bytes per second."""
    cache_bytes: Count | None = None
    """Last-level cache: L3 of a CPU, L2 of a GPU."""
    facts: Tree = Field(default_factory=dict)


class Accuracy(RecordPart):
    """Error of the output against the exact product with the stored weight, and of the stored weight against the
    original."""

    relative_error: Finite | None = None
    """Frobenius norm of the error over that of the reference."""
    bound: Finite | None = None
    """The same norm of the elementwise tolerance: the largest `relative_error` of a correct result."""
    worst_ulp: Finite | None = None
    """The largest error, in units in the last place (of the output dtype) of the reference."""
    sqnr_db: Finite | None = None
    """Signal to quantization noise of the stored weight; None if it is exact."""


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
    method: Annotated[int, Field(ge=1, le=1_000)] = 1
    """The number of the timing method. A change between different methods is attributed to the suite."""


class DeviceState(RecordPart):
    """Clocks, temperature and power while a case was timed. They are read, never set. None: not available."""

    sm_clock_mhz: Rate | None = None
    """Clock of the compute units: median of the readings."""
    sm_clock_min_mhz: Rate | None = None
    memory_clock_mhz: Rate | None = None
    temperature_c: Finite | None = None
    """Maximum of the readings."""
    power_w: Rate | None = None
    """Median of the readings."""
    readings: Count = 0
    throttle_reasons: Annotated[list[Label], Field(max_length=32)] = Field(default_factory=list)
    """Reasons for lowered clocks, over all readings."""
    throttled_samples: Annotated[list[Count], Field(max_length=100_000)] = Field(default_factory=list)
    """Indices into the timing's samples after which a reason was seen."""
    shared: bool = False
    """The GPU did not become idle before the timing began: another process used it."""
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
    """Size of the stored weight including scales, measured on its tensors."""
    bytes_min: Count | None = None
    """The minimum that one call must move: weight, activation and output once each."""
    gb_per_s: Rate | None = None
    """bytes_min over the median time: useful bandwidth, in 1e9 bytes per second."""
    roofline_fraction: Rate | None = None
    """gb_per_s over the machine's measured read bandwidth."""
    kernels_launched: Count | None = None
    heavy_kernels: Count | None = None
    """Kernels that take 5% of the call or more."""
    kernels: Annotated[list[Label], Field(max_length=10_000)] = Field(default_factory=list)
    kept_bytes: Count | None = None
    """Memory held between calls in addition to the stored weight, if as large as a copy of it; 0: none."""
    peak_bytes: Count | None = None
    """Peak memory of one call in addition to its operands."""
    bottleneck: Text = ""
    """What limits the speed, in one sentence, from the fields above."""


class Properties(RecordPart):
    """Measured properties of a correct case that are not faults but matter to users. None: not measured."""

    library: str | None = Field(default=None, max_length=200)
    """The library whose kernel it is, and its version: ``torchao 0.18.0``. None: the implementation's own."""
    first_call_s: Seconds | None = None
    """Duration of the first call, including compilation (if not cached) and tuning."""
    repeatable: bool | None = None
    """The same call gives the same bits each time, over `repeats` calls."""
    repeats: Count | None = None
    batch_invariant: bool | None = None
    """A token's output has the same bits whatever other tokens are multiplied with it, over `tokens_checked`."""
    tokens_checked: Annotated[list[Tokens], Field(max_length=10_000)] | None = None
    """Token counts (M) whose products were checked."""
    accumulator_bits: Count | None = None
    """Significand bits of the narrowest accumulator: 24 for fp32."""
    accumulator_overflows: bool | None = None
    """Sums of 2**17 overflow, as in fp16."""
    sum_order: Label | None = None
    """The order of additions as text: ``in blocks of 32``."""
    sum_block: Count | None = None
    """Number of neighbouring products that are summed before others are added."""
    error_factor: Rate | None = None
    """Root mean square error relative to the largest that the declared roundings allow; wrong above
    `error_threshold`."""
    error_threshold: Rate | None = None
    output_rounding: Label | None = None
    """How outputs are rounded: ``to nearest``, ``toward zero``. None if the outputs do not show it."""

    def messages(self) -> dict[str, str]:
        """Return the measured properties as text, by name: ``{"sums": "in 24 bits, in blocks of 32"}``."""
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
    """Checks made beyond the case's own calls, with what they covered, and checks not made, with the reason."""

    covered: Annotated[dict[Label, Text], Field(max_length=1000)] = Field(default_factory=dict)
    not_asked: Annotated[dict[Label, Text], Field(max_length=1000)] = Field(default_factory=dict)


TIMING_OFF = "timing was turned off"
"""`Record.no_timing` where no timing was asked for."""


class Record(StoredRecord):
    """One case on one build on one machine."""

    FOLDER: ClassVar[str] = "records"

    started_at: Moment = Field(default_factory=now)
    elapsed_s: Seconds | None = None
    """Wall-clock time of the whole case, from its start to its record."""
    overhead_s: Finite | None = None
    """Overhead of isolation: `elapsed_s` minus the time that the child worked."""
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
    """During the timing; None if nothing was timed or the device cannot be read."""
    flags: Annotated[list[Flag], Field(max_length=100)] = Field(default_factory=list)
    no_timing: Text | None = None
    """Why a correct case has no timing."""
    about: Text = ""
    """The first paragraph of the implementation's docstring."""
    source: Revision = ""
    """Digest of the implementation's source, since an edited implementation is measured again."""
    seed: Integer | None = None
    activations: Revision = ""
    """Digest of a file's activations; empty if they were made from the seed."""

    @property
    def id(self) -> str:
        return self.case.id

    def answers(self, *, timed: bool) -> bool:
        """Return whether the case need not be measured again by the same build and implementation.

        It must be if a dependency was missing, which may have been installed since, and if it is to be timed where its
        timing was turned off.
        """
        return self.verdict.status is not Status.MISSING and not (timed and self.no_timing == TIMING_OFF)

    @model_validator(mode="after")
    def _right_before_fast(self) -> Self:
        if self.timing is not None and self.verdict.status is not Status.OK:
            raise ValueError(f"a case that is {self.verdict.status} has no timing")
        if self.timing is None and self.verdict.status is Status.OK and not self.no_timing:
            raise ValueError("a correct case without a timing needs a reason (no_timing)")
        return self

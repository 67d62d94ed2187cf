"""The record of one row of `fpxbench generate`: a model under one scheme and implementation. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, Field, model_validator

from fpxbench.records.case import Part, SchemePart
from fpxbench.records.fields import Count, Finite, Label, Moment, Positive, Rate, Seconds, Text
from fpxbench.records.kinds import Kind
from fpxbench.records.record import OVER_ROOFLINE, Build, Flag, Machine, RecordPart, StoredRecord, now
from fpxbench.records.verdict import Status, Verdict

ModelKind = Literal["hub", "folder", "gguf", "random"]


class Estimate(RecordPart):
    """A statistic with its 95% interval."""

    value: Finite
    low: Finite
    high: Finite


class Divergence(RecordPart):
    """KL divergences of next-token distributions, in nats, over the tokens of a text."""

    mean: Estimate
    median: Estimate
    p99: Estimate
    maximum: Finite


class TextQuality(RecordPart):
    """How a model predicts the tokens of one text, beside the unquantized model.

    kl : KL(unquantized || this row)
    kl_format : KL(unquantized || the same codes, decoded exactly): the share of the format
    kl_kernel : KL(the same codes, decoded exactly || this row): the share of the kernel
    noise : KL(unquantized || unquantized, summed in another order): the difference between two right kernels
    """

    text: Label
    tokens: Count
    perplexity: Estimate | None = None
    """None: the weights are random, or the text is."""
    kl: Divergence | None = None
    kl_format: Divergence | None = None
    kl_kernel: Divergence | None = None
    noise: Divergence
    threshold: Finite
    """Of the mean of `kl_kernel`, in nats: `fpxbench.model.quality_statistics.threshold`."""
    same_top: Estimate | None = None
    """Share of the tokens for which both models rank the same token first."""
    right_token_change: Estimate | None = None
    """Mean change of the probability of the text's own next token."""


class Speed(RecordPart):
    """Speed of prefill and of decode. A decode step generates one token for each sequence of the batch. On a GPU, steps
    are enqueued without waiting for the tokens before."""

    step_s: Annotated[list[Seconds], Field(min_length=1, max_length=100_000)]
    tokens_per_s: Positive
    tokens_per_s_ci95: tuple[Positive, Positive]
    first_token_s: Estimate
    """Time to the first token: the prompt's forward pass and the choice of a token."""
    prefill_tokens_per_s: Positive
    waiting_tokens_per_s: Positive | None = None
    """Tokens per second if each step is launched when the one before has ended; None on a CPU, where it always is."""
    method: Annotated[int, Field(ge=1, le=1_000)] = 1
    """How steps are run and timed: 1, each is waited for; 2, they are enqueued; 3, and compiled kernels are launched
    before the one before has ended. Speeds by different methods are not of one series."""


class WeightTraffic(RecordPart):
    """Bytes of one decode step."""

    stored_bytes: Count
    """All parameters as stored, each counted once."""
    step_bytes: Count
    """The bytes that a step reads: one embedding row per sequence, and only the experts in use."""
    gb_per_s: Rate | None = None
    roofline_fraction: Rate | None = None
    peak_bytes: Count | None = None
    """Peak memory during generation: of the device, or of the process on a CPU."""
    joules_per_token: Rate | None = None
    """From the device's energy counter; None if it has none."""


class KernelTime(RecordPart):
    """A kernel in a decode step: its number of launches, and their total time."""

    name: Label
    count: Count
    us: Rate


class StepParts(RecordPart):
    """Where the time of a captured decode step goes, as traced; the profiler makes it a little longer.

    products_us, attention_us : time in kernels that multiply by weights, and in attention kernels
    between_us : time in all other kernels: norms, rotary embeddings, the cache, activations, copies
    gaps_us : time in no kernel
    """

    products_us: Rate
    attention_us: Rate
    between_us: Rate
    gaps_us: Rate
    kernels: Annotated[list[KernelTime], Field(max_length=100)] = Field(default_factory=list)


class LayerDifference(RecordPart):
    """Relative distance of a layer's output from the exactly decoded model's, in the Frobenius norm."""

    layer: Label
    relative: Finite | None
    """None: it is not finite."""
    noise: Finite
    """The same for the exactly decoded model with its sums in another order."""
    leaves: bool
    """Whether it is outside the noise, or not finite."""


class LayerDiagnosis(RecordPart):
    """Diagnosis of how one layer's codes are decoded, from its products."""

    layer: Label
    kind: Kind | None = None
    message: Text


class ModelDescription(RecordPart):
    """A model before quantization."""

    name: Label
    kind: ModelKind
    architecture: Label
    layers: Count
    parameters: Count
    bytes: Count
    note: Text = ""
    """Limits on what its figures mean, in one sentence."""

    @property
    def slug(self) -> str:
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in self.name).strip("-.")[:80] or "model"


class PlannedRow(BaseModel):
    """A row of the table: scheme × implementation."""

    scheme: SchemePart
    implementation: Part
    compiled: bool = False
    stored: bool = False
    """Whether it uses a quantized folder's own codes; `scheme` is then the scheme of most of its weights."""
    merged: bool = False
    """Whether the projections of one input are one product."""
    refused: str = ""
    """Why it cannot be run; empty if it can."""


class RowResult(BaseModel):
    """The result of a row, without its build and machine."""

    implementation: Part
    verdict: Verdict
    quality: list[TextQuality] = Field(default_factory=list)
    speed: Speed | None = None
    traffic: WeightTraffic | None = None
    flags: list[Flag] = Field(default_factory=list)
    no_timing: Text | None = None
    layers: list[LayerDifference] = Field(default_factory=list)
    diagnosis: LayerDiagnosis | None = None
    quantized: Text = ""
    """How many weights were quantized, with bytes before and after."""
    left: dict[str, str] = Field(default_factory=dict)
    """Weights left in 16 bits, each with the reason."""
    step: StepParts | None = None
    """Where the time of a captured step goes."""
    not_captured: Text = ""
    """Why CUDA graph capture of a compiled step failed: its speed then includes Python overhead. Empty otherwise."""
    sample: Text = ""
    """Its greedy continuation of the prompt."""


class GenerationRecord(StoredRecord):
    """A model under one scheme and implementation, on one build and machine."""

    FOLDER: ClassVar[str] = "models"

    started_at: Moment = Field(default_factory=now)
    elapsed_s: Seconds | None = None
    model: ModelDescription
    scheme: SchemePart
    implementation: Part
    compiled: bool = False
    stored: bool = False
    """Whether the codes are those stored in the model's files; `scheme` is then the scheme of most of its weights."""
    merged: bool = False
    """Whether the projections of one input (query, key and value; gate and up) were computed as one product."""
    batch: Count = 1
    prompt_tokens: Count = 0
    new_tokens: Count = 0
    prompt: Text = ""
    plain_sample: Text = ""
    """The unquantized model's continuation of the prompt."""
    build: Build
    machine: Machine
    verdict: Verdict
    quality: Annotated[list[TextQuality], Field(max_length=10)] = Field(default_factory=list)
    speed: Speed | None = None
    traffic: WeightTraffic | None = None
    flags: Annotated[list[Flag], Field(max_length=100)] = Field(default_factory=list)
    no_timing: Text | None = None
    layers: Annotated[list[LayerDifference], Field(max_length=10_000)] = Field(default_factory=list)
    diagnosis: LayerDiagnosis | None = None
    quantized: Text = ""
    left: Annotated[dict[Label, Text], Field(max_length=10_000)] = Field(default_factory=dict)
    step: StepParts | None = None
    not_captured: Text = ""
    sample: Text = ""

    @property
    def id(self) -> str:
        return row_id(self.model, self.scheme, self.implementation, self.batch, compiled=self.compiled,
                      stored=self.stored, merged=self.merged)

    @property
    def mode(self) -> str:
        """``eager`` or ``compiled``."""
        return "compiled" if self.compiled else "eager"

    @property
    def kernel(self) -> str:
        """The row's label in tables: ``triton_fused``, ``triton_fused compiled, as stored``."""
        return self.implementation + (" compiled" if self.compiled else "") + (", as stored" if self.stored else "")

    @property
    def is_baseline(self) -> bool:
        return self.scheme in BASELINES and not self.stored

    @model_validator(mode="after")
    def _right_before_fast(self) -> Self:
        if self.speed is not None and self.verdict.status is not Status.OK:
            raise ValueError(f"a row that is {self.verdict.status} has no speed")
        if self.speed is None and self.verdict.status is Status.OK and not self.no_timing:
            raise ValueError("a right row without a speed must say why (no_timing)")
        return self


def row_id(model: ModelDescription, scheme: str, implementation: str, batch: int, *, compiled: bool,
           stored: bool = False, merged: bool = False) -> str:
    """Return a row's id: ``llama2-7b/cpu_fused/mxfp4/l32/b1``, with ``/merged`` for projections as one product,
    ``/stored`` for a quantized folder's own codes, and ``/compiled`` under torch.compile."""
    how = ("/merged" if merged else "") + ("/stored" if stored else "") + ("/compiled" if compiled else "")
    return f"{model.slug}/{implementation}/{scheme}/l{model.layers}/b{batch}{how}"


BASELINES = ("bf16", "int8-row")
"""Schemes of every table, measured in the same run."""


def traffic_of(stored_bytes: int, step_bytes: int, step_s: float | None, machine: Machine,
               peak_bytes: int | None = None, joules_per_token: float | None = None,
               ) -> tuple[WeightTraffic, list[Flag]]:
    """Return the traffic of a decode step, flagged ``over_roofline`` if it exceeds the memory's bandwidth.

    Only weights larger than the last-level cache are flagged: smaller ones need not come from memory.
    """
    gb_per_s = step_bytes / step_s / 1e9 if step_s else None
    share = gb_per_s / machine.read_gb_per_s if gb_per_s and machine.read_gb_per_s else None
    traffic = WeightTraffic(stored_bytes=stored_bytes, step_bytes=step_bytes, gb_per_s=gb_per_s,
                            roofline_fraction=share, peak_bytes=peak_bytes, joules_per_token=joules_per_token)
    beyond_cache = machine.cache_bytes is None or step_bytes > machine.cache_bytes
    flags = [Flag.OVER_ROOFLINE] if share is not None and share > OVER_ROOFLINE and beyond_cache else []
    return traffic, flags

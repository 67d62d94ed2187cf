"""The stored result of a confirmation: one JSON line under ``RESULTS/<machine>/confirmations/``."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from fpxbench.records.case import Case
from fpxbench.records.fields import Count, Finite, Integer, Label, Microseconds, Moment, Positive, Seconds, Text
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Build, Machine, RecordPart, StoredRecord, now
from fpxbench.records.verdict import Status, Verdict
from fpxbench.stats import Ratio

if TYPE_CHECKING:
    from fpxbench.builds.timeline import Entry

Metric = Literal["time", "verdict"]
Side = Literal["good", "bad"]
Counts = Annotated[dict[Label, Count], Field(max_length=100)]


class ConfirmationOutcome(StrEnum):
    """Outcome of a confirmation: docs/decision-rule.md, "Confirmation"."""

    CONFIRMED = "confirmed"
    REFUTED = "refuted"
    UNDECIDED = "undecided"


class ConfirmationRun(RecordPart):
    """One run, in its own process, on one of the builds."""

    side: Side
    status: Status
    kind: Kind | None = None
    median_us: Microseconds | None = None
    baseline_us: Microseconds | None = None
    seed: Integer | None = None


class Interval(RecordPart):
    """A ratio of the bad build to the good one, with its interval."""

    value: Positive
    low: Finite | None = None
    high: Finite | None = None
    """None if there are too few pairs for the level."""
    level: Finite
    pairs: Count

    @classmethod
    def of(cls, ratio: Ratio) -> Interval:
        ends = (ratio.low, ratio.high) if ratio.known else (None, None)
        return cls(value=ratio.value, low=ends[0], high=ends[1], level=ratio.level, pairs=ratio.pairs)

    def __str__(self) -> str:
        low, high = self.low, self.high
        if low is None or high is None:
            low, high = 0.0, float("inf")
        return str(Ratio(self.value, low, high, self.level, self.pairs))


class Confirmation(StoredRecord):
    """Result of running two builds, interleaved, on one machine, to confirm a suspected change."""

    FOLDER: ClassVar[str] = "confirmations"

    started_at: Moment = Field(default_factory=now)
    suspect: Label | None = None
    """The id of the suspect, if it came from the detector."""
    case: Case
    metric: Metric
    machine: Machine
    good: Build
    build: Build
    """The bad build: the first with the change."""
    outcome: ConfirmationOutcome
    message: Text = Field(alias="said")
    """``+6.1% [5.2, 7.0]``, or ``crash in 5 of 5 runs, ok in 5 of 5 before``."""
    time: Interval | None = None
    """Ratio of the bad build's time to the good one's."""
    control: Interval | None = None
    """The same for the dense product in the same processes."""
    least: Finite | None = None
    """The smallest change that would have been confirmed, as a logarithm."""
    good_counts: Counts = Field(default_factory=dict)
    bad_counts: Counts = Field(default_factory=dict)
    """Number of runs by status and kind."""
    chance: Finite | None = None
    """Probability of such verdict counts if both builds fail equally often (Fisher's exact test)."""
    flaky: bool = False
    """Whether one build gave different verdicts."""
    evidence: Verdict | None = None
    """The bad build's verdict, if it failed."""
    runs: Annotated[list[ConfirmationRun], Field(max_length=10_000)] = Field(default_factory=list)
    elapsed_s: Seconds = 0.0

    @property
    def id(self) -> str:
        """A later confirmation of the same question replaces the earlier one."""
        return self.suspect or f"{self.case.id} {self.metric} since {self.good.label}"

    @property
    def headline(self) -> str:
        """``confirmed +6.1% [5.2, 7.0]``."""
        return f"{self.outcome} {self.message}"

    @property
    def direction(self) -> Literal["worse", "better"]:
        """``worse``: slower or failing. ``better``: faster or fixed."""
        if self.time is not None:
            return "worse" if self.time.value > 1 else "better"
        return "better" if self.bad_counts.get("ok") and not self.good_counts.get("ok") else "worse"

    @property
    def upstream(self) -> str | None:
        """URL of PyTorch's commits between the builds."""
        return upstream_range(self.good, self.build)

    @property
    def verdict(self) -> Verdict:
        return self.evidence or Verdict(status=Status.OK, summary=self.headline)


def upstream_range(good: Build | Entry, bad: Build | Entry) -> str | None:
    """Return the URL of PyTorch's commits between two builds; None if a commit is unknown or both are the same."""
    if not good.git or not bad.git or good.git == bad.git:
        return None
    return f"https://github.com/pytorch/pytorch/compare/{good.git}...{bad.git}"

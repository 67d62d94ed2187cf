"""Reports of changes in a series, as JSON with a stable id.

`fpxbench confirm` takes a `Suspect`; docs/decision-rule.md explains its fields.
"""

from __future__ import annotations

import hashlib
import json
import math
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, computed_field

from fpxbench.records.fields import Finite, Positive, Text
from fpxbench.records.record import Build
from fpxbench.regressions.confirmation import ConfirmationOutcome


class Direction(StrEnum):
    """The direction of a change, from a user's point of view."""

    WORSE = "worse"
    BETTER = "better"
    OTHER = "other"
    """Neither: a different kind of failure or message."""


class State(StrEnum):
    """State of a reported change."""

    OPEN = "open"               # not rerun
    CONFIRMED = "confirmed"
    UNDECIDED = "undecided"     # rerun without a clear result
    REFUTED = "refuted"
    FIXED = "fixed"             # a later build changed back


class Series(BaseModel):
    """One metric of one case on one machine."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    machine: str
    device: str
    """The device's own name, with its arch: two devices under one machine name are two series."""
    variant: str
    channel: str
    case: str
    metric: str
    """A field of the record (``median_us``, ``packed_bytes``), or ``verdict``."""


class ChangeReport(BaseModel):
    """A change between two builds of one series."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    series: Series
    direction: Direction
    last_good: Build
    """The last measured build before the change."""
    first_bad: Build
    """The first measured build after the change; for an improvement, the first better build."""
    last_good_tag: str
    first_bad_tag: str
    implementation_changed: bool = False
    """Whether the implementation's source differs between the two builds: the cause may then not be PyTorch."""
    outcome: ConfirmationOutcome | None = None
    """The outcome of its last confirmation; None without one."""
    message: Text = Field(default="", alias="said")
    """The headline of that confirmation: ``confirmed +6.1% [5.2, 7.0]``."""
    ended_at: Build | None = None
    """The first build on which the change is over. A suspect ends with its next change in the other direction. An event
    for the worse ends when its metric is nearer to the value before than to the value after, or its verdict is no worse
    than before; other events do not end."""

    @computed_field
    @property
    def id(self) -> str:
        """Ten hex digits, the same on every machine and in every run."""
        known = [*self.series.model_dump().values(), self.last_good.key, self.first_bad.key, str(self.direction)]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:10]

    @property
    def state(self) -> State:
        if self.outcome is ConfirmationOutcome.REFUTED:
            return State.REFUTED
        if self.ended_at is not None:
            return State.FIXED
        return State(self.outcome) if self.outcome else State.OPEN

    @property
    def stands(self) -> bool:
        """Whether it is neither refuted nor ended."""
        return self.state not in (State.REFUTED, State.FIXED)


class Suspect(ChangeReport):
    """A change in time that the rule finds: confirm it (`fpxbench confirm`) before reporting it."""

    surely_good: Build
    """A few builds before `last_good`, since the rule may misplace a change by some builds. Rerun `surely_good` and
    `raised_at`; `fpxbench bisect` finds the build between them."""
    raised_at: Build
    """The build at which the change became clear, surely at the new level."""
    change: Finite
    """Relative change: 0.061 is 6.1% more time, -0.06 is 6% less."""
    interval: tuple[Finite, Finite]
    """95% interval of `change`, from the series' own noise."""
    z: Finite
    """The change in standard errors."""
    chance: Finite = Field(ge=0, le=1)
    """Probability that one test of the rule finds as much in noise alone."""
    noise: Positive
    """Relative σ of one build."""
    builds_before: int
    builds_after: int
    """How many builds showed the change when it was raised."""
    control: Finite | None = None
    """Relative change of the dense baseline over the same builds; None if it was not measured."""


class Event(ChangeReport):
    """A change that needs no statistics: a different verdict, message or exact metric."""

    before: str
    after: str
    """The two values as text: ``ok``, ``crash (compiler_abort): died by SIGABRT: …``, ``3``."""
    severity: int
    """Lower is worse; orders events."""
    changes_before: int = 0
    """How often this series changed in the `events.RECENT` builds before; marks flaky series."""


class MachineMove(BaseModel):
    """One report for all cases whose time moved with the dense baseline: caused by the machine or the dense product."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    machine: str
    device: str
    variant: str
    channel: str
    first: Build
    first_tag: str
    cases: int
    """How many cases moved."""
    change: Finite
    """Relative change of their time; the median over the cases."""
    control: Finite
    """The same for the baseline's time."""


def share(log_ratio: float) -> float:
    """Convert the logarithm of a ratio to a relative change: 0.06 is 6% more."""
    return math.expm1(log_ratio)

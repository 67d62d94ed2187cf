"""Changes of a series as stored and passed on: JSON in and out, with a stable id.

`fpxbench confirm` takes a `Suspect`; docs/decision-rule.md says what its fields mean.
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
    """Neither: another kind of failure, another text."""


class State(StrEnum):
    """State of a reported change."""

    OPEN = "open"               # not run again
    CONFIRMED = "confirmed"
    UNDECIDED = "undecided"     # run again, and not clear
    REFUTED = "refuted"
    FIXED = "fixed"             # a later build changed back


class Series(BaseModel):
    """One metric of one case on one machine."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    machine: str
    device: str
    """As it calls itself, with its arch: two devices of one machine name are two series."""
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
    """The last build before the change that was measured."""
    first_bad: Build
    """The first build after it. Of an improvement too: then it is the first better one."""
    last_good_tag: str
    first_bad_tag: str
    implementation_changed: bool = False
    """The implementation's own source is another one in these two builds, so that it may be that and not PyTorch."""
    outcome: ConfirmationOutcome | None = None
    """Of the last confirmation that was about it; None before there is one."""
    message: Text = Field(default="", alias="said")
    """Its headline: ``confirmed +6.1% [5.2, 7.0]``."""
    ended_at: Build | None = None
    """The first build on which it is over. Of a suspect: that of its next change in the other direction. Of an event:
    the one whose metric is nearer to the value before than to the value after, or whose verdict is no worse than
    before; an event that is not for the worse has none."""

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
    """A change of the time that the rule finds: confirm it (`fpxbench confirm`) before reporting it."""

    surely_good: Build
    """A build a few before `last_good`: the rule may place a change some builds late or early. Run `surely_good` and
    `raised_at` again; `fpxbench bisect` finds the build between them."""
    raised_at: Build
    """The build at which it became clear, surely at the new level."""
    change: Finite
    """As a share: 0.061 is 6.1% more time, -0.06 is 6% less."""
    interval: tuple[Finite, Finite]
    """95% interval of `change`, from the series' own noise."""
    z: Finite
    """Standard errors."""
    chance: Finite = Field(ge=0, le=1)
    """How often one test of the rule finds as much in noise alone."""
    noise: Positive
    """σ of one build, as a share."""
    builds_before: int
    builds_after: int
    """How many builds show it: its persistence when it was raised."""
    control: Finite | None = None
    """What the dense baseline did over the same builds, as a share; None where it was not measured."""


class Event(ChangeReport):
    """A change that needs no statistics: another verdict, message or exact metric."""

    before: str
    after: str
    """As shown: ``ok``, ``crash (compiler_abort): died by SIGABRT: …``, ``3``."""
    severity: int
    """Lower is worse; orders events."""
    changes_before: int = 0
    """How often this series changed in the `events.RECENT` builds before: what comes and goes is no news."""


class MachineMove(BaseModel):
    """The dense baseline moved with the cases: the machine, or PyTorch's dense product. One report for all of them."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    machine: str
    device: str
    variant: str
    channel: str
    first: Build
    first_tag: str
    cases: int
    """How many cases it explains."""
    change: Finite
    """Of their time, as a share; the median over the cases."""
    control: Finite
    """Of the baseline's, likewise."""


def share(log_ratio: float) -> float:
    """Return a logarithm of a ratio as a share: 0.06 is 6% more."""
    return math.expm1(log_ratio)

"""The specification of an environment (its packages), and its stored state."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Literal

from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field

from fpxbench.builds.timeline import Entry, Pins
from fpxbench.builds.timeline.entry import DEFAULT_VARIANT
from fpxbench.records.record import Build

SCHEMA = 1
PARTS = ("torch", "triton")
"""The parts of a build."""


class NotOffered(ValueError):
    """No index offers the build or variant: it was built from source, or not for this variant."""


class EnvironmentSpec(BaseModel):
    """One build for one variant under this Python, or some of its parts."""

    model_config = ConfigDict(frozen=True)

    key: str
    """The build's commit."""
    tag: str
    """The build's name on the timeline."""
    build: Build
    """The timeline's description, shown for a build that cannot be installed."""
    variant: str
    """As wheels name it: ``cpu``, ``cu130``, or ``default`` for a wheel that names none."""
    parts: tuple[str, ...] = PARTS
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    requirements: tuple[str, ...]
    """``torch==2.13.0+cpu``, ``triton==3.7.1``."""
    arguments: tuple[str, ...] = ()
    """Options of pip and uv that name indexes."""

    @property
    def name(self) -> str:
        """The environment's folder: ``2.13.0-cpu-py3.11``, ``nightly-20261120-cu130-py3.12-triton``."""
        parts = "" if self.parts == PARTS else "-" + "-".join(self.parts)
        return f"{self.tag}-{self.variant}-py{self.python}{parts}"


class EnvironmentState(BaseModel):
    """``environment.json``: written last, so that an environment without it is unfinished."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    schema_version: int = Field(default=SCHEMA, alias="schema", ge=1, le=SCHEMA)
    spec: EnvironmentSpec = Field(alias="wanted")
    status: Literal["ready", "failed"]
    why: str = ""
    """Why it failed, in one sentence."""
    log_tail: str = ""
    """The installer's last lines, if it failed."""
    build: Build | None = None
    """The build that its PyTorch reports; None without PyTorch."""
    installer: str = ""
    shared: str = ""
    """`shared_packages.fingerprint` of the linked distributions."""
    made_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float = 0.0

    @property
    def age_s(self) -> float:
        return (datetime.now(UTC) - datetime.fromisoformat(self.made_at)).total_seconds()


def parts_named(text: str) -> tuple[str, ...]:
    """Return the parts in a list like ``torch,triton``. Raise ValueError for an unknown one."""
    named = {word.strip() for word in text.split(",") if word.strip()}
    if not named or not named <= set(PARTS):
        raise ValueError(f"FPX_PARTS={text!r}: parts of a build are {' and '.join(PARTS)}, separated by a comma")
    return tuple(part for part in PARTS if part in named)


def environment_spec(entry: Entry, variant: str | None = None, parts: tuple[str, ...] = PARTS) -> EnvironmentSpec:
    """Return the environment of `entry` for `variant` (None: what pip would choose).

    A build that no synced index lists is requested by its version. Raise NotOffered for a source build, and for a
    variant that the indexes do not list.
    """
    if entry.channel == "source":
        raise NotOffered(f"{entry.tag} was built from source, and no index has it: run fpxbench in its own Python")
    pins = entry.pins(variant)
    if pins is None and entry.variants:
        raise NotOffered(f"{entry.tag} has no variant {variant!r}: the indexes list {', '.join(entry.variants)}")
    if pins is None:
        pins = _unread(entry, variant)
    by_part = {"torch": pins.torch, "triton": pins.triton}
    if "torch" not in parts and by_part["triton"] is None:
        raise NotOffered(f"the Triton of {entry.tag} is unknown: `fpxbench timeline sync` reads it from the index")
    version = entry.torch if pins.variant == DEFAULT_VARIANT else f"{entry.torch}+{pins.variant}"
    return EnvironmentSpec(
        key=entry.key, tag=entry.tag, variant=pins.variant, parts=parts, arguments=pins.arguments,
        build=Build(torch=version, triton=entry.own_triton, git=entry.git, channel=entry.channel, variant=pins.variant,
                    date=entry.date, key=entry.key),
        requirements=tuple(by_part[part] for part in parts if by_part[part]),
    )


def _unread(entry: Entry, variant: str | None) -> Pins:
    named = variant is not None and variant != DEFAULT_VARIANT
    triton = f"triton=={entry.own_triton}" if entry.own_triton and not Version(entry.own_triton).local else None
    return Pins(variant or DEFAULT_VARIANT, f"torch=={entry.torch}+{variant}" if named else f"torch==={entry.torch}",
                triton)

"""An entry of the timeline: a build's identity, date, wheels, and the Triton that it is paired with.

All of this may become known late, or on one machine only, and none of it changes the build's hash.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date as Date, timedelta
from functools import cache, cached_property
from typing import Annotated, Self

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fpxbench.builds.timeline.commit import as_json, commit_hash, identity, tag_name
from fpxbench.records.record import Build

DEFAULT_VARIANT = "default"
"""The variant of a wheel whose version names no device, as ``pip install torch`` installs on this platform."""

NO_TRITON = "none"
UNKNOWN_TRITON = "untold"
"""Stands for a Triton that only the whole wheel's metadata names."""


def _day(text: str) -> str:
    """Return `text`. Raise ValueError unless it is a day with which git can date a commit."""
    if Date.fromisoformat(text) < EPOCH or len(text) != len("YYYY-MM-DD"):
        raise ValueError(f"{text!r} is not a day such as {EPOCH.isoformat()} or later")
    return text


def _version(text: str) -> str:
    Version(text)  # InvalidVersion is a ValueError
    return text


EPOCH = Date(1970, 1, 1)
Day = Annotated[str, AfterValidator(_day)]
"""YYYY-MM-DD."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Wheel(_Part):
    """One file that an index lists."""

    filename: str
    sha256: str = ""
    """Empty if the index has none: then the file cannot be verified."""
    yanked: bool = False

    @property
    def version(self) -> Version:
        return parse_wheel_filename(self.filename)[1]

    @property
    def variant(self) -> str:
        """The device in its version: ``cpu``, ``cu130``, or ``default`` for none."""
        return self.version.local or DEFAULT_VARIANT

    @property
    def fits(self) -> bool:
        """Whether this Python on this platform can install it."""
        return _fits(self.filename)


class IndexedBuild(_Part):
    """A build as one index lists it, or last listed it."""

    arguments: tuple[str, ...] = ()
    """The options with which pip looks there; empty if its own configuration names the index."""
    wheels: tuple[Wheel, ...] = ()
    triton: dict[str, str] = Field(default_factory=dict)
    """By variant, the Triton that the wheel requires (``triton==3.7.1``), `NO_TRITON` or `UNKNOWN_TRITON`; absent until
    its metadata is read.
    """
    vanished: Day | None = None
    """The day since which the index no longer lists it."""


class Failure(_Part):
    """A failed installation."""

    day: Day
    log_tail: str
    """The installer's last lines."""


@dataclass(frozen=True)
class Pins:
    """The requirements that install one variant of a build."""

    variant: str
    torch: str
    """A requirement: ``torch==2.15.0.dev20261120+cu130``."""
    triton: str | None
    """A requirement; None if this variant requires none and the build's Triton is unknown."""
    arguments: tuple[str, ...] = ()
    """Options of pip and uv: ``--extra-index-url URL``."""

    @property
    def requirements(self) -> str:
        """The text of a requirements file."""
        pairs = [" ".join(self.arguments[i:i + 2]) for i in range(0, len(self.arguments), 2)]
        return "".join(f"{line}\n" for line in (*pairs, self.torch, self.triton) if line)


class Entry(_Part):
    """One build on a timeline."""

    channel: str
    torch: Annotated[str, AfterValidator(_version)]
    """The version: without its variant for a release or a nightly, in full for a source build."""
    git: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")] | None = None
    """The upstream commit."""
    triton: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+!-]{1,80}$")] | None = None
    """The version of the Triton that was installed with it; see `own_triton` for the one that its publisher pairs it
    with.
    """
    date: Day | None = None
    """The day of its publication."""
    seen: Day | None = None
    """A day by which it was published, while `date` is unknown."""
    sources: dict[str, IndexedBuild] = Field(default_factory=dict)
    """By address of the index, without credentials."""
    failures: dict[str, Failure] = Field(default_factory=dict)
    """By variant."""
    day: str = Field(default="", exclude=True)
    """Its position in the order (`in_order`)."""
    shares_tag: bool = Field(default=False, exclude=True)
    """Whether a build of an earlier version has the same tag: nightlies of one day can be of two versions."""

    @classmethod
    def of(cls, build: Build, today: str) -> Self:
        """Return the entry of an installed build, or of a record's; `today` replaces an unknown date.

        Raise ValueError (pydantic's) for an impossible build, which a record from elsewhere may have.
        """
        # A CPU build works with any Triton, so that the installed one is not a property of the build.
        triton = build.triton if build.channel == "source" or build.variant != "cpu" else None
        return cls(channel=build.channel, torch=build.label, git=build.git, triton=triton, date=build.date,
                   seen=None if build.date else today)

    @property
    def label(self) -> str:
        return self.torch

    @cached_property
    def key(self) -> str:
        """Its commit."""
        return commit_hash(self)

    @property
    def tag(self) -> str:
        return f"{tag_name(self)}-{self.torch}" if self.shares_tag else tag_name(self)

    @cached_property
    def version(self) -> Version:
        return Version(self.torch)

    @property
    def dated(self) -> bool:
        return self.date is not None

    @property
    def own_triton(self) -> str | None:
        """The version of its publisher's Triton: the one that its wheels require, else the one installed with it."""
        versions = (_required_version(source.triton[variant]) for source in self.sources.values()
                    for variant in sorted(source.triton, key=_preference))
        return next(filter(None, versions), self.triton)

    @property
    def wheels(self) -> list[Wheel]:
        """The wheels that an index lists now; those last listed if the build has vanished."""
        listing = [source for source in self.sources.values() if not source.vanished] or self.sources.values()
        return list({wheel.filename: wheel for source in listing for wheel in source.wheels}.values())

    @property
    def vanished(self) -> str | None:
        """The day since which no index lists it; None while one does."""
        days = [source.vanished for source in self.sources.values() if source.vanished]
        return max(days) if days and len(days) == len(self.sources) else None

    @property
    def yanked(self) -> bool:
        """Whether its publisher withdrew every wheel."""
        return bool(self.wheels) and all(wheel.yanked for wheel in self.wheels)

    @property
    def marks(self) -> list[str]:
        """Short remarks about why it may not be measurable here."""
        found = []
        if self.vanished:
            found.append(f"gone from the index since {self.vanished}")
        if self.yanked:
            found.append("yanked")
        if self.sources and not any(wheel.fits for wheel in self.wheels):
            found.append(f"no wheel for Python {sys.version_info.major}.{sys.version_info.minor} here")
        if any(not wheel.sha256 for address, source in self.sources.items() if not address.startswith("file:")
               for wheel in source.wheels):
            found.append("listed without a hash")
        found += [f"{variant} failed to install on {failure.day}" for variant, failure in sorted(self.failures.items())]
        return found

    @property
    def variants(self) -> dict[str, Pins]:
        """The requirements that install it, by variant, those for GPUs first.

        If several indexes have a variant, one that still lists it and is in pip's own configuration is preferred.
        """
        found: dict[str, tuple[Wheel, IndexedBuild]] = {}
        for source in sorted(self.sources.values(), key=lambda source: (bool(source.vanished), bool(source.arguments))):
            for wheel in source.wheels:
                found.setdefault(wheel.variant, (wheel, source))
        own = self.own_triton
        return {variant: _pins(*found[variant], own) for variant in sorted(found, key=_preference)}

    def pins(self, variant: str | None = None) -> Pins | None:
        """Return the requirements that install `variant` (None: pip's choice); None if no synced index has it."""
        if variant is not None:
            return self.variants.get(variant)
        return next(iter(self.variants.values()), None)

    def merge(self, other: Entry) -> Entry:
        """Return this entry merged with `other`, of the same build. An index's newer listing replaces its older one."""
        sources = dict(self.sources)
        for address, new in other.sources.items():
            old = sources.get(address, IndexedBuild())
            sources[address] = new.model_copy(update={"triton": old.triton | new.triton})
        date = min(filter(None, (self.date, other.date)), default=None)
        merged: dict[str, object] = {
            "date": date,
            "seen": None if date else min(filter(None, (self.seen, other.seen)), default=None),
            "sources": sources,
            "failures": self.failures | other.failures,
        }
        if self.channel != "source":  # a source build's identity includes them
            merged |= {"git": self.git or other.git, "triton": self.triton or other.triton}
        return Entry.model_validate(self.model_dump() | merged)

    def files(self) -> dict[str, str]:
        """Return its commit's files: ``build.json``, ``requirements.txt``, and one requirements file for each known
        variant.
        """
        requirements = {f"requirements-{variant}.txt": pins.requirements for variant, pins in self.variants.items()}
        return {
            "build.json": as_json(identity(self) | self.model_dump(exclude_defaults=True)),
            "requirements.txt": next(iter(requirements.values()), f"torch=={self.torch}\n"),
            **requirements,
        }


def _preference(variant: str) -> tuple[int, str]:
    devices = (DEFAULT_VARIANT, "cu", "rocm", "xpu", "cpu")
    device = re.sub(r"\d.*", "", variant)
    return devices.index(device) if device in devices else len(devices), variant


def _pins(wheel: Wheel, source: IndexedBuild, own_triton: str | None) -> Pins:
    # `==2.13.0` also matches 2.13.0+cpu, which pip prefers.
    operator = "==" if wheel.version.local else "==="
    requirement = source.triton.get(wheel.variant, UNKNOWN_TRITON)
    triton = None
    if version := _required_version(requirement):
        triton = f"{Requirement(requirement).name}=={version}"
    elif own_triton and not Version(own_triton).local:
        # A Triton of an unreleased commit is on the index of the variant that requires it, perhaps not on this one's.
        triton = f"triton=={own_triton}"
    return Pins(wheel.variant, f"torch{operator}{wheel.version}", triton, source.arguments)


def _required_version(requirement: str) -> str | None:
    """Return the version that a requirement pins, or the lowest of its range.

    Since 2.14 PyTorch requires ``triton~=3.8.0``. The lowest is the one that it was published with, and stays the same
    when later ones appear.
    """
    if requirement in (NO_TRITON, UNKNOWN_TRITON):
        return None
    lowest = [clause.version for clause in Requirement(requirement).specifier
              if clause.operator in ("==", "===", "~=", ">=")]
    return lowest[0] if len(lowest) == 1 and "*" not in lowest[0] else None


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Return `entries` oldest first, each with its day and a unique tag.

    The day on which a build was first seen can be far too late (an old release, installed yesterday), so it is moved
    before that of every later version.
    """
    ordered: list[Entry] = []
    earliest: Date | None = None
    latest_first = sorted(entries, key=lambda entry: (entry.version, entry.key), reverse=True)
    owners = {tag_name(entry): entry.key for entry in latest_first}
    for entry in latest_first:
        day = Date.fromisoformat(entry.date or entry.seen or EPOCH.isoformat())
        if not entry.dated and earliest is not None:
            day = max(min(day, earliest - timedelta(days=1)), EPOCH)
        earliest = min(day, earliest) if earliest else day
        ordered.append(entry.model_copy(update={"day": day.isoformat(),
                                                "shares_tag": owners[tag_name(entry)] != entry.key}))
    return sorted(ordered, key=lambda entry: (entry.day, entry.version))


@cache
def _supported_tags() -> frozenset:
    return frozenset(sys_tags())


@cache
def _fits(filename: str) -> bool:
    try:
        return not _supported_tags().isdisjoint(parse_wheel_filename(filename)[3])
    except InvalidWheelFilename:
        return False

"""What is known of one build, beyond which build it is: when it came out, where it is to be had, what it is paired with.

All of it may be learnt late, on one machine and not on another, and none of it reaches the build's hash.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date as Date, timedelta
from functools import cached_property, lru_cache
from typing import Annotated, Self

from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fpxbench.builds.timeline.commit import as_json, commit_hash, identity, tag_name
from fpxbench.records.record import Build

DEFAULT_VARIANT = "default"
"""A wheel whose version names no device: what ``pip install torch`` brings on this platform."""

NO_TRITON = "none"
UNTOLD = "untold"
"""The index was asked for a wheel's metadata, and does not give it away without the whole wheel."""


def _day(text: str) -> str:
    """Raises ValueError for what is no day, or one that git cannot date a commit with."""
    if Date.fromisoformat(text) < EPOCH or len(text) != len("YYYY-MM-DD"):
        raise ValueError(f"{text!r} is no day as in {EPOCH.isoformat()} or later")
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
    """Empty where the index gives none: then nothing tells whether the file is the one that was listed."""
    yanked: bool = False

    @property
    def version(self) -> Version:
        return parse_wheel_filename(self.filename)[1]

    @property
    def variant(self) -> str:
        """What it was made for, as its version says: ``cpu``, ``cu130``, ``default``."""
        return self.version.local or DEFAULT_VARIANT

    @property
    def fits(self) -> bool:
        """This Python on this platform can install it."""
        return _fits(self.filename)


class Source(_Part):
    """A build as one index lists it, or listed it when it was last there."""

    arguments: tuple[str, ...] = ()
    """What pip must be told to look there; nothing where its own configuration names the place."""
    wheels: tuple[Wheel, ...] = ()
    triton: dict[str, str] = Field(default_factory=dict)
    """By variant, the Triton that the wheel asks for (``triton==3.7.1``), `NO_TRITON` or `UNTOLD`; absent while nobody has asked."""
    vanished: Day | None = None
    """On which the index was found not to list it any more."""


class Failure(_Part):
    """An installation that did not succeed."""

    day: Day
    log_tail: str
    """The installer's last lines."""


@dataclass(frozen=True)
class Pins:
    """What installs one variant of a build."""

    variant: str
    torch: str
    """A requirement: ``torch==2.15.0.dev20261120+cu130``."""
    triton: str | None
    """A requirement, or None where this variant brings none and none is known to belong to the build."""
    arguments: tuple[str, ...] = ()
    """Options of pip and uv: ``--extra-index-url URL``."""

    @property
    def requirements(self) -> str:
        """Text of a requirements file."""
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
    """The version of the Triton that stood beside it where it was installed. What it is paired with by its publisher: `own_triton`."""
    date: Day | None = None
    """On which it came out."""
    seen: Day | None = None
    """By which it had come out, as long as `date` is not known."""
    sources: dict[str, Source] = Field(default_factory=dict)
    """By the address of the index, credentials removed."""
    failures: dict[str, Failure] = Field(default_factory=dict)
    """By variant."""
    day: str = Field(default="", exclude=True)
    """Its place in the order (`in_order`)."""
    shares_tag: bool = Field(default=False, exclude=True)
    """A build of an earlier version has the tag that this one would have: nightlies of one day can be of two versions."""

    @classmethod
    def of(cls, build: Build, today: str) -> Self:
        """What an installed build, or a record's, tells of itself; `today` stands in for a date that it does not tell.

        Raises ValueError (pydantic's) for a build that cannot be, which a record from elsewhere may name.
        """
        # A CPU build takes any Triton, and the one beside it says nothing about the build.
        triton = build.triton if build.channel == "source" or build.variant != "cpu" else None
        return cls(channel=build.channel, torch=build.label, git=build.git, triton=triton, date=build.date, seen=None if build.date else today)

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
        """The version of the Triton that it came out with: what its wheels ask for, else what stood beside it."""
        asked = (_asked_version(source.triton[variant]) for source in self.sources.values() for variant in sorted(source.triton, key=_preference))
        return next(filter(None, asked), self.triton)

    @property
    def wheels(self) -> list[Wheel]:
        """Those that are listed somewhere now, or were when they were last seen if the build has vanished."""
        listing = [source for source in self.sources.values() if not source.vanished] or self.sources.values()
        return list({wheel.filename: wheel for source in listing for wheel in source.wheels}.values())

    @property
    def vanished(self) -> str | None:
        """The day since when no index that has listed it does, if it is so."""
        days = [source.vanished for source in self.sources.values()]
        return max(days) if days and all(days) else None

    @property
    def yanked(self) -> bool:
        """Its publisher withdrew it: every wheel."""
        return bool(self.wheels) and all(wheel.yanked for wheel in self.wheels)

    @property
    def marks(self) -> list[str]:
        """What stands between this build and a measurement here, in a few words each."""
        found = []
        if self.vanished:
            found.append(f"gone from the index since {self.vanished}")
        if self.yanked:
            found.append("yanked")
        if self.sources and not any(wheel.fits for wheel in self.wheels):
            found.append(f"no wheel for Python {sys.version_info.major}.{sys.version_info.minor} here")
        if any(not wheel.sha256 for address, source in self.sources.items() if not address.startswith("file:") for wheel in source.wheels):
            found.append("listed without a hash")
        found += [f"{variant} failed to install on {failure.day}" for variant, failure in sorted(self.failures.items())]
        return found

    @property
    def variants(self) -> dict[str, Pins]:
        """What installs it, by variant; those that a GPU can use come first.

        Where several indexes have a variant, one that lists it still, and that pip knows by itself, is preferred.
        """
        found: dict[str, tuple[Wheel, Source]] = {}
        for source in sorted(self.sources.values(), key=lambda source: (bool(source.vanished), bool(source.arguments))):
            for wheel in source.wheels:
                found.setdefault(wheel.variant, (wheel, source))
        own = self.own_triton
        return {variant: _pins(*found[variant], own) for variant in sorted(found, key=_preference)}

    def pins(self, variant: str | None = None) -> Pins | None:
        """What installs `variant`, or what pip would choose; None where no index that was read has it."""
        if variant is not None:
            return self.variants.get(variant)
        return next(iter(self.variants.values()), None)

    def merge(self, other: Entry) -> Self:
        """This entry with what `other`, of the same build, knows besides. What an index says now replaces what it said before."""
        sources = dict(self.sources)
        for address, new in other.sources.items():
            old = sources.get(address, Source())
            sources[address] = new.model_copy(update={"triton": old.triton | new.triton})
        date = min(filter(None, (self.date, other.date)), default=None)
        learnt: dict[str, object] = {
            "date": date,
            "seen": None if date else min(filter(None, (self.seen, other.seen)), default=None),
            "sources": sources,
            "failures": self.failures | other.failures,
        }
        if self.channel != "source":  # there they are part of which build it is
            learnt |= {"git": self.git or other.git, "triton": self.triton or other.triton}
        return Entry.model_validate(self.model_dump() | learnt)

    def files(self) -> dict[str, str]:
        """What its commit shows: ``build.json``, ``requirements.txt``, and a requirements file for each variant that is known."""
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


def _pins(wheel: Wheel, source: Source, own_triton: str | None) -> Pins:
    # `==2.13.0` would admit 2.13.0+cpu, and pip prefers that one.
    operator = "==" if wheel.version.local else "==="
    asked = source.triton.get(wheel.variant, UNTOLD)
    triton = None
    if version := _asked_version(asked):
        triton = f"{Requirement(asked).name}=={version}"
    elif own_triton and not Version(own_triton).local:
        # A Triton of an unreleased commit is on the index of the variant that asks for it, and perhaps not on this one's.
        triton = f"triton=={own_triton}"
    return Pins(wheel.variant, f"torch{operator}{wheel.version}", triton, source.arguments)


def _asked_version(asked: str) -> str | None:
    """The version that a requirement pins or, of a range, its lowest.

    From 2.14 on PyTorch asks for ``triton~=3.8.0``. The lowest is the one that it came out with, and stays the same when more come.
    """
    if asked in (NO_TRITON, UNTOLD):
        return None
    lowest = [clause.version for clause in Requirement(asked).specifier if clause.operator in ("==", "===", "~=", ">=")]
    return lowest[0] if len(lowest) == 1 and "*" not in lowest[0] else None


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Oldest first, each with its day and a tag of its own.

    A day that only says when a build was first seen can be far too late (an old release, installed yesterday), so it is moved
    back to before every later version.
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
        ordered.append(entry.model_copy(update={"day": day.isoformat(), "shares_tag": owners[tag_name(entry)] != entry.key}))
    return sorted(ordered, key=lambda entry: (entry.day, entry.version))


@lru_cache(maxsize=1)
def _supported() -> frozenset:
    return frozenset(sys_tags())


@lru_cache(maxsize=None)
def _fits(filename: str) -> bool:
    try:
        return not _supported().isdisjoint(parse_wheel_filename(filename)[3])
    except InvalidWheelFilename:
        return False

"""Fill the timeline from package indexes.

The pages are read first, each completely or not at all, and their builds are added to the timeline at once. Then the
metadata of wheels that is still unknown is read, newest first, and stored every few seconds: an interrupted sync keeps
what it has read, and the next one continues. A sync that finds nothing new reads the pages only.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime

from packaging.version import InvalidVersion, Version

from fpxbench.builds.index.fetch import Fetcher, NotThere, Unreachable
from fpxbench.builds.index.listing import IndexLocation, ListedWheel, Listing, read_listing
from fpxbench.builds.index.wheel_metadata import read_wheel_metadata
from fpxbench.builds.installed import channel_and_date
from fpxbench.builds.timeline.entry import Entry, IndexedBuild, in_order
from fpxbench.builds.timeline.repository import Timeline
from fpxbench.counted import counted

_STORE_EVERY_S = 10.0
_GIVE_UP_AFTER = 3
"""Number of wheels in a row that may fail."""


@dataclass(frozen=True)
class SyncFilter:
    """Which of the listed builds are added."""

    channels: frozenset[str] = frozenset({"release", "nightly"})
    since: date | Version | None = None
    keep: int | None = None
    """How many of the newest builds of each channel to add; known builds stay."""
    git: bool = False
    """Whether to read their upstream commits too, which are inside the wheels."""


ALL_BUILDS = SyncFilter()


@dataclass
class SyncResult:
    """What a sync changed; builds are named by their tags."""

    added: list[str] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    asked: int = 0
    """Wheels whose metadata was requested."""
    read: dict[str, int] = field(default_factory=dict)
    """The number of builds that each index lists."""
    problems: list[str] = field(default_factory=list)
    """Failed reads, a sentence each. The next sync tries again."""
    remarks: list[str] = field(default_factory=list)
    """Unusual findings, a sentence each."""


def parse_since(text: str) -> date | Version:
    """Return the day or the version of ``2026-01-01`` or ``2.9``. Raise ValueError."""
    try:
        return date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text) else Version(text)
    except (ValueError, InvalidVersion):
        raise ValueError(f"--since {text!r}: a day such as 2026-01-01, or a version such as 2.9") from None


def sync(
    timeline: Timeline,
    locations: Iterable[IndexLocation],
    fetcher: Fetcher,
    which: SyncFilter = ALL_BUILDS,
    progress: Callable[[int, int, str], None] = lambda done, total, tag: None,
) -> SyncResult:
    """Add the builds that `locations` list, and read their metadata.

    Calls ``progress(done, total, tag)`` for each wheel that is read. What cannot be read is a sentence in the result's
    `problems`. Raise TimelineError if the timeline cannot be written.
    """
    result = SyncResult()
    listings = []
    for location in locations:
        try:
            listings.append(read_listing(location, fetcher))
        except Unreachable as error:
            result.problems.append(str(error))
    if listings and not result.problems and not any(listing.wheels for listing in listings):
        addresses = ", ".join(listing.location.address for listing in listings)
        result.problems.append(f"none of {addresses} lists a wheel of PyTorch for Linux")
    known = {entry.key: entry for entry in timeline.entries()}
    found: dict[str, Entry] = {}
    wheels: dict[tuple[str, str], dict[str, ListedWheel]] = {}
    for listing in listings:
        entries, of_listing = _builds(listing, result)
        wheels |= of_listing
        for entry in entries:
            found[entry.key] = found[entry.key].merge(entry) if entry.key in found else entry
        result.remarks += _replaced(entries, known)
    missing = [entry for listing in listings for entry in _vanished(listing, known, found, result)]
    chosen = [entry for entry in _chosen(in_order(found.values()), which) if entry.key not in known] if found else []
    relisted = [entry for key, entry in found.items() if key in known]
    result.returned = [entry.tag for entry in relisted if known[entry.key].vanished]
    result.added = timeline.merge([*chosen, *relisted, *missing]).added
    now = {entry.key: entry for entry in timeline.entries()}
    result.vanished = [entry.tag for key, entry in now.items()
                       if entry.vanished and key in known and not known[key].vanished]
    _read_metadata(timeline, _metadata_requests(now, wheels, which.git), fetcher, result, progress)
    return result


def _builds(listing: Listing, result: SyncResult) -> tuple[list[Entry], dict[tuple[str, str], dict[str, ListedWheel]]]:
    """Return the builds of a listing and, by (build, index), the wheel of each variant whose metadata is to be read."""
    address = listing.location.address
    by_key: dict[str, list[ListedWheel]] = {}
    builds: dict[str, Entry] = {}
    others: list[str] = []
    for listed in listing.wheels:
        channel, day = channel_and_date(listed.version)
        if channel == "source":
            others.append(listed.wheel.filename)
            continue
        entry = Entry(channel=channel, torch=listed.version.public, date=day)
        builds.setdefault(entry.key, entry)
        by_key.setdefault(entry.key, []).append(listed)
    if listing.unreadable:
        result.remarks.append(f"{address} lists {_some(listing.unreadable)}, which is not a valid name of a wheel: "
                              "skipped")
    if others:
        result.remarks.append(f"{address} lists {_some(others)}: neither a release nor a nightly; install such a "
                              "build, and `fpxbench timeline here` adds it")
    result.read[address] = len(by_key)
    seen = listing.day or datetime.now(UTC).date().isoformat()
    entries, wheels = [], {}
    for key, listed_wheels in by_key.items():
        day = builds[key].date or min((listed.day for listed in listed_wheels if listed.day), default=None)
        source = IndexedBuild(
            arguments=listing.location.arguments, wheels=tuple(listed.wheel for listed in listed_wheels))
        entries.append(builds[key].model_copy(
            update={"date": day, "seen": None if day else seen, "sources": {address: source}}))
        wheels[key, address] = {
            variant: max((one for one in listed_wheels if one.wheel.variant == variant), key=_wheel_preference)
            for variant in {listed.wheel.variant for listed in listed_wheels}}
    return entries, wheels


def _wheel_preference(listed: ListedWheel) -> tuple:
    """Return a sort key: of a variant's wheels, read one that this Python can install, else an x86-64 one."""
    return listed.wheel.fits, "x86_64" in listed.wheel.filename, listed.wheel.filename


def _chosen(entries: list[Entry], which: SyncFilter) -> list[Entry]:
    """Return those of `entries`, oldest first, that pass the filter."""
    chosen = []
    for channel in which.channels:
        of_channel = [entry for entry in entries if entry.channel == channel and is_recent(entry, which.since)]
        chosen += of_channel[-which.keep:] if which.keep is not None else of_channel
    return chosen


def is_recent(entry: Entry, since: date | Version | None) -> bool:
    """Return whether it is not older than `since`, a day or a version; a build without a date always passes a day."""
    if isinstance(since, Version):
        return entry.version >= since
    return since is None or not entry.dated or entry.day >= since.isoformat()


def _vanished(listing: Listing, known: dict[str, Entry], found: dict[str, Entry], result: SyncResult) -> list[Entry]:
    """Return the known builds that this index used to list and no longer does, marked as vanished."""
    address = listing.location.address
    gone = []
    for key, entry in known.items():
        source = entry.sources.get(address)
        if source and not source.vanished and (key not in found or address not in found[key].sources):
            gone.append((entry, source))
    if gone and not result.read[address]:
        result.problems.append(f"{address} lists no build of PyTorch, but used to list {len(gone)}: this is treated as "
                               "a fault of the index, and no build is marked as gone")
        return []
    today = listing.day or datetime.now(UTC).date().isoformat()
    return [Entry(channel=entry.channel, torch=entry.torch,
                  sources={address: source.model_copy(update={"vanished": today})}) for entry, source in gone]


def _replaced(entries: list[Entry], known: dict[str, Entry]) -> list[str]:
    """Return a sentence for each file that an index has replaced."""
    messages = []
    for entry in entries:
        for address, source in entry.sources.items():
            before = known[entry.key].sources.get(address) if entry.key in known else None
            hashes = {wheel.filename: wheel.sha256 for wheel in before.wheels} if before else {}
            messages += [
                f"{entry.tag}: {address} has replaced {wheel.filename} by another file: earlier measurements may be of "
                "the old one" for wheel in source.wheels
                if wheel.sha256 and hashes.get(wheel.filename, "") not in ("", wheel.sha256)]
    return messages


@dataclass(frozen=True)
class _MetadataRequest:
    entry: Entry
    address: str
    variant: str
    listed: ListedWheel
    git: bool


def _metadata_requests(
    known: dict[str, Entry], wheels: dict[tuple[str, str], dict[str, ListedWheel]], git: bool,
) -> list[_MetadataRequest]:
    """Return the wheels of known builds whose Triton (or commit, if `git`) is unknown, newest first."""
    requests = []
    for (key, address), by_variant in wheels.items():
        if key in known:
            entry = known[key]
            commit = git and not entry.git
            requests += [_MetadataRequest(entry, address, variant, listed, commit)
                         for variant, listed in by_variant.items()
                         if commit or variant not in entry.sources[address].triton]
    return sorted(requests, key=lambda request: (request.entry.day, request.entry.version), reverse=True)


def _read_metadata(timeline: Timeline, requests: list[_MetadataRequest], fetcher: Fetcher, result: SyncResult,
                   progress: Callable[[int, int, str], None]) -> None:
    """Read the metadata of each wheel, and store it."""
    learnt: list[Entry] = []
    failures: list[str] = []
    in_a_row = 0
    stored = time.monotonic()
    try:
        for number, request in enumerate(requests):
            entry = request.entry
            progress(number, len(requests), entry.tag)
            try:
                metadata = read_wheel_metadata(request.listed, fetcher, with_git=request.git)
            except NotThere:
                result.remarks.append(f"{entry.tag}: the index does not have "
                                      f"{request.listed.wheel.filename}, which it lists")
                continue
            except Unreachable as error:
                failures.append(f"{entry.tag}: {error}")
                in_a_row += 1
                if in_a_row == _GIVE_UP_AFTER:
                    break
                continue
            finally:
                result.asked += 1
            in_a_row = 0
            source = entry.sources[request.address].model_copy(update={"triton": {request.variant: metadata.triton}})
            learnt.append(Entry(channel=entry.channel, torch=entry.torch, git=metadata.git,
                                sources={request.address: source}))
            if time.monotonic() - stored > _STORE_EVERY_S:
                timeline.merge(learnt)
                learnt.clear()
                stored = time.monotonic()
    finally:  # also after Ctrl-C
        timeline.merge(learnt)
    if failures:
        rest = len(requests) - result.asked
        more = f"; {rest} more were not tried" if rest else ""
        result.problems.append(f"the Triton of {counted(len(failures), 'build')} could not be read{more}; the next "
                               f"sync tries again. {failures[0]}")


def _some(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"

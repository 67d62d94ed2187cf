"""Fill the timeline from package indexes.

The pages are read first, each whole or not at all, and what they list goes to the timeline at once; then the wheels whose metadata
nobody has read yet are asked for it, newest first, and what they say is stored every few seconds. So a sync that is cut off anywhere
has kept what it learnt, and the next one goes on from there. One that finds nothing new reads the pages and nothing else.
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
from fpxbench.builds.timeline.entry import Entry, Source, in_order
from fpxbench.builds.timeline.repository import Timeline

_STORE_EVERY_S = 10.0
_GIVE_UP_AFTER = 3


@dataclass(frozen=True)
class SyncFilter:
    """Which of the builds that are listed are to be held."""

    channels: frozenset[str] = frozenset({"release", "nightly"})
    since: date | Version | None = None
    keep: int | None = None
    """The newest so many of each channel; builds that are held already stay."""
    git: bool = False
    """Their upstream commits too, which are inside the wheels."""


@dataclass
class SyncResult:
    """What a sync did. Builds are called by their tags."""

    added: list[str] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    returned: list[str] = field(default_factory=list)
    asked: int = 0
    """Wheels whose metadata was asked for."""
    read: dict[str, int] = field(default_factory=dict)
    """By index, how many builds it lists."""
    problems: list[str] = field(default_factory=list)
    """Sentences about what could not be read; the next sync tries again."""
    remarks: list[str] = field(default_factory=list)
    """Sentences about what was odd and is settled."""


def parse_since(text: str) -> date | Version:
    """``2026-01-01`` or ``2.9``. Raises ValueError."""
    try:
        return date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text) else Version(text)
    except (ValueError, InvalidVersion):
        raise ValueError(f"--since {text!r}: a day as in 2026-01-01, or a version as in 2.9") from None


def sync(
    timeline: Timeline,
    locations: Iterable[IndexLocation],
    fetcher: Fetcher,
    which: SyncFilter = SyncFilter(),
    progress: Callable[[int, int, str], None] = lambda done, total, tag: None,
) -> SyncResult:
    """Hold what `locations` list, and learn what can be learnt of it. Calls ``progress(done, total, tag)`` for each wheel that is asked.

    What cannot be read is a sentence in the result's `problems`. Raises TimelineError if the timeline cannot be written.
    """
    result = SyncResult()
    listings = []
    for location in locations:
        try:
            listings.append(read_listing(location, fetcher))
        except Unreachable as error:
            result.problems.append(str(error))
    if listings and not result.problems and not any(listing.wheels for listing in listings):
        result.problems.append(f"none of {', '.join(listing.location.address for listing in listings)} lists a wheel of PyTorch for Linux")
    held = {entry.key: entry for entry in timeline.entries()}
    found: dict[str, Entry] = {}
    newest: dict[tuple[str, str], dict[str, ListedWheel]] = {}
    for listing in listings:
        entries, wheels = _builds(listing, result)
        newest |= wheels
        for entry in entries:
            found[entry.key] = found[entry.key].merge(entry) if entry.key in found else entry
        result.remarks += _replaced(entries, held)
    missing = [entry for listing in listings for entry in _vanished(listing, held, found, result)]
    chosen = [entry for entry in _chosen(in_order(found.values()), which) if entry.key not in held] if found else []
    known = [entry for key, entry in found.items() if key in held]
    result.returned = [entry.tag for entry in known if held[entry.key].vanished]
    result.added = timeline.merge([*chosen, *known, *missing]).added
    held_now = {entry.key: entry for entry in timeline.entries()}
    result.vanished = [entry.tag for key, entry in held_now.items() if entry.vanished and key in held and not held[key].vanished]
    _read_metadata(timeline, _metadata_requests(held_now, newest, which.git), fetcher, result, progress)
    return result


def _builds(listing: Listing, result: SyncResult) -> tuple[list[Entry], dict[tuple[str, str], dict[str, ListedWheel]]]:
    """The builds that a listing holds and, by (build, index), one wheel of each variant to be asked for its metadata."""
    address = listing.location.address
    by_key: dict[str, list[ListedWheel]] = {}
    about: dict[str, Entry] = {}
    others: list[str] = []
    for listed in listing.wheels:
        channel, day = channel_and_date(listed.version)
        if channel == "source":
            others.append(listed.wheel.filename)
            continue
        entry = Entry(channel=channel, torch=listed.version.public, date=day)
        about.setdefault(entry.key, entry)
        by_key.setdefault(entry.key, []).append(listed)
    if listing.unreadable:
        result.remarks.append(f"{address} lists {_some(listing.unreadable)}, which no wheel of PyTorch can be called; passed over")
    if others:
        result.remarks.append(f"{address} lists {_some(others)}: neither a release nor a nightly; `fpxbench timeline here` holds such a build "
                               "once it is installed")
    result.read[address] = len(by_key)
    seen = listing.day or datetime.now(UTC).date().isoformat()
    entries, wheels = [], {}
    for key, listed_wheels in by_key.items():
        day = about[key].date or min((listed.day for listed in listed_wheels if listed.day), default=None)
        source = Source(arguments=listing.location.arguments, wheels=tuple(listed.wheel for listed in listed_wheels))
        entries.append(about[key].model_copy(update={"date": day, "seen": None if day else seen, "sources": {address: source}}))
        wheels[key, address] = {
            variant: max((one for one in listed_wheels if one.wheel.variant == variant), key=_wheel_preference)
            for variant in {listed.wheel.variant for listed in listed_wheels}}
    return entries, wheels


def _wheel_preference(listed: ListedWheel) -> tuple:
    """Which wheel's metadata stands for a variant's: one that fits here, else one for the commonest machine."""
    return listed.wheel.fits, "x86_64" in listed.wheel.filename, listed.wheel.filename


def _chosen(entries: list[Entry], which: SyncFilter) -> list[Entry]:
    """Those of `entries`, oldest first, that are to be held."""
    chosen = []
    for channel in which.channels:
        of_channel = [entry for entry in entries if entry.channel == channel and is_recent(entry, which.since)]
        chosen += of_channel[-which.keep:] if which.keep is not None else of_channel
    return chosen


def is_recent(entry: Entry, since: date | Version | None) -> bool:
    """Not older than `since`, a day or a version."""
    if isinstance(since, Version):
        return entry.version >= since
    # Nobody can tell that a build without a date is too old.
    return since is None or not entry.dated or entry.day >= since.isoformat()


def _vanished(listing: Listing, held: dict[str, Entry], found: dict[str, Entry], result: SyncResult) -> list[Entry]:
    """Builds that this index listed once and does not now."""
    address = listing.location.address
    gone = []
    for key, entry in held.items():
        source = entry.sources.get(address)
        if source and not source.vanished and (key not in found or address not in found[key].sources):
            gone.append((entry, source))
    if gone and not result.read[address]:
        result.problems.append(f"{address} lists no build of PyTorch at all, and listed {len(gone)}: taken for trouble there, and nothing marked")
        return []
    today = listing.day or datetime.now(UTC).date().isoformat()
    return [Entry(channel=entry.channel, torch=entry.torch, sources={address: source.model_copy(update={"vanished": today})})
            for entry, source in gone]


def _replaced(entries: list[Entry], held: dict[str, Entry]) -> list[str]:
    """Sentences about files that an index has put others in the place of."""
    sentences = []
    for entry in entries:
        for address, source in entry.sources.items():
            before = held[entry.key].sources.get(address) if entry.key in held else None
            hashes = {wheel.filename: wheel.sha256 for wheel in before.wheels} if before else {}
            for wheel in source.wheels:
                if wheel.sha256 and hashes.get(wheel.filename, "") not in ("", wheel.sha256):
                    sentences.append(f"{entry.tag}: {address} has put another file in the place of {wheel.filename}: "
                                     "what was measured before may be of the old one")
    return sentences


@dataclass(frozen=True)
class _MetadataRequest:
    entry: Entry
    address: str
    variant: str
    listed: ListedWheel
    git: bool


def _metadata_requests(held: dict[str, Entry], wheels: dict[tuple[str, str], dict[str, ListedWheel]], git: bool) -> list[_MetadataRequest]:
    """The wheels of held builds that have not told their Triton or, if `git` is wanted, their commit; newest first."""
    requests = []
    for (key, address), by_variant in wheels.items():
        if key in held:
            entry, told = held[key], held[key].sources[address].triton
            requests += [_MetadataRequest(entry, address, variant, listed, git and not entry.git)
                          for variant, listed in by_variant.items() if variant not in told or git and not entry.git]
    return sorted(requests, key=lambda request: (request.entry.day, request.entry.version), reverse=True)


def _read_metadata(timeline: Timeline, requests: list[_MetadataRequest], fetcher: Fetcher, result: SyncResult,
         progress: Callable[[int, int, str], None]) -> None:
    """Ask each wheel, and store what it says."""
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
                result.remarks.append(f"{entry.tag}: {request.listed.wheel.filename} was listed, and was gone when it was asked for its Triton")
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
            learnt.append(Entry(channel=entry.channel, torch=entry.torch, git=metadata.git, sources={request.address: source}))
            if time.monotonic() - stored > _STORE_EVERY_S:
                timeline.merge(learnt)
                learnt.clear()
                stored = time.monotonic()
    finally:  # Ctrl-C too keeps what was learnt
        timeline.merge(learnt)
    if failures:
        unasked = len(requests) - result.asked
        more = f"; {unasked} more were not asked" if unasked else ""
        result.problems.append(f"the Triton of {len(failures)} builds could not be told{more}; the next sync asks again. {failures[0]}")


def _some(names: list[str]) -> str:
    return repr(names[0]) if len(names) == 1 else f"{names[0]!r} and {len(names) - 1} more"

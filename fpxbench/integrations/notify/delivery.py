"""Send each notice once to each channel, and remember what was sent.

What was sent is in ``RESULTS/notified.jsonl``, one line a delivery, appended right after it. A delivery that failed is
not in it, so that the next run sends it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from fpxbench.integrations.notify.notice import Notice
from fpxbench.records.record import now

FILE = "notified.jsonl"


class DeliveryError(Exception):
    """A channel could not deliver. The message names no secret."""


class MissingPackage(DeliveryError):
    """A channel's library is not installed."""


class Channel(Protocol):
    """A destination of notices."""

    name: str
    """As shown and remembered, without secrets: ``https://hooks.slack.com/*** (3f9c)``."""
    updates: bool
    """Whether a notice whose content changed is sent again, and replaces what was sent."""

    def preview(self, notice: Notice) -> str:
        """Return exactly what would be sent, with secrets masked."""

    def send(self, notice: Notice) -> str:
        """Send it. Return where it is, or an empty text. Raise DeliveryError."""


def masked(url: str) -> str:
    """Return a URL without what may be a secret in it: user, password, path and query; with four hex digits by which
    two of one host are told apart."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    web = parts.scheme in ("http", "https")
    where = f"{host}:{_port(url)}" if web and _port(url) else host if web else ""
    # Slow, and too short to check a guess by it.
    digits = hashlib.scrypt(url.encode(), salt=b"fpxbench notify", n=2**14, r=8, p=1, dklen=2).hex()
    return f"{parts.scheme}://{where}{'/' if web else ''}*** ({digits})"


def _port(url: str) -> int | None:
    try:
        return urlsplit(url).port
    except ValueError:
        return None


class Sent:
    """What was sent to which channel."""

    def __init__(self, results: Path) -> None:
        self._path = results / FILE
        self._known: dict[tuple[str, str], str] = {}
        self.broken: list[str] = []

    @contextmanager
    def reading(self, exclusive: bool) -> Iterator[Sent]:
        """Read the file; if `exclusive`, with a lock on it, so that two runs do not send the same."""
        if not exclusive:
            if self._path.is_file():
                self._read(self._path.read_text(encoding="utf-8", errors="replace"))
            yield self
            return
        with open(self._path, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            self._read(file.read())
            yield self

    def _read(self, text: str) -> None:
        for number, line in enumerate(text.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known[str(entry["channel"]), str(entry["notice"])] = str(entry["digest"])
            except (ValueError, KeyError, TypeError):
                self.broken.append(f"{self._path}:{number}: not a delivery; skipped")

    def due(self, channel: Channel, notice: Notice) -> bool:
        """Return whether the channel has not had the notice, or had another version of one that it updates."""
        digest = self._known.get((channel.name, notice.id))
        return digest is None or (channel.updates and digest != notice.digest)

    def add(self, channel: Channel, notice: Notice, where: str) -> None:
        """Remember a delivery."""
        entry = {"channel": channel.name, "notice": notice.id, "digest": notice.digest, "at": now(), "where": where}
        with open(self._path, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
            broken = bool(end) and file.read(1) != b"\n"
            file.seek(0, os.SEEK_END)
            file.write((b"\n" if broken else b"") + json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[channel.name, notice.id] = notice.digest


class DeliveryAttempt:
    """Result of sending one notice to one channel."""

    def __init__(self, channel: Channel, notice: Notice, *, where: str = "", error: str = "") -> None:
        self.channel, self.notice, self.where, self.error = channel, notice, where, error


def due(results: Path, channels: Sequence[Channel], found: Sequence[Notice]) -> tuple[list[tuple[Channel, Notice]],
                                                                                    list[str]]:
    """Return the notices to send, and messages about unreadable lines of the file of sent ones."""
    with Sent(results).reading(exclusive=False) as sent:
        return [(channel, notice) for channel in channels for notice in found if sent.due(channel, notice)], sent.broken


def deliver(results: Path, channels: Sequence[Channel], found: Sequence[Notice]) -> Iterator[DeliveryAttempt]:
    """Send the notices that are due, one at a time. After a channel's first failure its other notices wait for the next
    run; the other channels go on."""
    with Sent(results).reading(exclusive=True) as sent:
        for channel in channels:
            for notice in [each for each in found if sent.due(channel, each)]:
                try:
                    where = channel.send(notice)
                except DeliveryError as error:
                    yield DeliveryAttempt(channel, notice, error=str(error))
                    break
                sent.add(channel, notice, where)
                yield DeliveryAttempt(channel, notice, where=where)

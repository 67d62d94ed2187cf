"""The timeline: a bare git repository of builds, one commit each, that asv walks.

A commit itself contains only the build's identity (`fpxbench.builds.timeline.commit`). What is known *about* a build
(its date, its predecessor, where its wheels are) is in a replacement of that commit (`git replace`), which git and asv
show under the same hash. It is local, and rewritten when more becomes known.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from fpxbench.builds.timeline.commit import CHANNELS, GitObject, Identified, commit_hash, commit_objects, root_objects
from fpxbench.builds.timeline.entry import Entry, Failure, in_order
from fpxbench.did_you_mean import did_you_mean
from fpxbench.records.record import Build
from fpxbench.user_error import UserError

_LOCK = "fpxbench.lock"
_PACK_TYPE = {"commit": 1, "tree": 2, "blob": 3}


class TimelineError(UserError):
    """The folder is not a timeline, git is missing or fails, or there is no such build."""


@dataclass
class TimelineChanges:
    """The builds that a call added or updated, by tag."""

    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)


class Timeline:
    """A bare git repository at `path`, made when the first build is added.

    Several processes may call every method at once. Each raises TimelineError if the folder is something else, git is
    missing or fails, or the disk is full; the timeline is then unchanged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock_fd: int | None = None

    def add(self, builds: Iterable[Build], today: str | None = None) -> TimelineChanges:
        """Add `builds`, or merge their fields into the known ones, whose hashes stay.

        `today` (YYYY-MM-DD) replaces an unknown date.
        """
        today = today or datetime.now(UTC).date().isoformat()
        return self.merge(Entry.of(build, today) for build in builds)

    def merge(self, entries: Iterable[Entry]) -> TimelineChanges:
        """Add `entries`, and merge each into what is known about its build."""

        def merge(known: dict[str, Entry]) -> None:
            for entry in entries:
                old = known.get(entry.key)
                known[entry.key] = old.merge(entry) if old else entry

        return self._update(merge)

    def failed_to_install(self, key: str, variant: str, log_tail: str) -> None:
        """Note at the build of commit `key` that `variant` failed to install, with the installer's last lines."""
        failure = Failure(day=datetime.now(UTC).date().isoformat(), log_tail=log_tail)
        self._set_failures(key, lambda failures: failures | {variant: failure})

    def installed(self, key: str, variant: str) -> None:
        """Remove the failure of `variant` from the build of commit `key`: it installs."""
        self._set_failures(key,
                           lambda failures: {name: failure for name, failure in failures.items() if name != variant})

    def point_at(self, build: Identified) -> str:
        """Point HEAD at the commit of `build`, which must be known, for ``asv run HEAD``. Return its hash."""
        key = commit_hash(build)
        with self._locked():
            if self._git("rev-parse", "--verify", "--quiet", "HEAD", check=False).strip() != key:
                self._git("update-ref", "--no-deref", "HEAD", key)
        return key

    def find(self, name: str) -> Entry:
        """Return the build that `name` denotes: a tag, a version, a channel (its newest build) or the prefix of a hash.

        Raise TimelineError if there is none, or more than one.
        """
        entries = self.entries()
        if name in CHANNELS:
            entries = [entry for entry in entries if entry.channel == name]
            if entries:
                return entries[-1]
            raise TimelineError(f"no build of the channel {name} is on the timeline: `fpxbench timeline sync --channel "
                                f"{name}`")
        for matches in (lambda entry: entry.tag == name, lambda entry: entry.torch == name, _same_version(name),
                        lambda entry: re.fullmatch("[0-9a-f]{4,40}", name) and entry.key.startswith(name)):
            found = [entry for entry in entries if matches(entry)]
            if len(found) == 1:
                return found[0]
            if found:
                candidates = ', '.join(entry.tag for entry in found[:5])
                raise TimelineError(f"{name!r} could be {candidates}: name one of them")
        hint = did_you_mean(name, [entry.tag for entry in entries],
                            "`fpxbench timeline list` shows the known ones; `timeline sync` looks for more")
        raise TimelineError(f"no build {name!r} is on the timeline: {hint}")

    def entries(self) -> list[Entry]:
        """Return every build, oldest first."""
        return in_order(self._read().values())

    # Reading and writing.

    def _read(self) -> dict[str, Entry]:
        """Return every build by its commit."""
        if not (self.path / "objects/pack").exists():
            return {}
        keys = self._git("for-each-ref", "--format=%(objectname)", "refs/tags").split()
        names = "".join(f"{key}:build.json\n" for key in keys).encode()
        shown = io.BytesIO(self._git_bytes("cat-file", "--batch=%(objecttype) %(objectsize)", stdin=names))
        entries = {}
        for key in keys:
            header = shown.readline()
            if not header.startswith(b"blob "):  # a user's own tag
                continue
            text = shown.read(int(header.split()[1]))
            shown.readline()
            try:
                entry = Entry.model_validate_json(text)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise TimelineError(f"{self.path}: build.json of commit {key[:12]} cannot be read ({reason}). "
                                    "Remove the folder, which has no results, then run `timeline sync`") from error
            if entry.key == key:
                entries[key] = entry
        return entries

    def _update(self, change: Callable[[dict[str, Entry]], None]) -> TimelineChanges:
        """Apply `change` to the builds by their commit, and store what it changed."""
        with self._locked():
            before = self._read()
            after = dict(before)
            change(after)
            changed = [entry for key, entry in after.items() if entry != before.get(key)]
            if changed:
                self._write(in_order(after.values()))
        changes = TimelineChanges()
        for entry in changed:
            (changes.updated if entry.key in before else changes.added).append(entry.tag)
        return changes

    def _set_failures(self, key: str, change: Callable[[dict[str, Failure]], dict[str, Failure]]) -> None:
        def edit(known: dict[str, Entry]) -> None:
            if key not in known:
                raise TimelineError(f"no build of commit {key[:12]} is on the timeline")
            known[key] = known[key].model_copy(update={"failures": change(known[key].failures)})

        self._update(edit)

    def _write(self, entries: list[Entry]) -> None:
        """Store the missing objects, then move the refs together."""
        present = dict(line.split(" ")
                       for line in self._git("for-each-ref", "--format=%(refname) %(objectname)").splitlines())
        tips: dict[str, str] = {}
        refs: dict[str, str] = {}
        objects: dict[str, GitObject] = {}
        for entry in entries:
            shown = commit_objects(entry, entry.files(), entry.day, tips.get(entry.channel))
            refs[f"refs/tags/{entry.tag}"] = tips[entry.channel] = entry.key
            refs[f"refs/replace/{entry.key}"] = shown[-1].sha
            if present.get(f"refs/replace/{entry.key}") != shown[-1].sha:
                objects |= {thing.sha: thing for thing in (*root_objects(entry), *shown)}
        refs |= {f"refs/heads/{channel}": key for channel, key in tips.items()}
        ours = {entry.key for entry in entries}
        renamed = [ref for ref, key in present.items()
                   if ref.startswith("refs/tags/") and ref not in refs and key in ours]
        if objects:
            self._git("index-pack", "--stdin", stdin=_pack(list(objects.values())))
        commands = [f"update {ref} {key}" for ref, key in refs.items() if present.get(ref) != key]
        commands += [f"delete {ref}" for ref in renamed]
        self._git("update-ref", "--stdin", stdin="".join(f"{command}\n" for command in commands).encode())
        self._git("pack-refs", "--all")
        self._git("-c", "gc.autoDetach=false", "gc", "--auto", "--quiet")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the writer's lock; make the repository if there is none."""
        if self.path.exists() and not self.path.is_dir() or self.path.is_dir() and not self._is_ours():
            raise TimelineError(f"{self.path} is not a timeline of builds: move it away, or name another folder as "
                                "asv's `repo`")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / _LOCK, "w")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise TimelineError(f"{self.path} cannot be written: {error.strerror}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._lock_fd = lock.fileno()
            try:
                if not (self.path / "objects/pack").exists():  # what `git init` makes last
                    # The object format is part of the hash, and a template could bring hooks along.
                    self._git("init", "--quiet", "--bare", "--object-format=sha1", "--initial-branch=release",
                              "--template=")
                self._clear_locks()
                yield
            finally:
                self._lock_fd = None

    def _clear_locks(self) -> None:
        """Remove files that a killed git, or one on a full disk, left behind; this process has the writer's lock."""
        left = [*(self.path / "refs").rglob("*.lock"), *(self.path / "objects/pack").glob("tmp_*")]
        for path in (self.path / "HEAD.lock", self.path / "packed-refs.lock", *left):
            with suppress(FileNotFoundError):
                path.unlink()

    def _is_ours(self) -> bool:
        """Return whether the folder is a timeline's, or empty; the lock file exists before the repository."""
        names = os.listdir(self.path)
        return not names or _LOCK in names

    def _git(self, *args: str, stdin: bytes = b"", check: bool = True) -> str:
        return self._git_bytes(*args, stdin=stdin, check=check).decode()

    def _git_bytes(self, *args: str, stdin: bytes = b"", check: bool = True) -> bytes:
        # A git hook or an alias may have set GIT_DIR and the like, which override the path.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", f"--git-dir={self.path}", *args]
        # A git that outlives this process keeps the lock until it ends.
        inherited = (self._lock_fd,) if self._lock_fd is not None else ()
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, env=environment, pass_fds=inherited)
        except FileNotFoundError as error:
            raise TimelineError("git is not installed, and the timeline is a git repository: install git") from error
        if check and done.returncode:
            message = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
            raise TimelineError(f"`{' '.join(command)}` failed: {message}. The timeline is unchanged")
        return done.stdout


def _same_version(name: str) -> Callable[[Entry], bool]:
    """Return a filter for the builds of that version; ``2.13.0+cpu`` is 2.13.0, made for a device."""
    try:
        version = Version(name)
    except InvalidVersion:
        return lambda entry: False
    return lambda entry: entry.version == version or entry.channel != "source" and str(entry.version) == version.public


def _pack(objects: list[GitObject]) -> bytes:
    """Return a packfile (git's Documentation/gitformat-pack), which stores thousands of objects at once."""
    parts = [b"PACK", struct.pack(">II", 2, len(objects))]
    for thing in objects:
        size = len(thing.data)
        byte, size = _PACK_TYPE[thing.kind] << 4 | size & 15, size >> 4
        while size:
            parts.append(bytes([byte | 0x80]))
            byte, size = size & 127, size >> 7
        parts += [bytes([byte]), zlib.compress(thing.data)]
    body = b"".join(parts)
    return body + hashlib.sha1(body, usedforsecurity=False).digest()

"""The timeline: a bare git repository of builds, one commit each, that asv walks.

A commit by itself holds only which build it is (`fpxbench.builds.timeline.commit`). What is known *about* a build, or may be learnt later (its
date, its predecessor, where its wheels are), sits in a replacement of that commit (`git replace`), which git and asv show in its
place under the same hash. It is local, and rewritten when more is known.
"""

from __future__ import annotations

import difflib
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
from fpxbench.records.record import Build

_LOCK = "fpxbench.lock"
_PACK_TYPE = {"commit": 1, "tree": 2, "blob": 3}


class TimelineError(RuntimeError):
    """The folder is not a timeline, git is missing or refuses, or there is no such build."""


@dataclass
class TimelineChanges:
    """What a call has changed: tags."""

    added: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)


class Timeline:
    """A bare git repository at `path`, made when the first build is held.

    Every method may be called from several processes at once. Each raises TimelineError if the folder holds something else, git is
    missing or refuses, or the disk is full; what was there before is then there still.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock_fd: int | None = None

    def add(self, builds: Iterable[Build], today: str | None = None) -> TimelineChanges:
        """Make sure that each of `builds` is here, with what it tells of itself; those that are keep their hash.

        `today` (YYYY-MM-DD) stands in for a date that is not known.
        """
        today = today or datetime.now(UTC).date().isoformat()
        return self.merge(Entry.of(build, today) for build in builds)

    def merge(self, entries: Iterable[Entry]) -> TimelineChanges:
        """Make sure that each of `entries` is here, and lay what it knows over what is known of that build."""

        def merge(held: dict[str, Entry]) -> None:
            for entry in entries:
                old = held.get(entry.key)
                held[entry.key] = old.merge(entry) if old else entry

        return self._update(merge)

    def failed_to_install(self, key: str, variant: str, log_tail: str) -> None:
        """Keep on the build of commit `key` that `variant` did not install, with the installer's last lines."""
        failure = Failure(day=datetime.now(UTC).date().isoformat(), log_tail=log_tail)
        self._set_failures(key, lambda failures: failures | {variant: failure})

    def installed(self, key: str, variant: str) -> None:
        """`variant` of the build of commit `key` did install: what was kept of a failure is gone."""
        self._set_failures(key, lambda failures: {name: failure for name, failure in failures.items() if name != variant})

    def point_at(self, build: Identified) -> str:
        """Make HEAD the commit of `build`, which must be here: ``asv run HEAD`` then means this one. Returns its hash."""
        key = commit_hash(build)
        with self._locked():
            if self._git("rev-parse", "--verify", "--quiet", "HEAD", check=False).strip() != key:
                self._git("update-ref", "--no-deref", "HEAD", key)
        return key

    def find(self, name: str) -> Entry:
        """The build that `name` means: a tag, a version, a channel (its newest build), or the beginning of a hash.

        Raises TimelineError if there is none, or more than one.
        """
        entries = self.entries()
        if name in CHANNELS:
            entries = [entry for entry in entries if entry.channel == name]
            if entries:
                return entries[-1]
            raise TimelineError(f"no build of the channel {name} is on the timeline: `fpxbench timeline sync --channel {name}`")
        for matches in (lambda entry: entry.tag == name, lambda entry: entry.torch == name, _same_version(name),
                        lambda entry: re.fullmatch("[0-9a-f]{4,40}", name) and entry.key.startswith(name)):
            found = [entry for entry in entries if matches(entry)]
            if len(found) == 1:
                return found[0]
            if found:
                raise TimelineError(f"{name!r} could be {', '.join(entry.tag for entry in found[:5])}: give one of these")
        near = difflib.get_close_matches(name, [entry.tag for entry in entries], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`fpxbench timeline list` shows those that are; `timeline sync` looks for more"
        raise TimelineError(f"no build {name!r} is on the timeline: {hint}")

    def entries(self) -> list[Entry]:
        """Every build, oldest first."""
        return in_order(self._read().values())

    # -- reading and writing ----------------------------------------------------------------------------------------------------

    def _read(self) -> dict[str, Entry]:
        """Every build by its commit."""
        if not (self.path / "objects/pack").exists():
            return {}
        keys = self._git("for-each-ref", "--format=%(objectname)", "refs/tags").split()
        asked = "".join(f"{key}:build.json\n" for key in keys).encode()
        shown = io.BytesIO(self._git_bytes("cat-file", "--batch=%(objecttype) %(objectsize)", stdin=asked))
        entries = {}
        for key in keys:
            header = shown.readline()
            if not header.startswith(b"blob "):  # somebody's own tag
                continue
            text = shown.read(int(header.split()[1]))
            shown.readline()
            try:
                entry = Entry.model_validate_json(text)
            except ValidationError as error:
                raise TimelineError(f"{self.path}: build.json of commit {key[:12]} cannot be read ({error.errors()[0]['msg']}). "
                                    "Remove the folder: no result is in it, and `fpxbench timeline sync` makes it anew") from error
            if entry.key == key:
                entries[key] = entry
        return entries

    def _update(self, change: Callable[[dict[str, Entry]], None]) -> TimelineChanges:
        """Let `change` work on the builds by their commit, and store what it has changed."""
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
        def edit(held: dict[str, Entry]) -> None:
            if key not in held:
                raise TimelineError(f"no build of commit {key[:12]} is on the timeline")
            held[key] = held[key].model_copy(update={"failures": change(held[key].failures)})

        self._update(edit)

    def _write(self, entries: list[Entry]) -> None:
        """Store what is not here yet, then move the refs, all at once."""
        present = dict(line.split(" ") for line in self._git("for-each-ref", "--format=%(refname) %(objectname)").splitlines())
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
        renamed = [ref for ref, key in present.items() if ref.startswith("refs/tags/") and ref not in refs and key in ours]
        if objects:
            self._git("index-pack", "--stdin", stdin=_pack(list(objects.values())))
        commands = [f"update {ref} {key}" for ref, key in refs.items() if present.get(ref) != key] + [f"delete {ref}" for ref in renamed]
        self._git("update-ref", "--stdin", stdin="".join(f"{command}\n" for command in commands).encode())
        self._git("pack-refs", "--all")
        self._git("-c", "gc.autoDetach=false", "gc", "--auto", "--quiet")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; makes the repository if it is not there."""
        if self.path.exists() and not self.path.is_dir() or self.path.is_dir() and not self._is_ours():
            raise TimelineError(f"{self.path} is not a timeline of builds: move it away, or name another folder as asv's `repo`")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / _LOCK, "w")
        except OSError as error:
            raise TimelineError(f"{self.path} cannot be written: {error.strerror}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._lock_fd = lock.fileno()
            try:
                if not (self.path / "objects/pack").exists():  # what `git init` makes last
                    # The object format is part of the hash, and a template could bring hooks along.
                    self._git("init", "--quiet", "--bare", "--object-format=sha1", "--initial-branch=release", "--template=")
                self._clear_locks()
                yield
            finally:
                self._lock_fd = None

    def _clear_locks(self) -> None:
        """Remove what a git that was killed, or ran out of disk, left behind: nobody else writes while this process has our own lock."""
        left = [*(self.path / "refs").rglob("*.lock"), *(self.path / "objects/pack").glob("tmp_*")]
        for path in (self.path / "HEAD.lock", self.path / "packed-refs.lock", *left):
            with suppress(FileNotFoundError):
                path.unlink()

    def _is_ours(self) -> bool:
        """An empty folder will do; the lock file is there from before the repository is."""
        names = os.listdir(self.path)
        return not names or _LOCK in names

    def _git(self, *args: str, stdin: bytes = b"", check: bool = True) -> str:
        return self._git_bytes(*args, stdin=stdin, check=check).decode()

    def _git_bytes(self, *args: str, stdin: bytes = b"", check: bool = True) -> bytes:
        # A git hook or an alias may have set GIT_DIR and the like, and they would win over the path.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", f"--git-dir={self.path}", *args]
        # A git that outlives this process keeps the lock until it is done.
        inherited = (self._lock_fd,) if self._lock_fd is not None else ()
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, env=environment, pass_fds=inherited)
        except FileNotFoundError as error:
            raise TimelineError("git is not installed, and asv walks the builds as a git repository: install git") from error
        if check and done.returncode:
            said = done.stderr.decode(errors="replace").strip() or f"no word of why, status {done.returncode}"
            raise TimelineError(f"`{' '.join(command)}` failed: {said}. The timeline is as it was before")
        return done.stdout


def _same_version(name: str) -> Callable[[Entry], bool]:
    """``2.13.0+cpu`` is 2.13.0, made for a device."""
    try:
        version = Version(name)
    except InvalidVersion:
        return lambda entry: False
    return lambda entry: entry.version == version or entry.channel != "source" and str(entry.version) == version.public


def _pack(objects: list[GitObject]) -> bytes:
    """A packfile (git's Documentation/gitformat-pack), which stores thousands of objects in one go."""
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

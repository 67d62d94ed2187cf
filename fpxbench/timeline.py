"""The builds in order, as a git repository that asv walks: one commit a build.

Results are filed under a build's commit hash, on every machine and for good. So the hash depends on nothing but *which build it
is*: its identity (below) is all that the commit holds, it has no parent, and its author and dates are constants. A machine that has
never seen another build, has no network, or reads its clock wrong arrives at the same hash, and a build that is inserted later moves
nobody's results.

What is only *known about* a build, or may be learnt later (its date, its predecessor), sits in a replacement of that commit
(`git replace`), which git and asv show in its place under the same hash. It is local, and rewritten when more is known.

Identity:

- ``release`` and ``nightly``: the channel and the version without its variant. ``2.13.0+cpu`` and ``2.13.0+cu130`` are one build
  made for two devices. Triton does not count: PyTorch's metadata pins it.
- ``source`` (built here, or paired with another Triton than its own): the full version, the upstream commit and the Triton.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from packaging.version import Version

from fpxbench.record import Build

CHANNELS = ("release", "nightly", "source")
"""Each is a branch."""

_LOCK = "fpxbench.lock"
_AUTHOR = "fpxbench timeline <timeline@fpxbench.invalid>"


class TimelineError(RuntimeError):
    """The folder is not a timeline, or git is missing or refuses."""


def identity(build: Build) -> dict[str, str | None]:
    """What tells a build from every other one. Changing this moves every result ever stored."""
    known = {"channel": build.channel, "torch": build.label}
    if build.channel == "source":
        known |= {"git": build.git, "triton": build.triton}
    return known


def commit_hash(build: Build) -> str:
    """The commit that stands for `build`, 40 hex digits, without a repository or git."""
    return _objects(identity(build))[-1].sha


def tag_name(build: Build) -> str:
    """How people call it: ``2.13.0``, ``nightly-20261120``, ``source-2.15.0a0-gitabc1234-1f2e3d4c``."""
    if build.channel == "release":
        return build.label
    if build.channel == "nightly":
        return f"nightly-{Version(build.label).dev}"
    # One source version may stand for several builds (another Triton, another commit).
    return f"source-{re.sub('[^0-9A-Za-z.]', '-', build.label)}-{commit_hash(build)[:8]}"


# -- the commit of an identity ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Object:
    """A git object: what `git hash-object` would store."""

    kind: str
    data: bytes

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.kind} {len(self.data)}\0".encode() + self.data, usedforsecurity=False).hexdigest()


def _objects(known: dict[str, str | None], parent: str | None = None, learnt: dict[str, str] | None = None) -> list[_Object]:
    """Blobs, tree and commit of a build; the commit comes last. `learnt` is dated: ``date`` or, failing that, ``seen``."""
    learnt = learnt or {}
    files = {
        "build.json": json.dumps(known | learnt, indent=2, sort_keys=True) + "\n",
        "requirements.txt": f"torch=={known['torch']}\n",
    }
    blobs = {name: _Object("blob", text.encode()) for name, text in sorted(files.items())}
    tree = _Object("tree", b"".join(f"100644 {name}\0".encode() + bytes.fromhex(b.sha) for name, b in blobs.items()))
    day = learnt.get("date") or learnt.get("seen") or "1970-01-01"
    seconds = int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
    header = [f"tree {tree.sha}", *([f"parent {parent}"] if parent else [])]
    header += [f"{role} {_AUTHOR} {seconds} +0000" for role in ("author", "committer")]
    commit = _Object("commit", ("\n".join(header) + f"\n\nPyTorch {known['torch']} ({known['channel']})\n").encode())
    return [*blobs.values(), tree, commit]


# -- the repository ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One build on a timeline."""

    known: dict[str, str | None]
    """Its identity."""
    tag: str
    day: str
    """YYYY-MM-DD: when it was published or, as long as `dated` is false, a day by which it was."""
    dated: bool

    @property
    def key(self) -> str:
        """Its commit."""
        return _objects(self.known)[-1].sha

    @property
    def channel(self) -> str:
        return str(self.known["channel"])

    @property
    def version(self) -> Version:
        return Version(str(self.known["torch"]))


class Timeline:
    """A bare git repository at `path`, made when the first build is held."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def hold(self, builds: Iterable[Build], today: str | None = None) -> None:
        """Make sure that each of `builds` is here; those that are keep their hash.

        `today` (YYYY-MM-DD) stands in for a date that is not known. Safe to call from several processes at once. Raises
        TimelineError if the folder holds something else, or git is missing or refuses.
        """
        today = today or datetime.now(UTC).date().isoformat()
        with self._locked():
            entries = {entry.key: entry for entry in self.entries()}
            changed = False
            for build in builds:
                old = entries.get(key := commit_hash(build))
                if old is None or (build.date and not old.dated):
                    entries[key] = Entry(identity(build), tag_name(build), build.date or today, bool(build.date))
                    changed = True
            if changed:
                self._write(in_order(entries.values()))

    def point_at(self, build: Build) -> str:
        """Make HEAD the commit of `build`, which must be here: ``asv run HEAD`` then means this one. Returns its hash."""
        key = commit_hash(build)
        self._git("update-ref", "--no-deref", "HEAD", key)
        return key

    def entries(self) -> list[Entry]:
        """Every build, oldest first."""
        if not (self.path / "HEAD").exists():
            return []
        listed = self._git("for-each-ref", "--format=%(objectname) %(refname:strip=2)", "refs/tags")
        refs = [line.split(" ") for line in listed.splitlines()]
        shown = self._git("cat-file", "--batch=%(objecttype)", stdin="".join(f"{key}:build.json\n" for key, _ in refs).encode())
        entries = []
        for (_, tag), text in zip(refs, shown.split("blob\n")[1:], strict=True):
            known = json.loads(text)
            published, seen = known.pop("date", None), known.pop("seen", None)
            entries.append(Entry(known, tag, published or seen, bool(published)))
        return in_order(entries)

    def _write(self, entries: list[Entry]) -> None:
        """Store what is not here yet and move the refs, all at once."""
        present = dict(line.split(" ") for line in self._git("for-each-ref", "--format=%(refname) %(objectname)").splitlines())
        tips: dict[str, str] = {}
        refs: dict[str, str] = {}
        for entry in entries:
            root = _objects(entry.known)
            shown = _objects(entry.known, tips.get(entry.channel), {"date" if entry.dated else "seen": entry.day})
            refs[f"refs/tags/{entry.tag}"] = tips[entry.channel] = root[-1].sha
            refs[f"refs/replace/{root[-1].sha}"] = shown[-1].sha
            if present.get(f"refs/replace/{root[-1].sha}") != shown[-1].sha:
                for thing in (*root, *shown):
                    self._git("hash-object", "-w", "-t", thing.kind, "--stdin", stdin=thing.data)
        refs |= {f"refs/heads/{channel}": key for channel, key in tips.items()}
        self._git("update-ref", "--stdin", stdin="".join(f"update {ref} {key}\n" for ref, key in refs.items()).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time; makes the repository if it is not there."""
        if self.path.exists() and not self.path.is_dir() or self.path.is_dir() and not self._is_ours():
            raise TimelineError(f"{self.path} is not a timeline of builds: move it away, or name another folder as asv's `repo`")
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.path / "HEAD").exists():
                # The object format is part of the hash, and a template could bring hooks along.
                self._git("init", "--quiet", "--bare", "--object-format=sha1", "--initial-branch=release", "--template=")
            yield

    def _is_ours(self) -> bool:
        """An empty folder will do; the lock file is there from before the repository is."""
        names = os.listdir(self.path)
        return not names or _LOCK in names

    def _git(self, *args: str, stdin: bytes = b"") -> str:
        # A git hook or an alias may have set GIT_DIR and the like, and they would win over the path.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        command = ["git", f"--git-dir={self.path}", *args]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, env=environment)
        except FileNotFoundError as error:
            raise TimelineError("git is not installed, and asv walks the builds as a git repository: install git") from error
        if done.returncode:
            raise TimelineError(f"`{' '.join(command)}` failed: {done.stderr.decode(errors='replace').strip()}")
        return done.stdout.decode()


def in_order(entries: Iterable[Entry]) -> list[Entry]:
    """Oldest first.

    A day that only says when a build was first seen can be far too late (an old release, installed yesterday), so it is moved
    back to before every later version.
    """
    ordered: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.version, reverse=True):
        if not entry.dated and ordered:
            before = date.fromisoformat(min(later.day for later in ordered)) - timedelta(days=1)
            entry = replace(entry, day=min(entry.day, before.isoformat()))
        ordered.append(entry)
    return sorted(ordered, key=lambda entry: (entry.day, entry.version))

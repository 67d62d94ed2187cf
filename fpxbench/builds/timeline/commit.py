"""The commit that represents a build: a hash that depends only on the build's identity.

Every machine files results under it permanently. The commit therefore contains the build's identity (below) and nothing
else, it has no parent, and its author and dates are constants. A machine without network, with a wrong clock, or
without any other build computes the same hash, and a build that is inserted later moves no results.

Identity:

- ``release`` and ``nightly``: the channel and the version without its variant. ``2.13.0+cpu`` and
  ``2.13.0+cu130`` are one build for two devices. Triton is left out: PyTorch's metadata pins it.
- ``source`` (built locally, or paired with another Triton than its own): the full version, the upstream commit and the
  Triton.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from packaging.version import Version

CHANNELS = ("release", "nightly", "source")
"""Each is a branch of the timeline."""

_AUTHOR = "fpxbench timeline <timeline@fpxbench.invalid>"


class Identified(Protocol):
    """The fields of a build's identity; a record's `Build` and a timeline's `Entry` have them."""

    @property
    def channel(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def git(self) -> str | None: ...
    @property
    def triton(self) -> str | None: ...


def identity(build: Identified) -> dict[str, str | None]:
    """Return the fields that identify a build. Changing them moves every stored result."""
    known: dict[str, str | None] = {"channel": build.channel, "torch": build.label}
    if build.channel == "source":
        known |= {"git": build.git, "triton": build.triton}
    return known


def commit_hash(build: Identified) -> str:
    """Return the commit that represents `build`, 40 hex digits; needs neither a repository nor git."""
    return root_objects(build)[-1].sha


def tag_name(build: Identified) -> str:
    """Return its tag: ``2.13.0``, ``nightly-20261120``, ``source-2.15.0a0-gitabc1234-1f2e3d4c``."""
    if build.channel == "release":
        return build.label
    if build.channel == "nightly":
        return f"nightly-{Version(build.label).dev}"
    # Several source builds may share a version (another Triton, another commit).
    return f"source-{re.sub('[^0-9A-Za-z.]', '-', build.label)}-{commit_hash(build)[:8]}"


@dataclass(frozen=True)
class GitObject:
    """A git object: what `git hash-object` would store."""

    kind: str
    data: bytes

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{self.kind} {len(self.data)}\0".encode() + self.data, usedforsecurity=False).hexdigest()


def root_objects(build: Identified) -> list[GitObject]:
    """Return blobs, tree and commit of a build without its metadata; the commit comes last."""
    return commit_objects(build,
                          {"build.json": as_json(identity(build)), "requirements.txt": f"torch=={build.label}\n"})


def commit_objects(build: Identified, files: dict[str, str], day: str = "1970-01-01",
                   parent: str | None = None) -> list[GitObject]:
    """Return blobs, tree and commit of `files` (name → text), dated `day` (YYYY-MM-DD); the commit comes last."""
    blobs = {name: GitObject("blob", text.encode()) for name, text in sorted(files.items())}
    tree = GitObject("tree",
                     b"".join(f"100644 {name}\0".encode() + bytes.fromhex(blob.sha) for name, blob in blobs.items()))
    seconds = int(datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp())
    header = [f"tree {tree.sha}", *([f"parent {parent}"] if parent else [])]
    header += [f"{role} {_AUTHOR} {seconds} +0000" for role in ("author", "committer")]
    commit = GitObject("commit", ("\n".join(header) + f"\n\nPyTorch {build.label} ({build.channel})\n").encode())
    return [*blobs.values(), tree, commit]


def as_json(value: object) -> str:
    """Return the text of ``build.json``."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"

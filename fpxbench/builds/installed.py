"""The PyTorch build that is installed, read from its files.

asv's own process and the benchmarks ask for it, and importing PyTorch takes seconds, so nothing here imports it.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from datetime import date
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from fpxbench.builds import torch_metadata as torch_metadata_module
from fpxbench.builds.timeline.commit import commit_hash
from fpxbench.builds.torch_metadata import TRITON_DISTRIBUTIONS, torch_metadata
from fpxbench.records.record import Build

_ANSWER_WITHIN_S = 60
_VARIANT = re.compile(r"cpu|cu\d+|rocm\d+(\.\d+)*|xpu")


class NoPyTorch(RuntimeError):
    """This interpreter has no PyTorch, or one that cannot be told."""


def installed_build(python: str | None = None) -> Build:
    """The build that ``import torch`` would bring, without importing it: to this interpreter, or to `python`, a path or
    a command.

    Raises NoPyTorch if there is none, if its ``version.py`` says too little, or if `python` cannot be run.
    """
    metadata = torch_metadata() if python is None else _metadata_of(python)
    if metadata["origin"] is None:
        whose = "this Python" if python is None else python
        raise NoPyTorch(f"no PyTorch is installed for {whose}: `pip install torch`, or run another Python's fpxbench")
    version_file = Path(metadata["origin"]).parent / "version.py"
    return read_build(version_file, triton=metadata["triton"], declared_triton=_declared_triton(metadata["requires"]))


def _metadata_of(python: str) -> dict:
    command = shutil.which(os.path.expanduser(python))
    if command is None:
        raise NoPyTorch(f"{python!r} is no interpreter: a path as in ~/venv/bin/python, or a command on the PATH")
    # Not by the file's path, which would put fpxbench's own modules before the standard library's; nor in this folder,
    # where a checkout of PyTorch may lie.
    source = Path(torch_metadata_module.__file__).read_text(encoding="utf-8")
    try:
        done = subprocess.run([os.path.abspath(command), "-c", source], capture_output=True, text=True, cwd="/",
                              timeout=_ANSWER_WITHIN_S)
        return json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        said = (done.stderr.strip().splitlines() or [str(error)])[-1] if isinstance(error,
            json.JSONDecodeError) else str(error)
        raise NoPyTorch(f"{python} does not say which PyTorch it has: {said}") from error


def read_build(version_file: Path, triton: str | None = None, declared_triton: Requirement | None = None) -> Build:
    """The build that a PyTorch's ``version.py`` describes.

    `triton` is the version of the Triton beside it; `declared_triton` the one that this PyTorch asks for. Where the two
    differ, the pair is nobody's release or nightly: its channel is ``source``, so that it gets a place of its own on
    the timeline.
    """
    try:
        metadata = string_constants(version_file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise NoPyTorch(f"{version_file} cannot be read, so the installed PyTorch is not known: {error}") from error
    text = metadata.get("__version__")
    try:
        version = Version(str(text))
    except InvalidVersion as error:
        raise NoPyTorch(f"{version_file} says __version__ = {text!r}, which is no version") from error

    channel, day = channel_and_date(version)
    if triton and declared_triton and not declared_triton.specifier.contains(triton, prereleases=True):
        channel = "source"
    build = Build(
        torch=str(text),
        triton=triton,
        git=git_commit(metadata.get("git_version")),
        channel=channel,
        variant=_variant(version, metadata),
        date=day,
    )
    return build.model_copy(update={"key": commit_hash(build)})


def string_constants(source: str) -> dict[str, str | None]:
    """``name = "constant"``, annotated or not, of a module's source."""
    found: dict[str, str | None] = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node,
                                                                                                ast.AnnAssign) else []
        if isinstance(getattr(node, "value", None), ast.Constant):
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str | None):
                    found[target.id] = node.value.value
    return found


def channel_and_date(version: Version) -> tuple[str, str | None]:
    """The channel, and the date where the version tells it: a release's version does not."""
    published = version.local is None or _VARIANT.fullmatch(version.local)
    if published and version.dev is not None and _is_day(str(version.dev)):
        return "nightly", date.fromisoformat(str(version.dev)).isoformat()
    if published and version.dev is None and (version.pre is None or version.pre[0] == "rc"):
        return "release", None
    return "source", None


def _is_day(text: str) -> bool:
    try:
        return bool(re.fullmatch(r"20\d{6}", text) and date.fromisoformat(text))
    except ValueError:
        return False


def _variant(version: Version, metadata: dict[str, str | None]) -> str:
    """``cpu``, ``cu130``, ``rocm7.2``, ``xpu``: from the version's local part, else from what it was compiled
    against.
    """
    if version.local and _VARIANT.fullmatch(version.local):
        return version.local
    if cuda := metadata.get("cuda"):
        return "cu" + "".join(cuda.split(".")[:2])
    if rocm := metadata.get("rocm") or metadata.get("hip"):
        return "rocm" + ".".join(rocm.split(".")[:2])
    return "xpu" if metadata.get("xpu") else "cpu"


def git_commit(commit: str | None) -> str | None:
    """The upstream commit; builds outside a git checkout say ``Unknown``."""
    return commit if commit and re.fullmatch(r"[0-9a-f]{7,40}", commit) else None


def _declared_triton(requires: list[str]) -> Requirement | None:
    """The Triton that an installed PyTorch asks for; a CPU build asks for none, and then any will do."""
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # another project's metadata: not ours to refuse
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name.lower().replace("_", "-") in TRITON_DISTRIBUTIONS:
            return requirement
    return None

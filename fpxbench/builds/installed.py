"""Read which PyTorch build is installed from its files.

Nothing here imports PyTorch: asv's process and the benchmarks use this, and the import takes seconds.
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
from fpxbench.user_error import UserError

_ANSWER_WITHIN_S = 60
_VARIANT = re.compile(r"cpu|cu\d+|rocm\d+(\.\d+)*|xpu")


class NoPyTorch(UserError):
    """This interpreter has no PyTorch, or one that cannot be identified."""


def installed_build(python: str | None = None) -> Build:
    """Return the build that ``import torch`` would load in this interpreter, or in `python` (a path or a command).

    Raise NoPyTorch if there is none, if its ``version.py`` is incomplete, or if `python` cannot be run.
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
        raise NoPyTorch(f"{python!r} is not an interpreter: a path as in ~/venv/bin/python, or a command on the PATH")
    # Running the file by its path would put fpxbench's modules before the standard library's; and the working folder
    # may be a checkout of PyTorch.
    source = Path(torch_metadata_module.__file__).read_text(encoding="utf-8")
    try:
        done = subprocess.run([os.path.abspath(command), "-c", source], capture_output=True, text=True, cwd="/",
                              timeout=_ANSWER_WITHIN_S)
        return json.loads(done.stdout)
    except (OSError, subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        no_answer = isinstance(error, json.JSONDecodeError)
        reason = (done.stderr.strip().splitlines() or [str(error)])[-1] if no_answer else str(error)
        raise NoPyTorch(f"{python} does not report which PyTorch it has: {reason}") from error


def read_build(version_file: Path, triton: str | None = None, declared_triton: Requirement | None = None) -> Build:
    """Return the build that a PyTorch's ``version.py`` describes.

    `triton` is the version of the installed Triton, `declared_triton` the one that this PyTorch requires. If they
    differ, the pair is neither a release nor a nightly: its channel is ``source``, with an entry of its own on the
    timeline.
    """
    try:
        metadata = string_constants(version_file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise NoPyTorch(f"{version_file} cannot be read, so the installed PyTorch is not known: {error}") from error
    text = metadata.get("__version__")
    try:
        version = Version(str(text))
    except InvalidVersion as error:
        raise NoPyTorch(f"{version_file} says __version__ = {text!r}, which is not a version") from error

    channel, day = channel_and_date(version)
    if triton and declared_triton and not declared_triton.specifier.contains(triton, prereleases=True):
        channel = "source"
    build = Build(torch=str(text), triton=triton, git=git_commit(metadata.get("git_version")), channel=channel,
                  variant=_variant(version, metadata), date=day)
    return build.model_copy(update={"key": commit_hash(build)})


def string_constants(source: str) -> dict[str, str | None]:
    """Return the constants that a module's source assigns, ``name = "constant"``, annotated or not."""
    found: dict[str, str | None] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str | None):
                    found[target.id] = node.value.value
    return found


def channel_and_date(version: Version) -> tuple[str, str | None]:
    """Return the channel, and the date if the version has one (a nightly's)."""
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
    """Return ``cpu``, ``cu130``, ``rocm7.2`` or ``xpu``: the version's local part, else what it was compiled for."""
    if version.local and _VARIANT.fullmatch(version.local):
        return version.local
    if cuda := metadata.get("cuda"):
        return "cu" + "".join(cuda.split(".")[:2])
    if rocm := metadata.get("rocm") or metadata.get("hip"):
        return "rocm" + ".".join(rocm.split(".")[:2])
    return "xpu" if metadata.get("xpu") else "cpu"


def git_commit(commit: str | None) -> str | None:
    """Return the upstream commit; None for builds outside a git checkout, which report ``Unknown``."""
    return commit if commit and re.fullmatch(r"[0-9a-f]{7,40}", commit) else None


def _declared_triton(requires: list[str]) -> Requirement | None:
    """Return the Triton that an installed PyTorch requires; None for a CPU build, which requires none."""
    for line in requires:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # invalid metadata of another project
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name.lower().replace("_", "-") in TRITON_DISTRIBUTIONS:
            return requirement
    return None

"""The PyTorch build that is installed, read from its files.

asv's own process and the benchmarks ask for it, and importing PyTorch takes seconds, so nothing here imports it.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from fpxbench.record import Build
from fpxbench.timeline import commit_hash

# The module is always `triton`; PyTorch's own builds of it carry these names, nightlies and ROCm ones among them.
TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu")

_VARIANT = re.compile(r"cpu|cu\d+|rocm\d+(\.\d+)*|xpu")
_NIGHTLY_DATE = re.compile(r"(\d{4})(\d{2})(\d{2})")


class NoPyTorch(RuntimeError):
    """This interpreter has no PyTorch, or one that cannot be told."""


def installed_build() -> Build:
    """The build that ``import torch`` would bring, without importing it.

    Raises NoPyTorch if there is none, or if its ``version.py`` says too little.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NoPyTorch("no PyTorch is installed for this Python: `pip install torch`, or run another Python's fpxbench")
    declared, triton = _declared_triton(), _installed_triton()
    return read_build(Path(spec.origin).parent / "version.py", triton=triton, declared_triton=declared)


def read_build(version_file: Path, triton: str | None = None, declared_triton: Requirement | None = None) -> Build:
    """The build that a PyTorch's ``version.py`` describes.

    `triton` is the version of the Triton beside it; `declared_triton` the one that this PyTorch asks for. Where the two differ,
    the pair is nobody's release or nightly: its channel is ``source``, so that it gets a place of its own on the timeline.
    """
    try:
        facts = _assignments(version_file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise NoPyTorch(f"{version_file} cannot be read, so the installed PyTorch is not known: {error}") from error
    text = facts.get("__version__")
    try:
        version = Version(str(text))
    except InvalidVersion as error:
        raise NoPyTorch(f"{version_file} says __version__ = {text!r}, which is no version") from error

    channel, date = _channel(version)
    if triton and declared_triton and not declared_triton.specifier.contains(triton, prereleases=True):
        channel = "source"
    build = Build(
        torch=str(text),
        triton=triton,
        git=_git(facts.get("git_version")),
        channel=channel,
        variant=_variant(version, facts),
        date=date,
    )
    return build.model_copy(update={"key": commit_hash(build)})


def _assignments(source: str) -> dict[str, str | None]:
    """``name = "constant"``, annotated or not, of a module's source."""
    found: dict[str, str | None] = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if isinstance(getattr(node, "value", None), ast.Constant):
            for target in targets:
                if isinstance(target, ast.Name) and isinstance(node.value.value, str | None):
                    found[target.id] = node.value.value
    return found


def _channel(version: Version) -> tuple[str, str | None]:
    """The channel, and the date where the version tells it: a release's version does not."""
    published = version.local is None or _VARIANT.fullmatch(version.local)
    if published and version.dev is not None and (match := _NIGHTLY_DATE.fullmatch(str(version.dev))):
        return "nightly", "-".join(match.groups())
    if published and version.dev is None and (version.pre is None or version.pre[0] == "rc"):
        return "release", None
    return "source", None


def _variant(version: Version, facts: dict[str, str | None]) -> str:
    """``cpu``, ``cu130``, ``rocm7.2``, ``xpu``: from the version's local part, else from what it was compiled against."""
    if version.local and _VARIANT.fullmatch(version.local):
        return version.local
    if cuda := facts.get("cuda"):
        return "cu" + "".join(cuda.split(".")[:2])
    if rocm := facts.get("rocm") or facts.get("hip"):
        return "rocm" + ".".join(rocm.split(".")[:2])
    return "xpu" if facts.get("xpu") else "cpu"


def _git(commit: str | None) -> str | None:
    """The upstream commit; builds outside a git checkout say ``Unknown``."""
    return commit if commit and re.fullmatch(r"[0-9a-f]{7,40}", commit) else None


def _installed_triton() -> str | None:
    for name in TRITON_DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _declared_triton() -> Requirement | None:
    """The Triton that the installed PyTorch asks for; a CPU build asks for none, and then any will do."""
    try:
        lines = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path, never installed
        return None
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:  # another project's metadata: not ours to refuse
            continue
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name.lower().replace("_", "-") in TRITON_DISTRIBUTIONS:
            return requirement
    return None

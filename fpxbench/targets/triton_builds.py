"""Which Triton: the installed one, a release by its version, or whatever lies in a folder."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

INSTALLED = "installed"
_INSTALL_S = 3600


class TritonUnavailable(RuntimeError):
    """A Triton that cannot be had here, and why, in a sentence."""


@dataclass(frozen=True)
class TritonInstall:
    """A Triton that can be run: an interpreter, and the folder that holds the package (None: the interpreter's own)."""

    requested: str
    python: str
    folder: Path | None

    def command(self, script: Path) -> list[str]:
        """How to run a script under it. From a folder nothing else that is installed can be seen, so nothing else is needed."""
        return [self.python, *(["-S"] if self.folder else []), str(script)]

    @property
    def environment(self) -> dict[str, str]:
        path = {"PYTHONPATH": str(self.folder)} if self.folder else {}
        return {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTHONPATH"))} | path


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/fpxbench``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpxbench"


def normal_name(requested: str) -> str:
    """A version as Triton's releases are called: ``3.0`` is ``3.0.0``. What is no version (`INSTALLED`, a path) is left as it is."""
    if os.sep in requested or Path(requested).exists():
        return requested
    try:
        version = Version(requested)
    except InvalidVersion:
        return requested
    rest = str(version).removeprefix(version.base_version)
    return version.base_version + ".0" * (3 - len(version.release)) + rest


def find_triton(requested: str, say: Callable[[str], None] = lambda text: None) -> TritonInstall:
    """``installed``, a version (fetched once, and kept), or the path of a folder with a Triton in it or of a Python that has one.

    Raises TritonUnavailable.
    """
    if requested == INSTALLED:
        if importlib.util.find_spec("triton") is None:
            raise TritonUnavailable("no Triton is installed for this Python: name versions to fetch with --triton, or `pip install triton`")
        return TritonInstall(requested, sys.executable, None)
    path = Path(requested)
    if os.sep in requested or path.exists():
        if (path / "triton" / "__init__.py").is_file():
            return TritonInstall(requested, sys.executable, path.resolve())
        if path.is_file() and os.access(path, os.X_OK):
            return TritonInstall(requested, str(path.absolute()), None)
        raise TritonUnavailable(f"{requested} is neither a folder with a `triton` package in it nor a Python interpreter")
    try:
        Version(requested)
    except InvalidVersion:
        raise TritonUnavailable(f"{requested!r} is no version of Triton, and no folder or interpreter either") from None
    return TritonInstall(requested, sys.executable, _fetched(normal_name(requested), say))


def _fetched(version: str, say: Callable[[str], None]) -> Path:
    folder = cache_root() / "triton" / f"{version}-cp{sys.version_info[0]}{sys.version_info[1]}"
    if folder.is_dir():
        return folder
    say(f"fetching Triton {version} into {folder} (some hundred MB)")
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=folder.parent))
        _install(version, partial)
        try:
            partial.rename(folder)      # only what is whole gets the name
        except OSError:
            if not folder.is_dir():     # somebody else was as fast
                raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise TritonUnavailable(_no_space(version, folder) if full else f"Triton {version} cannot be kept in {folder}: {error.strerror}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _install(version: str, folder: Path) -> None:
    """Without what it depends on: the compiler needs none of it. Both installers follow the user's own index configuration."""
    if uv := shutil.which("uv"):
        command = [uv, "pip", "install", "--quiet", "--python", sys.executable]
    else:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run = subprocess.run([*command, "--no-deps", "--only-binary", ":all:", "--target", str(folder), f"triton=={version}"],
                         capture_output=True, text=True, errors="replace", timeout=_INSTALL_S)
    if run.returncode == 0:
        return
    said = run.stderr + run.stdout
    if re.search(r"No space left on device|Disk quota exceeded", said):
        raise TritonUnavailable(_no_space(version, folder.parent))
    if re.search(r"No matching distribution|no (?:matching )?wheels?|there is no version|not found in the package registry", said, re.IGNORECASE):
        raise TritonUnavailable(f"Triton {version} has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]} on this machine, "
                           "or the index does not have it: `pip index versions triton` lists those that it has")
    last = [line.strip() for line in said.splitlines() if line.strip()][-3:]
    raise TritonUnavailable(f"Triton {version} could not be installed: {' | '.join(last) or f'the installer ended with {run.returncode}'}")


def _no_space(version: str, folder: Path) -> str:
    return (f"there is no space left for Triton {version} (about 1 GB unpacked) in {folder.parent}: "
            "make room, or name another place with XDG_CACHE_HOME")

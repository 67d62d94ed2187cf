"""Find a Triton: the installed one, a release by its version, or one in a folder."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from fpxbench.builds import installer
from fpxbench.cache_folder import cache_root

INSTALLED = "installed"


class TritonUnavailable(RuntimeError):
    """A Triton that cannot be obtained here; the message says why."""


@dataclass(frozen=True)
class TritonInstall:
    """A Triton that can be run: an interpreter, and the folder that has the package (None: the interpreter's own)."""

    requested: str
    python: str
    folder: Path | None

    def command(self, script: Path) -> list[str]:
        """Return the command that runs a script under it; with a folder, no other installed package is visible."""
        return [self.python, *(["-S"] if self.folder else []), str(script)]

    @property
    def environment(self) -> dict[str, str]:
        path = {"PYTHONPATH": str(self.folder)} if self.folder else {}
        return {name: value for name, value in os.environ.items()
                if not name.startswith(("TRITON_", "PYTHONPATH"))} | path


def normal_name(requested: str) -> str:
    """Return a version as Triton's releases are named (``3.0`` is ``3.0.0``), and anything else unchanged."""
    if os.sep in requested or Path(requested).exists():
        return requested
    try:
        version = Version(requested)
    except InvalidVersion:
        return requested
    rest = str(version).removeprefix(version.base_version)
    return version.base_version + ".0" * (3 - len(version.release)) + rest


def find_triton(requested: str, notify: Callable[[str], None] = lambda message: None) -> TritonInstall:
    """Return the Triton that `requested` names.

    That is ``installed``, a version (fetched once, and kept), or the path of a folder with a ``triton`` package or of a
    Python that has one. Raises TritonUnavailable.
    """
    if requested == INSTALLED:
        if importlib.util.find_spec("triton") is None:
            raise TritonUnavailable("no Triton is installed for this Python: name versions to fetch with --triton, "
                                    "or `pip install triton`")
        return TritonInstall(requested, sys.executable, None)
    path = Path(requested)
    if os.sep in requested or path.exists():
        if (path / "triton" / "__init__.py").is_file():
            return TritonInstall(requested, sys.executable, path.resolve())
        if path.is_file() and os.access(path, os.X_OK):
            return TritonInstall(requested, str(path.absolute()), None)
        raise TritonUnavailable(f"{requested} is neither a folder with a `triton` package nor a Python interpreter")
    try:
        Version(requested)
    except InvalidVersion:
        raise TritonUnavailable(f"{requested!r} is neither a version of Triton nor a folder or interpreter") from None
    return TritonInstall(requested, sys.executable, _fetched(normal_name(requested), notify))


def _fetched(version: str, notify: Callable[[str], None]) -> Path:
    folder = cache_root() / "triton" / f"{version}-cp{sys.version_info[0]}{sys.version_info[1]}"
    if folder.is_dir():
        return folder
    notify(f"fetching Triton {version} into {folder} (several hundred MB)")
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=folder.parent))
        _install(version, partial)
        try:
            (partial / "packages").rename(folder)      # only a complete installation gets the name
        except OSError:
            if not folder.is_dir():     # another process was faster
                raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TritonUnavailable(_no_space(version, folder.parent)) from error
        raise TritonUnavailable(f"Triton {version} cannot be stored in {folder}: {error.strerror}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _install(version: str, partial: Path) -> None:
    """Install into ``packages`` of `partial`, without dependencies: the compiler needs none. Raises TritonUnavailable.
    """
    log = partial / "install.log"
    try:
        options = ("--no-deps", "--only-binary", ":all:", "--target", str(partial / "packages"))
        if installer.install(installer.choose_installer(), [f"triton=={version}"], log, arguments=options) == 0:
            return
    except installer.NoInstaller as error:
        raise TritonUnavailable(f"Triton {version} cannot be fetched: {error}") from error
    if installer.is_disk_full(log):
        raise TritonUnavailable(_no_space(version, partial.parent))
    if installer.is_unreachable(log):
        raise TritonUnavailable(f"Triton {version} could not be fetched: the package index did not answer")
    if installer.is_no_such_wheel(log):
        raise TritonUnavailable(
            f"Triton {version} has no wheel for Python {sys.version_info[0]}.{sys.version_info[1]} on this machine, or "
            "the index does not list it: `pip index versions triton` shows the versions that it lists")
    raise TritonUnavailable(f"Triton {version} could not be installed: {installer.error_message(log)}")


def _no_space(version: str, folder: Path) -> str:
    return (f"there is no space left for Triton {version} (about 1 GB unpacked) in {folder}: free some, or set "
            "XDG_CACHE_HOME to a folder on another disk")

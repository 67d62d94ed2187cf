"""The folder of environments; each is made once, under a lock, and is complete or absent.

``ROOT/NAME/`` holds ``environment.json`` (written last), ``install.log``, ``venv/`` and ``shared/``. Users of an
environment lock ``ROOT/NAME.lock`` shared; making or removing it takes an exclusive lock. A process that is killed
while it makes one leaves no ``environment.json``, and the next user starts over.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fpxbench.builds import installer
from fpxbench.builds.environments.shared_packages import fingerprint, share
from fpxbench.builds.environments.specification import EnvironmentSpec, EnvironmentState
from fpxbench.records.record import Build
from fpxbench.whole_file import write_whole

ROOT_VARIABLE = "FPX_ENVIRONMENTS"
RETRY_AFTER_S = 24 * 3600
"""A failed installation is not retried sooner: an index seldom repairs a build, and each attempt costs minutes."""

_STATE = "environment.json"
_LOG = "install.log"
# A CPU build does not require Triton, so it may be missing beside PyTorch.
_PROBES = {
    True: "from fpxbench.builds.installed import installed_build; build = installed_build(); import torch; "
          "print(build.model_dump_json())",
    False: "import triton",
}
"""The code that must run in an environment with PyTorch (True), or without."""


class CannotInstall(RuntimeError):
    """The build was refused: no such version, incompatible requirements, a PyTorch that cannot be imported."""

    def __init__(self, state: EnvironmentState, folder: Path) -> None:
        self.state = state
        when = f" (tried {state.made_at[:10]}; --retry tries again)" if state.age_s > 60 else ""
        super().__init__(f"{state.spec.tag} ({state.spec.variant}) cannot be installed: {state.why}{when}; "
                         f"{folder / _LOG} has the whole log")


class IndexUnreachable(RuntimeError):
    """The index did not answer, so nothing is known about the build."""


class DiskFull(RuntimeError):
    """The disk is full; the partial environment has been removed."""


class InUse(RuntimeError):
    """Another process uses the environment, or is making it."""


def default_root() -> Path:
    """Return ``.asv/env`` beside the timeline, or the folder that FPX_ENVIRONMENTS names."""
    return Path(os.environ.get(ROOT_VARIABLE) or ".asv/env").absolute()


@dataclass(frozen=True)
class Environment:
    """A complete environment, which is not removed while it is leased."""

    folder: Path
    state: EnvironmentState

    @property
    def python(self) -> Path:
        return _python(self.folder)

    @property
    def build(self) -> Build:
        """The build that its PyTorch reports; without PyTorch, the timeline's."""
        return self.state.build or self.state.spec.build

    @property
    def size(self) -> int:
        """Size on disk in bytes, including files that uv linked from its cache."""
        return _size(self.folder)

    @property
    def used(self) -> float:
        """When it was last leased, in seconds since 1970."""
        return _lock_file(self.folder).stat().st_mtime


class Environments:
    """The environments under one folder."""

    def __init__(self, root: Path | None = None, notify: Callable[[str], None] = lambda line: None) -> None:
        self.root = (root or default_root()).absolute()
        self._notify = notify

    @contextmanager
    def lease(self, spec: EnvironmentSpec, retry: bool = False) -> Iterator[Environment]:
        """Yield the environment, making it if necessary; it cannot be removed until the context ends.

        Raise CannotInstall (`retry` repeats an attempt that failed less than a day ago), IndexUnreachable, DiskFull,
        and NoInstaller or NotInstalled if this Python lacks a prerequisite.
        """
        folder = self.root / spec.name
        self.root.mkdir(parents=True, exist_ok=True)
        with open(_lock_file(folder), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            while (state := _usable(folder, spec, retry)) is None:
                self._lock_exclusively(lock, spec)
                if _usable(folder, spec, retry) is None:      # another process may have made it in the meantime
                    self._make_usable(folder, spec)
                    retry = False
                # Exchanging the lock for a shared one is not atomic: another process may remove the environment.
                fcntl.flock(lock, fcntl.LOCK_SH)
            if state.status == "failed":
                raise CannotInstall(state, folder)
            os.utime(lock.fileno())
            yield Environment(folder, state)

    def _lock_exclusively(self, lock, spec: EnvironmentSpec) -> None:
        fcntl.flock(lock, fcntl.LOCK_UN)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._notify(f"{spec.name} is being made, or removed, by another process: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)

    def _make_usable(self, folder: Path, spec: EnvironmentSpec) -> None:
        state = _read(folder)
        if state is None or state.status != "ready" or state.spec.requirements != spec.requirements \
                or not _python(folder).exists():
            self._make(folder, spec)
            return
        # It was made by another Python, or the shared libraries have changed since.
        unlinked = share(folder / "shared", _site_packages(folder))
        if unlinked and installer.install(installer.choose_installer(), unlinked, folder / _LOG,
                                          python=_python(folder)):
            self._make(folder, spec)
        else:
            _write(folder, state.model_copy(update={"shared": fingerprint()}))

    def _make(self, folder: Path, spec: EnvironmentSpec) -> None:
        _remove(folder)
        try:
            folder.mkdir()
            self._attempt(folder, spec)
        except OSError as error:
            _remove(folder)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(spec) from error
            raise
        except BaseException:
            _remove(folder)
            raise

    def _attempt(self, folder: Path, spec: EnvironmentSpec) -> None:
        started, log = time.monotonic(), folder / _LOG
        chosen = installer.choose_installer()
        self._notify(f"installing {', '.join(spec.requirements)} into {folder} with {chosen}")
        why, build = self._fill(folder, spec, chosen)
        if why and installer.is_disk_full(log):
            raise self._disk_full(spec)
        if why and installer.is_unreachable(log):
            last_lines = "\n".join(installer.tail(log).strip().splitlines()[-6:])
            raise IndexUnreachable(f"{spec.tag} ({spec.variant}) was not installed: the package index did not answer. "
                                   f"The build is not marked as broken; try again later.\n{last_lines}")
        state = EnvironmentState(
            spec=spec, status="failed" if why else "ready", why=why, log_tail=installer.tail(log) if why else "",
            build=build, installer=chosen, shared=fingerprint(), seconds=round(time.monotonic() - started, 1))
        if why:     # a failed environment takes no space
            shutil.rmtree(folder / "venv")
            shutil.rmtree(folder / "shared")
        _write(folder, state)

    def _fill(self, folder: Path, spec: EnvironmentSpec, chosen: str) -> tuple[str, Build | None]:
        """Install and import the build; return why that failed (empty if it did not), and the build that it reports."""
        log = folder / _LOG
        log.touch()
        installer.make_venv(folder / "venv")
        unlinked = share(folder / "shared", _site_packages(folder))
        if installer.install(chosen, [*spec.requirements, *unlinked], log, python=_python(folder),
                             arguments=spec.arguments, notify=self._notify_progress):
            return f"{chosen} reports: {installer.error_message(log)}", None
        with_torch = "torch" in spec.parts
        done = subprocess.run([_python(folder), "-c", _PROBES[with_torch]], capture_output=True, text=True,
                              env=installer.isolated_environment())
        with open(log, "a", encoding="utf-8") as output:
            output.write(f"$ python -c '{_PROBES[with_torch]}'\n{done.stderr}")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            return f"it was installed, but cannot be imported: {last[:300]}", None
        build = Build.model_validate_json(done.stdout.splitlines()[-1]) if with_torch else None
        if build is not None and build.key != spec.key:
            return f"the index gave PyTorch {build.torch} ({build.channel}, Triton {build.triton}) instead", None
        return "", build

    def _notify_progress(self, line: str) -> None:
        if line.startswith(("Downloading", "Installing", "Collecting torch", "Building")):
            self._notify(f"  {line}")

    def _disk_full(self, spec: EnvironmentSpec) -> DiskFull:
        return DiskFull(
            f"the disk of {self.root} is full, so {spec.tag} ({spec.variant}) was not installed; the partial "
            "environment has been removed. `fpxbench environments list` shows the size of each environment, and "
            "`fpxbench environments remove NAME` frees it"
        )

    def all(self) -> list[tuple[str, Environment | None]]:
        """Return every environment by name; None for one that is unfinished, or being made."""
        folders = sorted(path for path in self.root.glob("*") if path.is_dir())
        return [(folder.name, Environment(folder, state) if (state := _read(folder)) else None) for folder in folders]

    def remove(self, name: str) -> int:
        """Remove one; return its size in bytes. Raise InUse, and FileNotFoundError for an unknown name."""
        folder = self.root / name
        if name not in (known for known, _ in self.all()):
            raise FileNotFoundError(f"no environment {name!r} in {self.root}: `fpxbench environments list` shows them")
        with open(_lock_file(folder), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUse(f"{name} is in use by another process, and was not removed") from None
            size = _size(folder)
            _remove(folder)
        return size


def _usable(folder: Path, spec: EnvironmentSpec, retry: bool) -> EnvironmentState | None:
    """Return the state of a finished environment that matches `spec` and is not due for another attempt."""
    state = _read(folder)
    if state is None or state.spec.requirements != spec.requirements:
        return None
    if state.status == "failed":
        return None if retry or state.age_s > RETRY_AFTER_S else state
    return state if state.shared == fingerprint() and _python(folder).exists() else None


def _read(folder: Path) -> EnvironmentState | None:
    try:
        return EnvironmentState.model_validate_json((folder / _STATE).read_bytes())
    except (OSError, ValidationError):  # unfinished, or another fpxbench's: made again
        return None


def _write(folder: Path, state: EnvironmentState) -> None:
    write_whole(folder / _STATE, state.model_dump_json(by_alias=True, indent=2))


def _python(folder: Path) -> Path:
    return folder / "venv" / "bin" / "python"


def _site_packages(folder: Path) -> Path:
    (found,) = (folder / "venv").glob("lib/python*/site-packages")
    return found


def _remove(folder: Path) -> None:
    """Remove the state first, so that an interrupted removal leaves nothing that looks complete."""
    (folder / _STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _size(folder: Path) -> int:
    """Return the size on disk of the files of `folder` in bytes, counting hard-linked files once."""
    blocks: dict[int, int] = {}
    for path, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(path, name))
            blocks[status.st_ino] = status.st_blocks
    return 512 * sum(blocks.values())

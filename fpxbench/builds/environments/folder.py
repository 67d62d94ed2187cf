"""The folder of environments: each made once, under a lock, complete or not there.

``ROOT/NAME/`` holds ``environment.json`` (written last), ``install.log``, ``venv/`` and ``shared/``; ``ROOT/NAME.lock`` is held, shared,
by whoever uses the environment, and alone by whoever makes or removes it. A process that is killed while it makes one leaves no
``environment.json``, and the next that wants it begins anew.
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

from fpxbench.builds.environments import installer
from fpxbench.builds.environments.shared_packages import fingerprint, share
from fpxbench.builds.environments.specification import EnvironmentSpec, EnvironmentState
from fpxbench.records.record import Build

ROOT_VARIABLE = "FPX_ENVIRONMENTS"
RETRY_AFTER_S = 24 * 3600
"""A build that could not be installed is not tried again before: an index seldom mends one, and each try costs minutes."""

_STATE = "environment.json"
# A CPU build brings no Triton of its own, so that where there is a PyTorch, Triton may be missing.
_PROBES = {
    True: "from fpxbench.builds.installed import installed_build; build = installed_build(); import torch; print(build.model_dump_json())",
    False: "import triton",
}
"""What must run in an environment, with PyTorch and without."""


class CannotInstall(RuntimeError):
    """The build was refused: no such version, files that do not fit together, a PyTorch that cannot be imported. A finding."""

    def __init__(self, state: EnvironmentState, folder: Path) -> None:
        self.state = state
        when = f" (tried {state.made_at[:10]}; --retry tries again)" if state.age_s > 60 else ""
        super().__init__(f"{state.spec.tag} ({state.spec.variant}) cannot be installed: {state.why}{when}; {folder / 'install.log'} has all of it")


class IndexUnreachable(RuntimeError):
    """The index did not answer: nothing is known of the build."""


class DiskFull(RuntimeError):
    """What was half made has been removed."""


class InUse(RuntimeError):
    """Another process works in the environment, or makes it."""


def default_root() -> Path:
    """``.asv/env`` beside the timeline, or what FPX_ENVIRONMENTS says."""
    return Path(os.environ.get(ROOT_VARIABLE) or ".asv/env").absolute()


@dataclass(frozen=True)
class Environment:
    """One that is there, complete, and will not be removed as long as it is held."""

    folder: Path
    state: EnvironmentState

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def build(self) -> Build:
        """The build as found in it; as the timeline knows it where PyTorch is no part."""
        return self.state.build or self.state.spec.build

    @property
    def size(self) -> int:
        """Bytes on disk. What uv has linked from its cache counts here too."""
        return _size(self.folder)

    @property
    def used(self) -> float:
        """When it was last held, in seconds since 1970."""
        return _lock_file(self.folder).stat().st_mtime


class Environments:
    """Those under one folder."""

    def __init__(self, root: Path | None = None, say: Callable[[str], None] = lambda line: None) -> None:
        self.root = (root or default_root()).absolute()
        self._say = say

    @contextmanager
    def lease(self, spec: EnvironmentSpec, retry: bool = False) -> Iterator[Environment]:
        """The environment, made if need be, and kept from being removed until the context ends.

        Raises CannotInstall (`retry` tries again what failed less than a day ago), IndexUnreachable, DiskFull, and NoInstaller or
        NotInstalled where this Python lacks what it takes.
        """
        folder = self.root / spec.name
        self.root.mkdir(parents=True, exist_ok=True)
        with open(_lock_file(folder), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            while (state := _usable(folder, spec, retry)) is None:
                self._lock_exclusively(lock, spec)
                if _usable(folder, spec, retry) is None:      # another process may have made it meanwhile
                    self._make_usable(folder, spec)
                    retry = False
                # Giving up the lock for a shared one is no single step: somebody may remove the environment in between.
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
            self._say(f"{spec.name} is being made, or removed, by another process: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)

    def _make_usable(self, folder: Path, spec: EnvironmentSpec) -> None:
        state = _read(folder)
        whole = state is not None and state.status == "ready" and state.spec.requirements == spec.requirements
        if not whole or not (folder / "venv/bin/python").exists():
            self._make(folder, spec)
            return
        # Made by another Python, or its libraries have changed since.
        unlinked = share(folder / "shared", _site_packages(folder))
        if unlinked and installer.install(installer.chosen(), folder / "venv/bin/python", unlinked, (), folder / "install.log"):
            self._make(folder, spec)
        else:
            _write(folder, state.model_copy(update={"shared": fingerprint()}))

    def _make(self, folder: Path, spec: EnvironmentSpec) -> None:
        _forget(folder)
        try:
            folder.mkdir()
            self._attempt(folder, spec)
        except OSError as error:
            _forget(folder)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(spec) from error
            raise
        except BaseException:
            _forget(folder)
            raise

    def _attempt(self, folder: Path, spec: EnvironmentSpec) -> None:
        started = time.monotonic()
        chosen = installer.chosen()
        self._say(f"installing {', '.join(spec.requirements)} into {folder} with {chosen}")
        why, build = self._fill(folder, spec, chosen)
        log = installer.tail(folder / "install.log")
        if why and installer.is_disk_full(log):
            raise self._disk_full(spec)
        if why and installer.is_unreachable(folder / "install.log"):
            raise IndexUnreachable(f"{spec.tag} ({spec.variant}) was not installed: the package index did not answer. "
                                   f"Nothing is held against the build; try again later.\n{_last_lines(log)}")
        state = EnvironmentState(spec=spec, status="failed" if why else "ready", why=why, log_tail=log if why else "", build=build, installer=chosen,
                      shared=fingerprint(), seconds=round(time.monotonic() - started, 1))
        if why:     # what is no use takes no room
            shutil.rmtree(folder / "venv")
            shutil.rmtree(folder / "shared")
        _write(folder, state)

    def _fill(self, folder: Path, spec: EnvironmentSpec, chosen: str) -> tuple[str, Build | None]:
        """Why it cannot be had, in a sentence that is empty if it can; and the build as found there."""
        log = folder / "install.log"
        log.touch()
        installer.make_venv(folder / "venv")
        unlinked = share(folder / "shared", _site_packages(folder))
        python = folder / "venv" / "bin" / "python"
        if installer.install(chosen, python, [*spec.requirements, *unlinked], spec.arguments, log, self._say_progress):
            return f"{chosen} says: {_complaint(installer.tail(log))}", None
        with_torch = "torch" in spec.parts
        done = subprocess.run([python, "-c", _PROBES[with_torch]], capture_output=True, text=True, env=installer.bare_environment())
        with open(log, "a", encoding="utf-8") as kept:
            kept.write(f"$ python -c '{_PROBES[with_torch]}'\n{done.stderr}")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            return f"it was installed, and cannot be imported: {last[:300]}", None
        build = Build.model_validate_json(done.stdout.splitlines()[-1]) if with_torch else None
        if build is not None and build.key != spec.key:
            return f"the index gave PyTorch {build.torch} ({build.channel}, Triton {build.triton}) in its place", None
        return "", build

    def _say_progress(self, line: str) -> None:
        if line.startswith(("Downloading", "Installing", "Collecting torch", "Building")):
            self._say(f"  {line}")

    def _disk_full(self, spec: EnvironmentSpec) -> DiskFull:
        return DiskFull(
            f"the disk of {self.root} is full, so that {spec.tag} ({spec.variant}) was not installed; what was half made has been removed. "
            "`fpxbench environments list` shows what each of them takes, and `fpxbench environments remove NAME` makes room"
        )

    def all(self) -> list[tuple[str, Environment | None]]:
        """Every environment by name; None for one that was never finished, or is being made."""
        folders = sorted(path for path in self.root.glob("*") if path.is_dir())
        return [(folder.name, Environment(folder, state) if (state := _read(folder)) else None) for folder in folders]

    def remove(self, name: str) -> int:
        """Remove one; returns the bytes that it took. Raises InUse, and FileNotFoundError where there is none of that name."""
        folder = self.root / name
        if name not in (known for known, _ in self.all()):
            raise FileNotFoundError(f"no environment {name!r} in {self.root}: `fpxbench environments list` shows those that there are")
        with open(_lock_file(folder), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InUse(f"{name} is in use by another process, and was left where it is") from None
            size = _size(folder)
            _forget(folder)
        return size


def _usable(folder: Path, spec: EnvironmentSpec, retry: bool) -> EnvironmentState | None:
    """What is there, if it is finished, is what is wanted, and need not be tried again."""
    state = _read(folder)
    if state is None or state.spec.requirements != spec.requirements:
        return None
    if state.status == "failed":
        return None if retry or state.age_s > RETRY_AFTER_S else state
    return state if state.shared == fingerprint() and (folder / "venv/bin/python").exists() else None


def _read(folder: Path) -> EnvironmentState | None:
    try:
        return EnvironmentState.model_validate_json((folder / _STATE).read_bytes())
    except (OSError, ValidationError):  # not finished, or of another fpxbench: made anew
        return None


def _write(folder: Path, state: EnvironmentState) -> None:
    partial = folder / f"{_STATE}.partial"
    partial.write_text(state.model_dump_json(by_alias=True, indent=2))
    partial.replace(folder / _STATE)


def _site_packages(folder: Path) -> Path:
    (found,) = (folder / "venv").glob("lib/python*/site-packages")
    return found


def _forget(folder: Path) -> None:
    """First what says that it is complete, so that a removal that is cut off leaves nothing that looks so."""
    (folder / _STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _lock_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".lock")


def _size(folder: Path) -> int:
    seen: set[int] = set()
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            status = os.lstat(os.path.join(path, name))
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                total += status.st_blocks * 512
    return total


def _complaint(log: str) -> str:
    """The installer's own reason, from its last lines."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "× ", "╰─▶"))]
    return (errors or lines or ["nothing"])[-1][:400]


def _last_lines(log: str, count: int = 6) -> str:
    return "\n".join(log.strip().splitlines()[-count:])

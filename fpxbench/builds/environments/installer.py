"""uv where it is there, else pip: both look where the user's configuration of pip says, and both can be interrupted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fpxbench.builds.index.pip_settings import PipSettings

CHOICE_VARIABLE = "FPX_INSTALLER"
"""``pip`` or ``uv``, where the choice is not to be left to what is there."""
LOG_TAIL_BYTES = 4096

_DISK_FULL = re.compile(r"No space left on device|os error 28|Disk quota exceeded|os error 122")
_UNREACHABLE = re.compile(
    r"Retrying \(Retry|NewConnectionError|Failed to establish a new connection|Name or service not known|[Cc]onnection refused"
    r"|Temporary failure in name resolution|[Rr]ead timed out|[Cc]onnect(?:ion)? ?[Tt]im(?:ed|eout)|operation timed out"
    r"|error sending request|dns error|\b50[0234] (?:Server Error|Internal|Bad|Service|Gateway)"
)


class NoInstaller(RuntimeError):
    """There is neither uv nor pip."""


def chosen() -> str:
    """``uv`` or ``pip``. Raises NoInstaller, and ValueError where FPX_INSTALLER names something else."""
    choice = os.environ.get(CHOICE_VARIABLE, "")
    if choice not in ("", "uv", "pip"):
        raise ValueError(f"{CHOICE_VARIABLE}={choice!r}: uv or pip")
    if choice == "uv" or not choice and shutil.which("uv"):
        if not shutil.which("uv"):
            raise NoInstaller(f"{CHOICE_VARIABLE}=uv, and there is no uv on the PATH")
        return "uv"
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise NoInstaller(f"{sys.executable} has no pip, and there is no uv on the PATH: `python -m ensurepip` brings pip")
    return "pip"


def make_venv(folder: Path) -> None:
    """An empty virtual environment of this Python's base, without pip: the installer works on it from outside."""
    done = subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        if _DISK_FULL.search(said):
            raise OSError(28, "No space left on device", str(folder))
        raise NoInstaller(f"{sys.executable} cannot make a virtual environment: {said.splitlines()[-1] if said else done.returncode}")


def install(
    installer: str, python: Path, requirements: Sequence[str], arguments: Sequence[str], log: Path, say: Callable[[str], None] | None = None
) -> int:
    """Install into the environment of `python`; returns the installer's exit status, and leaves all it said in `log`, and in `log`.full
    what pip says only when asked for more.

    `say` is given its lines as they come. A process group of its own is ended with KeyboardInterrupt.
    """
    environment = bare_environment()
    if installer == "uv":
        command = ["uv", "pip", "install", "--no-progress", "--python", str(python), *_for_uv(environment), *arguments, *requirements]
    else:
        command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-input", "--disable-pip-version-check",
                   "--progress-bar", "off", "--log", full_log(log), *arguments, *requirements]
    with open(log, "a", encoding="utf-8") as kept:
        kept.write(f"$ {without_credentials(' '.join(command))}\n")
        kept.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", env=environment, start_new_session=True)
        try:
            for line in process.stdout:
                line = without_credentials(line)
                kept.write(line)
                kept.flush()
                if say is not None:
                    say(line.rstrip())
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def bare_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """`environment`, or this process's, without what would let another Python's packages into an environment."""
    leaking = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "ASV_PYTHONPATH", "__PYVENV_LAUNCHER__", "PIP_REQUIRE_VIRTUALENV",
               "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    return {name: value for name, value in (environment or os.environ).items() if name not in leaking} | {"PYTHONNOUSERSITE": "1"}


def _for_uv(environment: dict[str, str]) -> Iterator[str]:
    """What pip is configured with, as options of uv (and certificates in `environment`), unless uv has been told itself."""
    if any(name.startswith(("UV_INDEX", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX", "UV_FIND_LINKS", "UV_CONFIG_FILE")) for name in environment):
        return
    from fpxbench.builds.index.pip_settings import (  # brings an HTTP client, which asv's start can do without
        NoPip,
        pip_settings,
    )

    try:
        settings = pip_settings()
    except NoPip:   # then there is no configuration of pip's to honour
        return
    yield from uv_options(settings)
    if settings.cert:
        environment.setdefault("SSL_CERT_FILE", settings.cert)
    if settings.client_cert:
        environment.setdefault("SSL_CLIENT_CERT", settings.client_cert)
    if settings.proxy:
        environment.setdefault("ALL_PROXY", settings.proxy)
    environment.setdefault("UV_HTTP_TIMEOUT", str(round(settings.timeout_s)))


def uv_options(settings: PipSettings) -> Iterator[str]:
    """Where pip would look, said to uv; and as pip does, the best version of all indexes is taken, not the first index's."""
    yield from ("--index-strategy", "unsafe-best-match")
    if settings.no_index:
        yield "--no-index"
    else:
        yield from ("--index-url", settings.index_url)
        for url in settings.extra_index_urls:
            yield from ("--extra-index-url", url)
    for place in settings.find_links:
        yield from ("--find-links", place)
    for host in settings.trusted_hosts:
        yield from ("--allow-insecure-host", host)


def tail(log: Path) -> str:
    """The last 4 kB of `log`, from the beginning of a line."""
    text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    return text if log.stat().st_size <= LOG_TAIL_BYTES else text.partition("\n")[2]


def is_disk_full(said: str) -> bool:
    return _DISK_FULL.search(said) is not None


def full_log(log: Path) -> str:
    return f"{log}.full"


def is_unreachable(log: Path) -> bool:
    """Whether the network or the index, and not the build, is what failed. pip takes an index that does not answer for one that has
    nothing, and says so only where it says everything."""
    texts = [path.read_text(errors="replace") for path in (log, Path(full_log(log))) if path.exists()]
    return any(_UNREACHABLE.search(text) for text in texts)


def without_credentials(text: str) -> str:
    """Addresses without user and password: logs are shown, and stored with results."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)

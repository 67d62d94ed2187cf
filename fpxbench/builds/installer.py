"""Install packages with uv if it is available, else with pip.

Both follow the user's pip configuration, and both can be interrupted. `tools/venv.py` uses this module before anything
is installed, so importing it requires only the standard library.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fpxbench.builds.index.pip_settings import PipSettings

CHOICE_VARIABLE = "FPX_INSTALLER"
"""``pip`` or ``uv``; unset or empty: uv if it is on the PATH."""
LOG_TAIL_BYTES = 4096

_LEAKING = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "CONDA_PREFIX", "ASV_PYTHONPATH", "__PYVENV_LAUNCHER__",
            "PIP_REQUIRE_VIRTUALENV", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
"""Variables through which another Python's packages would reach an environment."""

_DISK_FULL = re.compile(r"No space left on device|os error 28|Disk quota exceeded|os error 122")
_UNREACHABLE = re.compile(
    r"Retrying \(Retry|NewConnectionError|Failed to establish a new connection|Name or service not known"
    r"|[Cc]onnection refused|Temporary failure in name resolution|[Rr]ead timed out"
    r"|[Cc]onnect(?:ion)? ?[Tt]im(?:ed|eout)|operation timed out|error sending request|dns error"
    r"|\b50[0234] (?:Server Error|Internal|Bad|Service|Gateway)"
)
_NO_SUCH_WHEEL = re.compile(
    r"No matching distribution|no (?:matching )?wheels?|there is no version|not found in the package registry", re.I)


class NoInstaller(RuntimeError):
    """Neither uv nor pip is available."""


def choose_installer() -> str:
    """Return ``uv`` or ``pip``. Raise NoInstaller, and ValueError if FPX_INSTALLER names anything else."""
    choice = os.environ.get(CHOICE_VARIABLE, "")
    if choice not in ("", "uv", "pip"):
        raise ValueError(f"{CHOICE_VARIABLE}={choice!r}: uv or pip")
    if choice == "uv" or not choice and shutil.which("uv"):
        if not shutil.which("uv"):
            raise NoInstaller(f"{CHOICE_VARIABLE}=uv, but no uv is on the PATH")
        return "uv"
    if importlib.util.find_spec("pip") is None:
        raise NoInstaller(f"{sys.executable} has no pip, and no uv is on the PATH: `python -m ensurepip` installs pip")
    return "pip"


def make_venv(folder: Path, with_pip: bool = False) -> None:
    """Create a virtual environment of this Python. Raise NoInstaller, and OSError for a full disk."""
    command = [sys.executable, "-m", "venv", *([] if with_pip else ["--without-pip"]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr or done.stdout).strip()
        if _DISK_FULL.search(message):
            raise OSError(28, "No space left on device", str(folder))
        reason = message.splitlines()[-1] if message else f"exit status {done.returncode}"
        raise NoInstaller(f"{sys.executable} cannot make a virtual environment: {reason}. "
                          "On Debian and Ubuntu: apt install python3-venv")


def install(
    installer: str, requirements: Sequence[str], log: Path, *, python: Path | str = sys.executable,
    pip_of: Path | str = sys.executable, arguments: Sequence[str] = (), notify: Callable[[str], None] | None = None,
) -> int:
    """Install into the environment of `python`; return the installer's exit status.

    `pip_of` is the Python whose pip runs; `arguments` are options that pip and uv share. The output is appended to
    `log`, and pip's full log goes to `log`.full. `notify` receives each line as it arrives. If this is interrupted, the
    installer's process group is killed.
    """
    environment = isolated_environment()
    if installer == "uv":
        command = ["uv", "pip", "install", "--no-progress", "--python", str(python), *_uv_settings(environment)]
    else:
        command = [str(pip_of), "-m", "pip", "--python", str(python), "install", "--no-input", "--progress-bar", "off",
                   "--disable-pip-version-check", "--log", _full_log(log)]
    command += [*arguments, *requirements]
    with open(log, "a", encoding="utf-8") as output:
        output.write(f"$ {without_credentials(' '.join(command))}\n")
        output.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, errors="replace", env=environment, start_new_session=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                line = without_credentials(line)
                output.write(line)
                output.flush()
                if notify is not None:
                    notify(line.rstrip())
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def isolated_environment(environment: dict[str, str] | None = None) -> dict[str, str]:
    """Return `environment` (default: this process's) without the variables that let in another Python's packages."""
    kept = {name: value for name, value in (environment or os.environ).items() if name not in _LEAKING}
    return kept | {"PYTHONNOUSERSITE": "1"}


def without_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without fpxbench's and asv's variables: a child gets its settings in other ways."""
    return {name: value for name, value in environment.items() if not name.startswith(("FPX_", "ASV"))}


def _uv_settings(environment: dict[str, str]) -> Iterator[str]:
    """Yield pip's configuration as options of uv, unless uv has a configuration; certificates go to `environment`."""
    own = ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX", "UV_FIND_LINKS", "UV_CONFIG_FILE")
    if any(name.startswith(own) for name in environment):
        return
    # imports an HTTP client, which asv need not wait for
    from fpxbench.builds.index.pip_settings import NoPip, pip_settings

    try:
        settings = pip_settings()
    except NoPip:   # then pip has no configuration to honour
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
    """Yield pip's indexes as options of uv. As with pip, the best version of all indexes wins, not the first index's.
    """
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


# The reason for a failure, from the log.


def tail(log: Path) -> str:
    """Return the last 4 kB of `log`, from the beginning of a line."""
    text = log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
    return text if log.stat().st_size <= LOG_TAIL_BYTES else text.partition("\n")[2]


def error_message(log: Path) -> str:
    """Return the installer's own reason: the last line that reports an error, else the last line."""
    lines = [line.strip() for line in tail(log).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "× ", "╰─▶"))]
    return (errors or lines or ["no output"])[-1][:400]


def is_disk_full(log: Path) -> bool:
    return _DISK_FULL.search(tail(log)) is not None


def is_no_such_wheel(log: Path) -> bool:
    """Return whether the index has no wheel of that version for this Python."""
    return _NO_SUCH_WHEEL.search(tail(log)) is not None


def is_unreachable(log: Path) -> bool:
    """Return whether the network or the index failed, not the build.

    pip reports an index that does not answer like one that lists nothing; only its full log shows the difference.
    """
    texts = [path.read_text(errors="replace") for path in (log, Path(_full_log(log))) if path.exists()]
    return any(_UNREACHABLE.search(text) for text in texts)


def _full_log(log: Path) -> str:
    return f"{log}.full"


def without_credentials(text: str) -> str:
    """Return `text` with user and password removed from its addresses: logs are shown, and stored with results."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)

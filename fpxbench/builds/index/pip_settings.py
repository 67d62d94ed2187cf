"""Read pip's configuration from pip itself, which applies its files, variables and precedence."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from dataclasses import dataclass

from pypi_simple import PYPI_SIMPLE_ENDPOINT

_NO = ("", "0", "false", "no", "off", "n", "f")


class NoPip(RuntimeError):
    """No pip is available, or its configuration is broken."""


@dataclass(frozen=True)
class PipSettings:
    """The settings of ``pip install``."""

    index_url: str = PYPI_SIMPLE_ENDPOINT
    extra_index_urls: tuple[str, ...] = ()
    find_links: tuple[str, ...] = ()
    """Folders, pages of links, or their ``file:`` addresses."""
    no_index: bool = False
    cert: str | None = None
    """A file of certificates to trust instead of the system's."""
    client_cert: str | None = None
    proxy: str | None = None
    trusted_hosts: tuple[str, ...] = ()
    """``host`` or ``host:port``, whose certificates are not checked."""
    timeout_s: float = 15.0
    retries: int = 5


def pip_settings(python: str = sys.executable) -> PipSettings:
    """Return the configuration of the pip of `python`, or of the pip on the PATH if that Python has none.

    Raise NoPip if there is neither, or if pip reports its configuration as broken.
    """
    commands = [[python, "-m", "pip"], *([[found]] if (found := shutil.which("pip")) else [])]
    for command in commands:
        done = subprocess.run([*command, "config", "list"], capture_output=True, text=True)
        if done.returncode == 0:
            return parse_settings(done.stdout)
        if "No module named pip" not in done.stderr:
            last = (done.stderr.strip().splitlines() or ["it printed no reason"])[-1]
            raise NoPip(f"pip cannot read its own configuration: {last}. `pip config debug` shows where it looks")
    raise NoPip(f"{python} has no pip, and none is on the PATH, so that the configured package index is unknown: "
                "name one with --index")


def parse_settings(listed: str) -> PipSettings:
    """Return the settings in the output of ``pip config list``: lines of ``section.name='value'``.

    As in pip, ``install`` overrides ``global``, and the environment overrides both.
    """
    by_section: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        if section in by_section:
            text = str(ast.literal_eval(value))
            if text:  # pip ignores an empty value
                by_section[section][option] = text
    found = by_section["global"] | by_section["install"] | by_section[":env:"]

    def words(*names: str) -> tuple[str, ...]:
        return tuple(next((found[name] for name in names if name in found), "").split())

    def word(*names: str) -> str | None:
        return next((found[name].strip() for name in names if name in found), None)

    try:
        timeout, retries = float(word("timeout", "default-timeout") or 15), int(word("retries") or 5)
    except ValueError as error:
        raise NoPip(f"pip's configuration has a timeout or retries that are not a number: {error}") from error
    return PipSettings(index_url=word("index-url", "pypi-url") or PYPI_SIMPLE_ENDPOINT,
                       extra_index_urls=words("extra-index-url"), find_links=words("find-links"),
                       no_index=(word("no-index") or "").lower() not in _NO, cert=word("cert"),
                       client_cert=word("client-cert"), proxy=word("proxy"), trusted_hosts=words("trusted-host"),
                       timeout_s=timeout, retries=retries)

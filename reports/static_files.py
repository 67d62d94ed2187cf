"""The site's style sheets and scripts."""

from __future__ import annotations

from importlib.resources import files


def static_files() -> dict[str, bytes]:
    """Return the site's style sheets and scripts, by name."""
    return {entry.name: entry.read_bytes() for entry in files("fpxbench.reports").joinpath("static").iterdir()
            if entry.is_file()}

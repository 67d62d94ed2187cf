"""Write a file so that no reader finds a part of it, even if the writer is killed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` at once by `content`, text in UTF-8. Raise OSError if its folder cannot be written to."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)

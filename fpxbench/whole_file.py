"""Write a file so that no reader finds a part of it, even if the writer is killed."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace `path` at once by `content`, text in UTF-8. Raise OSError, which names `path`, if its folder cannot be
    written to."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()        # on a full disk there may be a part
        raise OSError(error.errno, error.strerror, str(path)) from error

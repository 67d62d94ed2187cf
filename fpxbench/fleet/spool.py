"""Where a node keeps records until the driver has stored them.

``FOLDER/spool/FLEET/TASK/`` holds ``task.json``, ``lock``, ``log`` and ``results/``, to which ``fpxbench run`` appends.
A process that writes there or delivers from there holds the lock, the measuring process included. A folder that nobody
locks was left behind by a worker that ended, and any worker of the host delivers it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from fpxbench.fleet.fleet_messages import DELIVERY_BYTES, Task
from fpxbench.records.store import MAX_LINE_BYTES

FOLDER_VARIABLE = "FPX_FLEET_FOLDER"
DISCARDED_LINE = "{}"
"""Delivered for a line longer than a record can be: it is not a record, and the driver counts it."""


def node_folder() -> Path:
    """Return this node's folder for spools and environments. It survives reboots, which /tmp may not."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        return Path(named).absolute()
    root = Path("/var/tmp") if os.access("/var/tmp", os.W_OK) else Path(tempfile.gettempdir())
    return root / f"fpxbench-fleet-{os.getuid()}"


class Spool:
    """The records of one task on this node."""

    def __init__(self, folder: Path, task: Task, lock: int) -> None:
        self.folder, self.task, self._lock = folder, task, lock

    @classmethod
    def create(cls, fleet: str, task: Task) -> Spool:
        """Make the folder of a new task and lock it. Raise OSError if the disk is full or not writable."""
        folder = node_folder() / "spool" / fleet / task.id
        folder.mkdir(mode=0o700, parents=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "task.json").write_text(task.model_dump_json(by_alias=True), encoding="utf-8")
        return cls(folder, task, lock)

    @property
    def lock_fd(self) -> int:
        """The file descriptor of the lock. A process that inherits it holds the lock too."""
        return self._lock

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def read(self, offset: int, limit: int = DELIVERY_BYTES) -> tuple[list[str], int]:
        """Return complete lines from byte `offset` of the file of records on, and the offset after them.

        A line that is no text, or longer than a record can be, is delivered as `DISCARDED_LINE`.
        """
        files = sorted(self.results.glob("*/records/*.jsonl"))      # one machine, one build: one file
        lines: list[str] = []
        if not files:
            return lines, offset
        size = 0
        with open(files[0], "rb") as file:
            file.seek(offset)
            while size < limit and (line := file.readline()):
                if not line.endswith(b"\n"):
                    break
                offset += len(line)
                size += len(line)
                too_long = len(line) > MAX_LINE_BYTES
                with suppress(UnicodeDecodeError):
                    lines.append(DISCARDED_LINE if too_long else line.decode().rstrip("\n"))
                    continue
                lines.append(DISCARDED_LINE)
        return [line for line in lines if line], offset

    def remove(self) -> None:
        """Remove the folder: everything in it is stored elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Let another worker deliver what is here."""
        os.close(self._lock)


def left_behind(fleet: str) -> tuple[list[Spool], list[str]]:
    """Return the spools of `fleet` on this host that no process holds, locked for this process; and the ids of the
    tasks whose spools a process holds, this one included.
    """
    found, in_use = [], []
    for folder in sorted((node_folder() / "spool" / fleet).glob("*")):
        try:
            lock = os.open(folder / "lock", os.O_RDWR)
        except OSError:     # removed meanwhile, or not yet made
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(Spool(folder, Task.model_validate_json((folder / "task.json").read_bytes()), lock))
        except BlockingIOError:
            in_use.append(folder.name)
            os.close(lock)
        except (OSError, ValidationError):      # its worker ended before it wrote which task it is, or it is removed
            os.close(lock)
    return found, in_use

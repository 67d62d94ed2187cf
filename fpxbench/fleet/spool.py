"""Spools: the folders where a node keeps records until the driver has stored them.

``FOLDER/spool/FLEET/TASK/`` holds ``task.json``, ``lock``, ``log`` and ``results/``, to which ``fpxbench run`` appends.
Every process that writes or delivers its records, the measuring process included, holds the lock. An unlocked folder
was left behind by a worker that ended; any worker of the host delivers it.
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
"""Delivered in place of a line that cannot be a record, so that the driver counts it."""


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
        self.folder, self.task = folder, task
        self.lock_fd = lock
        """File descriptor of the lock. A process that inherits it holds the lock too."""

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
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def read(self, offset: int, limit: int = DELIVERY_BYTES) -> tuple[list[str], int]:
        """Return the complete lines of the file of records from byte `offset` on, and the offset after them.

        A line that is not UTF-8, or longer than a record can be, is delivered as `DISCARDED_LINE`.
        """
        files = sorted(self.results.glob("*/records/*.jsonl"))      # one file: a task has one machine and one build
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
        """Remove the folder, whose records the driver has stored."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Release the lock, so that another worker can deliver the records."""
        os.close(self.lock_fd)


def left_behind(fleet: str) -> tuple[list[Spool], list[str]]:
    """Lock and return the spools of `fleet` on this host that no process holds; and return the ids of the tasks whose
    spools a process, possibly this one, holds."""
    found, in_use = [], []
    for folder in sorted((node_folder() / "spool" / fleet).glob("*")):
        try:
            lock = os.open(folder / "lock", os.O_RDWR)
        except OSError:     # just removed, or not created yet
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(Spool(folder, Task.model_validate_json((folder / "task.json").read_bytes()), lock))
        except BlockingIOError:
            in_use.append(folder.name)
            os.close(lock)
        except (OSError, ValidationError):      # its worker ended before it wrote task.json, or it was just removed
            os.close(lock)
    return found, in_use

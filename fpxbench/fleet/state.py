"""The state of a fleet: shown while it runs, and read by ``fpxbench fleet status``."""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fpxbench.records.fields import Count, Label, Moment, Text
from fpxbench.records.record import now
from fpxbench.records.verdict import BROKEN, Status
from fpxbench.user_error import UserError
from fpxbench.whole_file import write_whole

_FOLDER = "fleet"
_STATE = "state.jsonl"
"""Not ``.json``: asv reads every ``.json`` under the results as its own."""


class CellState(BaseModel):
    """One build on one kind."""

    model_config = ConfigDict(extra="ignore")

    build: Label
    machine: Label
    total: Count | None = None
    """None until its cases are listed."""
    done: Count = 0
    given_up: Annotated[dict[Label, Text], Field(max_length=100_000)] = {}
    failure: Text = ""
    file: Text = ""
    """Path of the file of its records, relative to the results folder."""
    statuses: dict[Status, Count] = {}
    """Number of this run's records with each status."""

    @property
    def broken(self) -> int:
        return sum(count for status, count in self.statuses.items() if status in BROKEN)


class SeatState(BaseModel):
    """One device."""

    model_config = ConfigDict(extra="ignore")

    device: Label
    machine: Label = ""
    activity: Literal["starting", "working", "idle", "not used"]
    doing: Label
    build: Label = ""
    clock_offset_s: float | None = None


class FleetState(BaseModel):
    """The state of all cells and seats of a run."""

    model_config = ConfigDict(extra="ignore")

    at: Moment = Field(default_factory=now)
    started_at: Moment = Field(default_factory=now)
    host: Label = ""
    pid: Count = 0
    ended: Literal["", "complete", "incomplete", "interrupted"] = ""
    builds: Annotated[list[Label], Field(max_length=10_000)] = []
    cells: Annotated[list[CellState], Field(max_length=100_000)] = []
    seats: Annotated[list[SeatState], Field(max_length=100_000)] = []
    messages: Annotated[list[Text], Field(max_length=1000)] = []
    stored: Count = 0
    """Number of records stored by this run."""
    repeated: Count = 0
    superseded: Count = 0
    refused: Count = 0
    seconds_left: float | None = None
    spreads: Annotated[list[Text], Field(max_length=10_000)] = []

    @property
    def machines(self) -> list[str]:
        return list(dict.fromkeys(cell.machine for cell in self.cells))


class AnotherRun(UserError):
    """Another process runs a fleet into this results folder."""


class FleetFolder:
    """``RESULTS/fleet/``: the fleet's id, its lock, its latest state, and Ray's output."""

    def __init__(self, results: Path) -> None:
        self._folder = results / _FOLDER

    @contextmanager
    def locked(self) -> Iterator[str]:
        """Lock the folder, and yield the fleet's permanent id. Raise AnotherRun if another process has the lock."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with open(self._folder / "lock", "a+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AnotherRun(f"another `fpxbench fleet run` writes into {self._folder.parent}: wait for it, or "
                                 "give another --results") from None
            path = self._folder / "id"
            if not path.exists():
                write_whole(path, secrets.token_hex(8))
            yield path.read_text().strip()

    def log(self) -> IO[str]:
        """Open ``ray.log``, which collects Ray's output."""
        self._folder.mkdir(parents=True, exist_ok=True)
        return open(self._folder / "ray.log", "a", encoding="utf-8")

    def write(self, state: FleetState) -> None:
        """Replace the state on disk."""
        write_whole(self._folder / _STATE, state.model_dump_json() + "\n")

    def read(self) -> FleetState | None:
        """Return the latest state; None if no fleet ran here."""
        try:
            return FleetState.model_validate_json((self._folder / _STATE).read_bytes())
        except (OSError, ValidationError):
            return None

    def running(self) -> bool:
        """Return whether a process has the lock."""
        try:
            with open(self._folder / "lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False



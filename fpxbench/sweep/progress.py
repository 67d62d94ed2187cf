"""Progress of a sweep: running cases, remaining cases, failures.

Goes to the path in ``FPX_PROGRESS`` (such as ``/proc/PID/fd/2``: asv captures what a benchmark prints), by default to
stderr.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as Bar,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fpxbench.records.record import StoredRecord
from fpxbench.records.verdict import BROKEN, SIGNS, Status

STREAM_VARIABLE = "FPX_PROGRESS"
PLAIN_LINE_EVERY_S = 10.0
"""Interval of the lines that replace the bar if the stream is not a terminal (a CI log)."""

_COLOURS = {Status.OK: "green", Status.UNSUPPORTED: "dim", Status.MISSING: "dim"}


class Progress:
    """A progress bar on a terminal, occasional lines elsewhere; with `announce`, also a line for every failure."""

    def __init__(self, total: int, stream: TextIO | None = None, announce: bool = True) -> None:
        self._announce = announce
        self._own_stream = None
        if stream is None:
            stream = self._own_stream = _named_stream()
        self.console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self.counts: Counter[Status] = Counter()
        self._running: dict[str, None] = {}
        self._total, self._done, self._next_line = total, 0, 0.0
        self._bar = Bar(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[tally]}"),
            console=self.console, disable=not self.console.is_terminal, transient=True,
        )
        self._task = self._bar.add_task("starting", total=total, tally="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._own_stream is not None:
            self._own_stream.close()

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(escape(text))

    def starting(self, case_id: str) -> None:
        """Add a case to the running ones that are shown."""
        self._running[case_id] = None     # present already if it is rerun alone
        self._bar.update(self._task, description=escape(self.running()))
        if not self.console.is_terminal and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_LINE_EVERY_S
            self.console.print(f"[{self._done}/{self._total}] {self.tally()} | running {self.running()}", markup=False)

    def finished(self, record: StoredRecord) -> None:
        """Count a case, and print it if it failed."""
        status = record.verdict.status
        self.counts[status] += 1
        self._done += 1
        self._running.pop(record.id, None)
        self._bar.update(self._task, advance=1, tally=self.tally(), description=escape(self.running()))
        if status in BROKEN and self._announce:
            self.console.print(f"  {SIGNS[status]} {record.id}: {record.verdict.headline}: {record.verdict.summary}",
                               markup=False, style="red", soft_wrap=True)

    def running(self) -> str:
        """Return the case that has run longest and the number of others: ``dense/bf16/llama3-8b.k/m1/bf16 and 3 more``.
        """
        if not self._running:
            return "nothing"
        return next(iter(self._running)) + (f" and {len(self._running) - 1} more" if len(self._running) > 1 else "")

    def tally(self) -> str:
        """Return ``41 ok, 2 wrong, 1 crash``."""
        return (", ".join(f"{self.counts[status]} {status}" for status in reversed(Status) if self.counts[status])
                or "nothing done yet")


def _named_stream() -> TextIO | None:
    path = os.environ.get(STREAM_VARIABLE)
    if not path:
        return None
    try:
        return open(path, "w", buffering=1, encoding="utf-8")
    except OSError as error:    # the other process has exited, or its stream is a socket
        print(f"{STREAM_VARIABLE}={path} cannot be opened ({error.strerror}); progress goes to stderr", file=sys.stderr)
        return None

"""Rebuild the report while a sweep runs, in a separate process at the lowest priority.

It is built in place: `fpxbench report` replaces each changed page atomically, the first page last.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fpxbench.sweep.gate import Gate

FIRST_AFTER_S, AGAIN_AFTER_S = 10.0, 30.0
SHARE = 0.1
"""Largest share of the sweep's time for building: after a build of 6 s, the next begins a minute later."""
LOWEST_PRIORITY = 19


class LiveReport:
    """A context in which `update` rebuilds the report in `folder`, at most one build at a time.

    folder : None: no report
    gate : stops a build while a case is timed
    say : called with a line that names the page once it exists, and one if it cannot be built
    """

    def __init__(self, folder: Path | None, results: Path, gate: Gate, say: Callable[[str], None]) -> None:
        self._folder, self._results, self._gate, self._say = folder, results, gate, say
        self._process: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()
        self._began = 0.0
        self._next = time.monotonic() + FIRST_AFTER_S
        self._outdated = True
        self.builds = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._stack.close()

    def update(self, stored: bool) -> None:
        """Report a finished build; begin the next if it is due and records were stored since the last began.

        stored : whether a record was just stored; call with False from time to time in between
        """
        if self._folder is None:
            return
        self._outdated |= stored
        if self._process is not None and self._process.poll() is not None:
            self._ended(self._folder, self._process.returncode)
        if self._process is None and self._outdated and time.monotonic() >= self._next:
            self._begin()

    def _begin(self) -> None:
        self._log = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fpxbench-report-"))) / "log"
        command = [sys.executable, "-m", "fpxbench", "report", "--results", str(self._results), "--json",
                   "--output", str(self._folder)]
        with open(self._log, "wb") as log, self._gate.untimed():
            self._began, self._outdated = time.monotonic(), False
            # Its own process group, so that the gate can stop it, and Ctrl-C reaches only the sweep.
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            self._member = self._stack.enter_context(self._gate.member(self._process.pid, "the report"))
        with contextlib.suppress(psutil.Error):
            psutil.Process(self._process.pid).nice(LOWEST_PRIORITY)

    def _ended(self, folder: Path, code: int) -> None:
        took = self._member.watch.counted_s
        self._next = max(self._began + AGAIN_AFTER_S, time.monotonic() + took * (1 / SHARE - 1))
        self._process = None
        if code:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            self._say(f"the report could not be built while the sweep goes on: {lines[-1] if lines else code}")
            self._next = float("inf")       # it would fail again
        else:
            self.builds += 1
            if self.builds == 1:
                self._say(f"report so far, rebuilt as the sweep goes on: file://{(folder / 'index.html').resolve()}")
        self._stack.close()

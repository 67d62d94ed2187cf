"""Stop a sweep's other children while one of them is timed.

The lock of `fpxbench.checking.device_lock` keeps two timings apart, including those of other sweeps. The gate stops the
rest of its own sweep meanwhile, with signals, so that native code that compiles or hangs is stopped too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_STOPPED_WITHIN_S = 0.25
_POLL_S = 0.001
_CANCEL_POLL_S = 0.1
BUSY_PAUSE_S = 30.0
"""How long other members run while the device is busy: longer than detecting a hanging kernel takes."""
_AT_REST = "TtZX"
"""States in /proc of a process that does not run: stopped, traced, ended."""


class Stopwatch:
    """A stopwatch that starts on creation and pauses between `hold` and `release`, which may nest."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._held_s, self._holds, self._since = 0.0, 0, 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def waited_s(self) -> float:
        with self._lock:
            return self._held_s + (time.monotonic() - self._since if self._holds else 0.0)

    @property
    def counted_s(self) -> float:
        return self.elapsed_s - self.waited_s

    def hold(self) -> None:
        with self._lock:
            if not self._holds:
                self._since = time.monotonic()
            self._holds += 1

    def release(self) -> None:
        with self._lock:
            self._holds -= 1
            if not self._holds:
                self._held_s += time.monotonic() - self._since


@dataclass(eq=False)
class Member:
    """A process that runs beside others.

    purpose : the case that it runs
    group : whether to stop its whole process group
    """

    pid: int
    purpose: str = ""
    group: bool = True
    watch: Stopwatch = field(default_factory=Stopwatch)

    def stop(self) -> None:
        self.watch.hold()
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)
        self.watch.release()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if self.group else os.kill)(self.pid, number)


class TimedInterval(NamedTuple):
    """The time during which a case was timed, by `time.monotonic`."""

    purpose: str
    begin: float
    end: float


class Gate:
    """A gate that stops all other members while one of them is timed.

    groups : whether to stop members' own children (compilers) too: on a CPU, where a timing needs all cores
    """

    def __init__(self, groups: bool) -> None:
        self._groups = groups
        self._free = threading.Condition()
        self._members: list[Member] = []
        self._timed: Member | None = None
        self._began = 0.0
        self.intervals: list[TimedInterval] = []
        """All timings so far, in order."""
        self.most_at_once = 0
        self.stopping_s = 0.0
        """Total time until the others had stopped."""
        self._hangs = 0
        self._shared = False
        """Whether a program outside the sweep uses the device."""

    @property
    def timed_s(self) -> float:
        """Total time of all timings."""
        return sum(one.end - one.begin for one in self.intervals)

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Wait until nothing is timed; no timing begins within the context."""
        with self._free:
            self._free.wait_for(lambda: self._timed is None)
            yield

    @contextlib.contextmanager
    def member(self, pid: int, purpose: str, watch: Stopwatch | None = None) -> Iterator[Member]:
        """Wait until nothing is timed, with `watch` on hold, then make a process a member for the duration of the
        context."""
        member = Member(pid, purpose, self._groups, watch or Stopwatch())
        member.watch.hold()
        with self.untimed():
            member.watch.release()
            self._members.append(member)
            self.most_at_once = max(self.most_at_once, len(self._members))
        try:
            yield member
        finally:
            self.end_timing(member)
            with self._free:
                self._members.remove(member)
                if self._timed is not None:     # it was stopped just after its reply, and must run for later calls
                    member.go_on()

    def begin_timing(self, member: Member, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Stop all other members, and return once they have stopped; at once if `cancelled`."""
        member.watch.hold()
        with self._free:
            while self._timed is not None:      # a killed member: its device lock is released before its place here
                if cancelled():
                    return
                self._free.wait(_CANCEL_POLL_S)
            self._timed = member
            others = [one for one in self._members if one is not member]
            for one in others:
                one.stop()
        asked = time.monotonic()
        deadline = asked + _STOPPED_WITHIN_S
        while others and _any_runs({one.pid for one in others}, self._groups) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        member.watch.release()
        self._began = time.monotonic()
        self.stopping_s += self._began - asked

    def note_hang(self) -> None:
        """Record that a member is being killed because its kernel hangs."""
        with self._free:
            self._hangs += 1
            self._free.notify_all()

    def let_others_end(self, member: Member, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Suspend a timing because the device is busy, let the other members run, and resume once a hanging one was
        killed, or after `BUSY_PAUSE_S`. If none hangs, another program uses the device, and later timings do not wait
        for it."""
        if self._shared:
            return
        member.watch.hold()
        self.end_timing(member)
        with self._free:
            hangs, deadline = self._hangs, time.monotonic() + BUSY_PAUSE_S
            while self._hangs == hangs and time.monotonic() < deadline and not cancelled():
                self._free.wait(_CANCEL_POLL_S)
            self._shared = self._hangs == hangs
        member.watch.release()
        self.begin_timing(member, cancelled)

    def end_timing(self, member: Member) -> None:
        """Let the other members continue. Do nothing unless `member` is timed."""
        with self._free:
            if self._timed is not member:
                return
            self.intervals.append(TimedInterval(member.purpose, self._began, time.monotonic()))
            self._timed = None
            for one in self._members:
                if one is not member:
                    one.go_on()
            self._free.notify_all()


def _any_runs(pids: set[int], groups: bool) -> bool:
    """Return whether any of these processes, or with `groups` any process of their groups, is not stopped."""
    for stat in Path("/proc").glob("[0-9]*/stat") if groups else [Path(f"/proc/{pid}/stat") for pid in pids]:
        try:
            state, _, group = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
        except OSError:     # gone
            continue
        if state not in _AT_REST and (not groups or int(group) in pids):
            return True
    return False

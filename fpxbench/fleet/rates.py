"""Estimate how long a fleet will take: each kind continues at its rate so far, and the slowest decides."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from fpxbench.fleet.schedule import Schedule


class Rates:
    """Counts the records of each kind of machine."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._count: Counter[str] = Counter()

    def stored(self, kind: str) -> None:
        """Note that a record of `kind` arrived now."""
        self._count[kind] += 1
        self._latest[kind] = self._clock()
        self._first.setdefault(kind, self._latest[kind])

    def seconds_left(self, schedule: Schedule) -> float | None:
        """Return the seconds until the slowest kind is done; None while the rate of any kind is unknown."""
        if not schedule.cells:
            return None
        longest = 0.0
        for kind in {cell.kind for cell in schedule.cells.values() if not cell.finished}:
            cells = [cell for cell in schedule.of_kind(kind) if not cell.failure]
            planned = [cell for cell in cells if cell.planned]
            took = self._latest.get(kind, 0.0) - self._first.get(kind, 0.0)
            if not planned or took <= 0:
                return None
            left = sum(cell.total - len(cell.done) for cell in planned)
            left += (len(cells) - len(planned)) * max(cell.total for cell in planned)   # assume as many as the largest
            longest = max(longest, left * took / (self._count[kind] - 1))
        return longest

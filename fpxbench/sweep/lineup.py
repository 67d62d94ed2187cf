"""Which item begins next, beside those that run, so that memory suffices and none runs long alone at the end.

No threads here: `fpxbench.sweep.pool` asks, and tests do with durations that are made up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Lineup(Generic[Item]):
    """Items that wait, in order, and those that run.

    sooner : a sort key, asked when an item begins: the lowest is next, the first of several equal ones
    cost : how much an item takes of each kind of memory while it runs
    room : how much there is of each kind; what does not fit beside others waits, and what follows waits with it
    """

    def __init__(self, items: Iterable[Item], sooner: Callable[[Item], Any] = lambda item: 0,
                 cost: Callable[[Item], tuple[int, ...]] = lambda item: (), room: tuple[int, ...] = ()) -> None:
        self._waiting, self._running = list(items), list[Item]()
        self._sooner, self._cost, self._room = sooner, cost, room

    def __len__(self) -> int:
        """Return how many wait."""
        return len(self._waiting)

    def take(self) -> Item | None:
        """Begin the next item and return it; None if it has to wait for others to end. Alone, each may begin."""
        place = min(range(len(self._waiting)), key=lambda place: self._sooner(self._waiting[place]))
        item = self._waiting[place]
        needs = zip(self._room, *(self._cost(one) for one in (item, *self._running)), strict=True)
        if self._running and any(sum(costs) > room for room, *costs in needs):
            return None
        del self._waiting[place]
        self._running.append(item)
        return item

    def end(self, item: Item) -> None:
        """Count an item no longer among those that run."""
        self._running.remove(item)

    def clear(self) -> None:
        """Drop what waits."""
        self._waiting.clear()


class Durations:
    """Mean durations of what ran so far, by name."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name].append(seconds)

    def expected(self, name: str) -> float:
        """Return the mean of a name; infinity for one that never ran."""
        seconds = self._seconds.get(name)
        return sum(seconds) / len(seconds) if seconds else float("inf")

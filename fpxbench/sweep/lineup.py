"""Choose which item begins next beside those that run, within memory, and long ones early.

Uses no threads: `fpxbench.sweep.pool` calls it, and tests with made-up durations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")


class Lineup(Generic[Item]):
    """The waiting items, in order, and the running ones.

    sooner : a sort key, evaluated when an item begins: the first item with the lowest key is next
    cost : how much of each kind of memory an item takes while it runs
    room : how much there is of each kind; an item that does not fit beside others waits, and later ones wait behind it
    """

    def __init__(self, items: Iterable[Item], sooner: Callable[[Item], Any] = lambda item: 0,
                 cost: Callable[[Item], tuple[int, ...]] = lambda item: (), room: tuple[int, ...] = ()) -> None:
        self._waiting, self._running = list(items), list[Item]()
        self._sooner, self._cost, self._room = sooner, cost, room

    def __len__(self) -> int:
        """Return the number of waiting items."""
        return len(self._waiting)

    def take(self) -> Item | None:
        """Begin the next item and return it; None if it must wait for others to end. Any item may run alone."""
        place = min(range(len(self._waiting)), key=lambda place: self._sooner(self._waiting[place]))
        item = self._waiting[place]
        needs = zip(self._room, *(self._cost(one) for one in (item, *self._running)), strict=True)
        if self._running and any(sum(costs) > room for room, *costs in needs):
            return None
        del self._waiting[place]
        self._running.append(item)
        return item

    def end(self, item: Item) -> None:
        """Remove an item from the running ones."""
        self._running.remove(item)

    def clear(self) -> None:
        """Drop the waiting items."""
        self._waiting.clear()


class Durations:
    """Mean durations so far, by name."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name].append(seconds)

    def expected(self, name: str) -> float:
        """Return the mean duration of a name; infinity if it never ran."""
        seconds = self._seconds.get(name)
        return sum(seconds) / len(seconds) if seconds else float("inf")

"""A pool of children that run a sweep's cases in parallel."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Generic, Literal, TypeVar, cast

import psutil

from fpxbench.records.case import Case
from fpxbench.records.record import Machine
from fpxbench.sweep.isolation import Cancelled, Isolation
from fpxbench.sweep.lineup import Item, Lineup

R = TypeVar("R")

Event = tuple[Literal["started"], Item, None] | tuple[Literal["ended"], Item, R] | tuple[Literal["waiting"], None, None]

TICK_S = 1.0
PROCESS_BYTES, GPU_PROCESS_BYTES = 1 << 30, 3 << 30
"""Memory of a case of any size: PyTorch and a compiler; on a GPU its context and the rotated copies of a weight."""
BYTES_PER_WEIGHT, BYTES_PER_EXPERTS_WEIGHT = 32, 8
"""The weight in fp32, decoded, and in float64 for the reference and its tolerance; of experts, one at a time, while the
others are stored, and copied in 16 bits."""


class Room:
    """The memory for cases that run at once, of the host and of a GPU.

    A case's memory is estimated from its size, so that small cases run one per core even if large ones do not fit."""

    def __init__(self, machine: Machine, memory_limit: int) -> None:
        """Take the host's free memory, at most `memory_limit`, and all of the GPU's."""
        self.bytes: tuple[int, ...] = (min(psutil.virtual_memory().available, memory_limit),)
        if machine.kind != "cpu" and machine.memory_bytes:
            self.bytes += (machine.memory_bytes,)

    def cost(self, case: Case) -> tuple[int, ...]:
        """Return how much of each a case takes, in bytes."""
        return tuple(process + _bytes_of(case) for process in (PROCESS_BYTES, GPU_PROCESS_BYTES)[:len(self.bytes)])

    def jobs(self, cases: Iterable[Case]) -> int:
        """Return how many cases to prepare at once: at most one per core, as far as the smallest ones fit."""
        smallest = min((self.cost(case) for case in cases), default=())
        return max(1, min([usable_cores(), *(room // cost for room, cost in zip(self.bytes, smallest, strict=False))]))


def _bytes_of(case: Case) -> int:
    return case.n * case.k * (BYTES_PER_WEIGHT + ((case.experts or 1) - 1) * BYTES_PER_EXPERTS_WEIGHT)


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and its control group's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):   # another kind of control group, or no limit ("max")
        return cores


class Pool(Generic[Item, R]):
    """Children that work on items in parallel, each with its own watcher thread.

    workers : the children; the first may be warm already
    work : called with a child and an item, in a thread
    crowded : whether a result may be due to the neighbours (out of memory); such an item is rerun alone
    """

    def __init__(self, workers: list[Isolation], work: Callable[[Isolation, Item], R],
                 crowded: Callable[[R], bool] = lambda result: False) -> None:
        self._workers, self._work, self._crowded = workers, work, crowded
        self._events: queue.SimpleQueue[tuple[str, Item | None, R | BaseException | None]] = queue.SimpleQueue()
        self._lineup: Lineup[Item] = Lineup(())
        self._free = threading.Condition()

    def run(self, lineup: Lineup[Item]) -> Generator[Event[Item, R]]:
        """Work on the items in `lineup`. Yield ``("started", item, None)`` and ``("ended", item, result)`` as they
        happen, and ``("waiting", None, None)`` after a second without either.

        If the iteration ends early (Ctrl-C), the children are killed, and running items have no result. Raise what
        `work` raises.
        """
        again = yield from self._together(self._workers, lineup, self._crowded)
        if again:
            for worker in self._workers[1:]:
                worker.recycle()        # an idle child's memory too
            yield from self._together(self._workers[:1], Lineup(again), lambda result: False)

    def _together(self, workers: list[Isolation], lineup: Lineup[Item],
                  crowded: Callable[[R], bool]) -> Generator[Event[Item, R], None, list[Item]]:
        """Run the waiting items; return those to rerun alone."""
        self._lineup = lineup
        again: list[Item] = []
        alone = len(workers) == 1
        threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True, name="watcher")
                   for worker in workers[:len(lineup)]]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                try:
                    event, item, result = self._events.get(timeout=TICK_S)
                except queue.Empty:
                    event, item, result = "waiting", None, None
                if event == "left":
                    running -= 1
                elif isinstance(result, BaseException):
                    raise result
                elif event == "started" and item is not None:
                    yield "started", item, None
                elif event == "ended" and item is not None:
                    ended = cast(R, result)
                    if not alone and crowded(ended):
                        again.append(item)
                    else:
                        yield "ended", item, ended
                else:
                    yield "waiting", None, None
        finally:
            with self._free:
                self._lineup.clear()
                self._free.notify_all()
            if running:
                for worker in workers:
                    worker.cancel()
            for thread in threads:
                thread.join()
        return again

    def _serve(self, worker: Isolation) -> None:
        item: Item | None = None
        try:
            while (item := self._next(worker, item)) is not None:
                self._events.put(("started", item, None))
                self._events.put(("ended", item, self._work(worker, item)))
        except Cancelled:
            pass
        except BaseException as error:
            self._events.put(("failed", None, error))
        finally:
            self._events.put(("left", None, None))

    def _next(self, worker: Isolation, ended: Item | None) -> Item | None:
        """Return the next item for `worker`, once there is room for it; None if there are no more."""
        with self._free:
            if ended is not None:
                self._lineup.end(ended)
                self._free.notify_all()
            while self._lineup:
                if (item := self._lineup.take()) is not None:
                    return item
                worker.recycle()        # frees an idle child's memory
                self._free.wait()
            return None

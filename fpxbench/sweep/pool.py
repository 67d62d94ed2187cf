"""Several children that work on a sweep's cases side by side."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Generic, Literal, TypeVar, cast

import psutil

from fpxbench.records.case import Case
from fpxbench.records.record import Machine
from fpxbench.sweep.isolation import Cancelled, Isolation

Item = TypeVar("Item")
R = TypeVar("R")

Event = tuple[Literal["started"], Item, None] | tuple[Literal["ended"], Item, R] | tuple[Literal["waiting"], None, None]

TICK_S = 1.0
PROCESS_BYTES, GPU_PROCESS_BYTES = 1 << 30, 3 << 30
"""What a case holds whatever its size: PyTorch and a compiler; of a GPU its context and the rotated copies of a weight.
"""
BYTES_PER_WEIGHT, BYTES_PER_EXPERTS_WEIGHT = 32, 8
"""The weight in fp32, as decoded, and in float64 for the reference with the parts of its tolerance; of several experts
that is one at a time, and the others are there as stored and in 16 bits, in copies."""


def default_jobs(machine: Machine, cases: Iterable[Case], memory_limit: int) -> int:
    """Return how many cases are prepared at once: one a core, as far as the largest of them fit into the memory that is
    free, and into `memory_limit` together."""
    largest = max(map(_bytes_of, cases), default=0)
    jobs = min(usable_cores(), min(psutil.virtual_memory().available, memory_limit) // (PROCESS_BYTES + largest))
    if machine.kind != "cpu" and machine.memory_bytes:
        jobs = min(jobs, machine.memory_bytes // (GPU_PROCESS_BYTES + largest))
    return max(1, jobs)


def _bytes_of(case: Case) -> int:
    return case.n * case.k * (BYTES_PER_WEIGHT + ((case.experts or 1) - 1) * BYTES_PER_EXPERTS_WEIGHT)


def usable_cores() -> int:
    """Return the cores that this process may use: those that it is bound to, or fewer where a container has a share."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):   # another kind of control group, or no limit ("max")
        return cores


class Pool(Generic[Item, R]):
    """Children that work on items side by side, each with a watcher's thread of its own.

    workers : the children; the first may be warm already
    work : called with a child and an item, in a thread
    crowded : whether a result may be due to the neighbours (memory ran out); such an item is worked on again, alone
    """

    def __init__(self, workers: list[Isolation], work: Callable[[Isolation, Item], R],
                 crowded: Callable[[R], bool] = lambda result: False) -> None:
        self._workers, self._work, self._crowded = workers, work, crowded
        self._events: queue.SimpleQueue[tuple[str, Item | None, R | BaseException | None]] = queue.SimpleQueue()
        self._waiting: deque[Item] = deque()
        self._lock = threading.Lock()

    def run(self, items: Iterable[Item]) -> Generator[Event[Item, R]]:
        """Yield ``("started", item, None)`` and ``("ended", item, result)`` as they happen, and ``("waiting", None,
        None)`` where nothing has for a second.

        When the iteration ends early (Ctrl-C), the children are killed and what they worked on has no result. What
        `work` raises is raised here.
        """
        again = yield from self._together(self._workers, items, self._crowded)
        if again:
            for worker in self._workers[1:]:
                worker.recycle()        # an idle child's memory too
            yield from self._together(self._workers[:1], again, lambda result: False)

    def _together(self, workers: list[Isolation], items: Iterable[Item],
                  crowded: Callable[[R], bool]) -> Generator[Event[Item, R], None, list[Item]]:
        """Work on `items`; return those that have to be worked on alone."""
        self._waiting = deque(items)
        again: list[Item] = []
        alone = len(workers) == 1
        threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True, name="watcher")
                   for worker in workers[:len(self._waiting)]]
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
            self._waiting.clear()
            if running:
                for worker in workers:
                    worker.cancel()
            for thread in threads:
                thread.join()
        return again

    def _serve(self, worker: Isolation) -> None:
        try:
            while (item := self._next()) is not None:
                self._events.put(("started", item, None))
                self._events.put(("ended", item, self._work(worker, item)))
        except Cancelled:
            pass
        except BaseException as error:
            self._events.put(("failed", None, error))
        finally:
            self._events.put(("left", None, None))

    def _next(self) -> Item | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

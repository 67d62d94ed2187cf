"""Process several machines in parallel, each in a process that holds one machine's series in memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
R = TypeVar("R")


def in_processes(work: Callable[[Task], R], machines: Sequence[Task], jobs: int) -> Iterator[R]:
    """Yield ``work(machine)`` for each machine, in order; with more than one job, in that many processes."""
    if jobs < 2 or len(machines) < 2:
        yield from map(work, machines)
        return
    # Not fork: polars has threads.
    with ProcessPoolExecutor(min(jobs, len(machines)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, machines)

"""Machines are independent: several are worked on at once, each by a process with one machine's series in memory."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
R = TypeVar("R")


def in_processes(work: Callable[[Task], R], machines: Sequence[Task], jobs: int) -> Iterator[R]:
    """Yield what `work` returns for each machine, in order; more than one job is done by so many processes."""
    if jobs < 2 or len(machines) < 2:
        yield from map(work, machines)
        return
    # Not by fork: polars has threads.
    with ProcessPoolExecutor(min(jobs, len(machines)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, machines)

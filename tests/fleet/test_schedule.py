"""Every case is in one place at a time, whatever happens to the tasks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fake_builds import FakeBuilds

from fpxbench.fleet.fleet_messages import TaskEnd
from fpxbench.fleet.schedule import LARGEST_BATCH, MOST_ENDS, SMALLEST_BATCH, Cell, Schedule

DONE = TaskEnd(status="done")
ENDED = TaskEnd(status="ended", message="SIGKILL")


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    builds = FakeBuilds(tmp_path, 1, 300)
    one = Cell(builds.spec(builds.entries[0]), "m", "cpu")
    one.plan(builds.cases, set())
    return one


def places(cell: Cell) -> list[str]:
    return [*cell.done, *cell.todo, *cell.given_up, *(case for batch in (*cell.running.values(), *cell.lost.values())
                                                      for case in batch.remaining)]


def test_what_has_a_record_is_not_planned_again(tmp_path: Path) -> None:
    builds = FakeBuilds(tmp_path, 1, 5)
    one = Cell(builds.spec(builds.entries[0]), "m", "cpu")
    one.plan(builds.cases, {builds.cases[1].id, "of another plan"})
    assert one.done == {builds.cases[1].id} and len(one.todo) == 4 and one.total == 5


def test_batches_shrink_towards_the_end(cell: Cell) -> None:
    sizes = []
    while cell.todo:
        sizes.append(len(cell.take(f"t{len(sizes)}", "s", 2).remaining))
    assert sizes[0] == LARGEST_BATCH and sorted(sizes[:-1], reverse=True) == sizes[:-1]
    assert sizes[-2] == SMALLEST_BATCH and sum(sizes) == 300


def test_a_case_that_ends_its_task_runs_alone_and_is_given_up_at_last(cell: Cell) -> None:
    first = next(iter(cell.todo))
    cell.take("t", "s", 1)
    cell.ended("t", ENDED)
    assert list(cell.todo)[-1] == first, "the others are measured first"
    for number in range(20):
        batch = cell.take(f"n{number}", "s", 1)
        if first in batch.remaining:
            break
        for case in list(batch.remaining):
            cell.measured(case)
        cell.ended(batch.task, DONE)
    assert list(batch.remaining) == [first]
    for number in range(1, MOST_ENDS):
        cell.ended(batch.task, ENDED)
        if number < MOST_ENDS - 1:
            batch = cell.take(f"m{number}", "s", 1)
    assert "SIGKILL" in cell.given_up[first] and cell.finished and not cell.complete


def test_a_sweep_that_cannot_start_blames_no_case(cell: Cell) -> None:
    cell.take("t", "s", 1)
    cell.ended("t", TaskEnd(status="cannot_start", message="no GPU"))
    assert not cell.ends and len(cell.todo) == 300


def test_a_lost_tasks_cases_wait_for_its_spool(cell: Cell) -> None:
    batch = cell.take("t", "s", 1)
    waiting = set(batch.remaining)
    cell.lose("t", spool_may_return=True)
    assert not waiting & set(cell.todo) and not cell.finished
    first = next(iter(batch.remaining))
    cell.measured(first)
    cell.ended("t", ENDED)
    assert first not in cell.todo and waiting - {first} <= set(cell.todo)


def test_a_dead_nodes_cases_go_back_at_once(cell: Cell) -> None:
    cell.take("t", "s", 1)
    cell.lose("t", spool_may_return=False)
    assert len(cell.todo) == 300


def test_a_case_without_a_record_after_its_sweep_is_no_success(cell: Cell) -> None:
    batch = cell.take("t", "s", 1)
    cell.measured(next(iter(batch.remaining)))
    cell.ended("t", DONE)
    assert len(cell.given_up) == LARGEST_BATCH - 1


@pytest.mark.parametrize("seed", range(5))
def test_no_case_is_lost_or_in_two_places(cell: Cell, seed: int) -> None:
    rng, number = random.Random(seed), 0
    everything = sorted(places(cell))
    while not cell.finished:
        number += 1
        if cell.todo and rng.random() < 0.5:
            cell.take(f"t{number}", "s", rng.randint(1, 4))
        running, lost = list(cell.running.values()), list(cell.lost.values())
        if running:
            batch = rng.choice(running)
            for case in list(batch.remaining)[:rng.randint(0, 40)]:
                cell.measured(case)
            if not batch.remaining:
                cell.ended(batch.task, DONE)
            elif rng.random() < 0.2:
                cell.lose(batch.task, rng.random() < 0.5)
            elif rng.random() < 0.1:
                cell.ended(batch.task, ENDED)
        if lost and rng.random() < 0.5:
            cell.ended(lost[0].task, ENDED)
        assert sorted(places(cell)) == everything
    assert len(cell.done) + len(cell.given_up) == 300


def test_a_seat_that_refused_a_build_goes_on_to_the_next(tmp_path: Path) -> None:
    builds = FakeBuilds(tmp_path, 2, 3)
    schedule = Schedule()
    first, second = (Cell(builds.spec(entry), "m", "cpu") for entry in builds.entries)
    schedule.add(first)
    schedule.add(second)
    schedule.refuse(first, "s1", "no kernel image", {"s1", "s2"})
    assert schedule.next_for("s1", "m") is second and schedule.next_for("s2", "m") is first and not first.failure
    schedule.refuse(first, "s2", "no kernel image", {"s1", "s2"})
    assert first.failure == "no kernel image" and first.finished and not first.complete


def test_a_kind_is_asked_for_its_cases_once(tmp_path: Path) -> None:
    builds = FakeBuilds(tmp_path, 2, 3)
    schedule = Schedule()
    cells = [Cell(builds.spec(entry), "m", "cpu") for entry in builds.entries]
    for cell in cells:
        schedule.add(cell)
    cells[0].planning_by = "s1"
    assert schedule.next_for("s2", "m") is cells[1] and schedule.next_for("s2", "other") is None

"""Made-up records of many builds of a few cases, for tests of what changes from build to build."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

from sample_records import GPU, case, record

from fpxbench.records.case import Case
from fpxbench.records.record import Build, Machine, Record, Timing
from fpxbench.records.store import Store

FUSED = case("triton_fused", "e4m3fn-row")
EAGER = case("eager_upcast", "e4m3fn-row")

Edit = Callable[[int, Record], Record | None]


def nightly(number: int, variant: str = "cu130") -> Build:
    """Return the build of a day, counted from 0."""
    day = date(2026, 6, 1) + timedelta(days=number)
    return Build(torch=f"2.15.0.dev{day:%Y%m%d}+{variant}", triton="3.9.0", channel="nightly", variant=variant,
                 date=day.isoformat())


def timed(of: Record, us: float, dense_us: float) -> Record:
    """Return `of` with other times."""
    return of.model_copy(
        update={
            "timing": Timing(
                samples_us=[us], median_us=us, ci95_us=(us, us), baseline_us=dense_us, speedup=dense_us / us
            )
        }
    )


def nights(
    results: Path,
    builds: int,
    cases: tuple[Case, ...] = (FUSED, EAGER),
    *,
    noise: float = 0.02,
    edit: Edit = lambda night, one: one,
    machine: Machine = GPU,
    seed: int = 1,
    first: int = 0,
) -> None:
    """Write records of each case on each of `builds` nightlies: 100 µs beside 250 µs of the dense product, both noisy.
    `edit` changes a record, or leaves it out by returning None."""
    rng = random.Random(seed)
    store = Store(results)
    for night in range(first, first + builds):
        for of in cases:
            one = timed(record(of, speedup=2.5, machine=machine, build=nightly(night)),
                        100 * (1 + rng.gauss(0, noise)), 250 * (1 + rng.gauss(0, noise)))
            if (edited := edit(night, one)) is not None:
                store.append(edited)


def slower(factor: float, since: int, of: Case = FUSED, dense: float = 1.0) -> Edit:
    """Return an edit: from build `since` on the case takes `factor` times as long, and the dense product beside it
    `dense` times."""
    def edit(night: int, one: Record) -> Record:
        if night < since or one.case.id != of.id:
            return one
        return timed(one, one.timing.median_us * factor, one.timing.baseline_us * dense)

    return edit

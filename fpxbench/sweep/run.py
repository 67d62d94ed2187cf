"""Many cases on one build and one machine, each in isolation, each a record as soon as it ends."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from fpxbench.builds.installed import installed_build
from fpxbench.records.record import Build, Machine, Record
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import Status, Verdict, with_log
from fpxbench.sweep.isolation import Isolation, Outcome
from fpxbench.sweep.messages import TrialRequest, TrialResult
from fpxbench.sweep.plan import Plan, Planned
from fpxbench.sweep.progress import Progress
from fpxbench.sweep.settings import Settings

PREPARATION_TIMEOUT_S = 300.0
CHECK_BUDGET_S = {"smoke": 0.07, "quick": 0.5, "full": 3.0}
"""For each case: checks of other token counts, shapes and layouts, repeats, and the accumulator."""

_DAMAGING = frozenset({Status.ERROR, Status.NONFINITE, Status.WRONG})
"""Statuses after which a GPU child is replaced: its context may be past use (a fault is sticky)."""


class CannotStart(RuntimeError):
    """The sweep could not begin; the message says why, and ends with what the child wrote."""

    def __init__(self, what: str, outcome: Outcome) -> None:
        super().__init__(
            f"{what}: {outcome.failure.summary.removeprefix('raised ')}\n{outcome.log_tail.rstrip()}".rstrip()
        )


@dataclass
class Sweep:
    """What a sweep came to."""

    build: Build
    machine: Machine
    records: list[Record] = field(default_factory=list)
    """One for each case of the plan, those measured earlier included."""
    resumed: int = 0
    interrupted: bool = False
    not_loaded: list[str] = field(default_factory=list)


def main_sweep(settings: Settings, progress: Progress | None = None) -> Sweep:
    """Plan, then run every case that has no record yet (or every one, with `fresh`).

    Ctrl-C ends it early with what was measured (`interrupted`). Raises CannotStart, and ValueError for a selection
    that matches nothing.
    """
    build, store = installed_build(), Store(settings.results)
    with Isolation(settings.memory_limit) as isolation:
        plan = _plan(isolation, settings)
        machine = _machine(isolation, plan.device, settings)
        store.make_folder()
        sweep = Sweep(build, machine, not_loaded=plan.not_loaded)
        done = {} if settings.fresh else _already_measured(store, machine, build, plan)
        todo = [planned for planned in plan.cases if planned.case.id not in done]
        sweep.records = [done[planned.case.id] for planned in plan.cases if planned.case.id in done]
        sweep.resumed = len(sweep.records)
        with progress or Progress(len(todo)) as shown:
            isolation.announce = shown.say
            for line in plan.not_loaded:
                shown.say(f"not loaded: {line}")
            if sweep.resumed:
                shown.say(f"{sweep.resumed} cases were measured before and are kept (--fresh measures them again)")
            try:
                for planned in todo:
                    shown.starting(planned.case.id)
                    name = planned.case.implementation
                    about = {"about": plan.about.get(name, ""), "source": plan.sources.get(name, "")}
                    record = _one(isolation, planned, settings, build, machine, about)
                    store.append(record)
                    sweep.records.append(record)
                    shown.finished(record)
            except KeyboardInterrupt:
                sweep.interrupted = True
                shown.say(
                    f"interrupted; {len(sweep.records) - sweep.resumed} records are kept in "
                    f"{store.file(machine.name, build)}"
                )
    return sweep


def _one(
    isolation: Isolation, planned: Planned, settings: Settings, build: Build, machine: Machine, about: dict[str, str]
) -> Record:
    seed = settings.seed if settings.seed is not None else secrets.randbelow(1 << 31)
    common: dict[str, Any] = {"case": planned.case, "build": build, "machine": machine, "seed": seed, **about}
    if planned.refused:
        status = Status.MISSING if planned.missing else Status.UNSUPPORTED
        return Record(**common, verdict=Verdict(status=status, summary=planned.refused))
    request = TrialRequest(
        case=planned.case, weight=planned.weight, activations=planned.activations, device=machine.kind, seed=seed,
        impls=[str(path.resolve()) for path in settings.impls],
        read_gb_per_s=machine.read_gb_per_s, cache_bytes=machine.cache_bytes, timing_budget_s=settings.timing_budget_s,
        check_budget_s=CHECK_BUDGET_S[settings.profile],
    )
    outcome = isolation.call("fpxbench.sweep.trial:run_trial", request, timeout_s=settings.timeout_s)
    elapsed = outcome.elapsed_s - outcome.waited_s      # another sweep's timing is no part of the case
    if outcome.value is None:
        return Record(**common, verdict=outcome.failure, elapsed_s=elapsed)
    result = outcome.read(TrialResult)
    if result.verdict.status is not Status.OK:
        result.verdict = with_log(result.verdict, outcome.log_tail)
        if machine.kind != "cpu" and result.verdict.status in _DAMAGING:
            isolation.recycle()
    own = {name: getattr(result, name) for name in TrialResult.model_fields if name != "work_s"}
    return Record(**common, **own, elapsed_s=elapsed, overhead_s=outcome.elapsed_s - result.work_s)


def _plan(isolation: Isolation, settings: Settings) -> Plan:
    outcome = isolation.call("fpxbench.sweep.selection:make_plan", settings, timeout_s=PREPARATION_TIMEOUT_S)
    if outcome.mistake:
        raise ValueError(outcome.mistake)
    if outcome.value is None:
        raise CannotStart("the cases could not be planned", outcome)
    return outcome.read(Plan)


def _machine(isolation: Isolation, device: str, settings: Settings) -> Machine:
    """Return the machine, with its read bandwidth if anything is to be timed: measuring that waits for other sweeps'
    timing."""
    described = "measured" if settings.timing_budget_s else "described"
    outcome = isolation.call(
        f"fpxbench.checking.machine:{described}", device, settings.machine, timeout_s=PREPARATION_TIMEOUT_S
    )
    if outcome.mistake:
        raise ValueError(outcome.mistake)
    if outcome.value is None:
        raise CannotStart(f"the device {device!r} could not be measured", outcome)
    return outcome.read(Machine)


def _already_measured(store: Store, machine: Machine, build: Build, plan: Plan) -> dict[str, Record]:
    """Return records that still hold: of this very build, and of implementations that were not edited since."""
    path = store.file(machine.name, build)
    if not path.exists():
        return {}
    records, _ = store.read(path)
    return {
        record.case.id: record for record in latest(records)
        if record.build.key == build.key and record.source == plan.sources.get(record.case.implementation, "")
        and record.verdict.status is not Status.MISSING     # what was not there may be there now
    }

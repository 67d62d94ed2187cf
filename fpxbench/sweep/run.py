"""Run many cases on one build and one machine, each in isolation, several at once, and record each as it ends."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fpxbench.builds.installed import installed_build
from fpxbench.counted import counted
from fpxbench.records.record import Build, Machine, Record
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import Status, Verdict, with_log
from fpxbench.sweep.gate import Gate
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.lineup import Durations, Lineup
from fpxbench.sweep.live_report import LiveReport
from fpxbench.sweep.messages import TrialRequest, TrialResult
from fpxbench.sweep.plan import LAST_STAGE, Plan, Planned, stage
from fpxbench.sweep.pool import Pool, Room, usable_cores
from fpxbench.sweep.progress import Progress
from fpxbench.sweep.settings import Settings

PREPARATION_TIMEOUT_S = 300.0
CHECK_BUDGET_S = {"smoke": 0.07, "quick": 0.5, "full": 3.0}
"""Seconds per case for checks of other token counts, shapes and layouts, repeats, and the accumulator."""

DAMAGING = frozenset({Status.ERROR, Status.NONFINITE, Status.WRONG})
"""Statuses after which a GPU child is replaced: its context may be unusable (faults are sticky)."""


@dataclass
class Sweep:
    """The result of a sweep."""

    build: Build
    machine: Machine
    records: list[Record] = field(default_factory=list)
    """One for each case of the plan, including those measured earlier."""
    resumed: int = 0
    interrupted: bool = False
    ran: set[str] = field(default_factory=set)
    """Ids of the cases that this sweep ran."""
    not_loaded: list[str] = field(default_factory=list)
    gate: Gate = field(default_factory=lambda: Gate(groups=False))
    """Has the time of each timing, and how many cases ran at once."""
    elapsed_s: float = 0.0
    """From the first case to the last."""

    def duration_message(self) -> str:
        """Return how long the sweep's cases took, and how much of it was timing; "" if it ran none."""
        ran = [record for record in self.records if record.case.id in self.ran and record.elapsed_s is not None]
        if not ran:
            return ""
        first_calls = sum(record.properties.first_call_s or 0.0 for record in ran)
        turns = self.gate.intervals
        cases = len({turn.purpose for turn in turns})
        timed = (f"; timing {cases} of them and their tiles, one at a time in {counted(len(turns), 'turn')}, took"
                 f" {self.gate.timed_s:.0f} s, and stopping the others {self.gate.stopping_s:.0f} s"
                 if turns else "")
        return (f"{counted(len(ran), 'case')} in {self.elapsed_s:.0f} s, up to {self.gate.most_at_once} at once{timed}."
                f" Together they took {sum(record.elapsed_s or 0.0 for record in ran):.0f} s, {first_calls:.0f} s of it"
                " first calls, which compile")


def main_sweep(settings: Settings, progress: Progress | None = None) -> Sweep:
    """Plan, then run every case that has no record yet (with `fresh`, every case).

    Ctrl-C ends the sweep early and keeps its records (`interrupted`). Raise CannotStart, and ValueError for a
    selection that matches nothing.
    """
    settings.check_names()
    build, store = installed_build(), Store(settings.results)
    with contextlib.ExitStack() as stack:
        isolation = stack.enter_context(Isolation(settings.memory_limit))
        plan = isolation.call("fpxbench.sweep.selection:make_plan", settings, timeout_s=PREPARATION_TIMEOUT_S).required(
            Plan, "the cases could not be planned")
        machine = machine_here(isolation, plan.device, settings.machine, timed=bool(settings.timing_budget_s))
        store.make_folder()
        sweep = Sweep(build, machine, not_loaded=plan.not_loaded, gate=Gate(groups=machine.kind == "cpu"))
        done = {} if settings.fresh else _already_measured(store, machine, build, plan, settings)
        todo = [planned for planned in plan.cases if planned.case.id not in done]
        sweep.resumed = len(plan.cases) - len(todo)
        room = Room(machine, settings.memory_limit)
        jobs = settings.jobs or room.jobs(planned.case for planned in todo if not planned.refused)
        shown = stack.enter_context(progress or Progress(len(todo)))
        isolation.announce, isolation.gate = shown.say, sweep.gate
        workers = [isolation, *(stack.enter_context(Isolation(settings.memory_limit, shown.say, sweep.gate))
                                for _ in range(min(jobs, len(todo)) - 1))]
        _say_before(shown, plan, sweep, len(workers))
        cases = _Cases(plan, settings, build, machine, max(1, usable_cores() // jobs), room)
        live = stack.enter_context(LiveReport(settings.report, settings.results, sweep.gate, shown.say))
        measured: dict[str, Record] = {}
        began = time.monotonic()
        try:
            for record in _records(cases, todo, workers, shown):
                if record is not None:
                    store.append(record)
                    measured[record.case.id] = record
                    shown.finished(record)
                live.update(stored=record is not None)
        except KeyboardInterrupt:
            sweep.interrupted = True
            shown.say(f"interrupted; kept {counted(len(measured), 'record')} in {store.file(machine.name, build)}")
        done |= measured
        sweep.ran, sweep.elapsed_s = set(measured), time.monotonic() - began
        sweep.records = [done[planned.case.id] for planned in plan.cases if planned.case.id in done]
    return sweep


def _records(cases: _Cases, todo: list[Planned], workers: list[Isolation], shown: Progress,
             ) -> Iterator[Record | None]:
    """Yield records as cases end, refused ones first, and None from time to time while none ends."""
    yield from (cases.refusal(planned) for planned in todo if planned.refused)
    pool = Pool(workers, cases.record, lambda record: record.verdict.status is Status.OOM)
    lineup, durations = cases.lineup(planned for planned in todo if not planned.refused)
    with contextlib.closing(pool.run(lineup)) as events:
        for event, planned, record in events:
            if event == "started" and planned is not None:
                shown.starting(planned.case.id)
                continue
            if record is not None:
                durations.add(record.case.implementation, record.elapsed_s or 0.0)
            yield record


def _say_before(shown: Progress, plan: Plan, sweep: Sweep, jobs: int) -> None:
    for line in plan.not_loaded:
        shown.say(f"not loaded: {line}")
    for line in plan.left_out:
        shown.say(f"left out: {line}")
    if sweep.resumed:
        shown.say(f"kept {counted(sweep.resumed, 'case')} that had been measured (--fresh measures them again)")
    if jobs > 1:
        shown.say(f"up to {jobs} cases are prepared at once (--jobs), and timed one by one")


@dataclass(frozen=True)
class _Cases:
    """Makes records of a plan's cases.

    cores : number for each case while it is prepared beside others
    room : the memory for cases that run at once; ignored if the user set `Settings.jobs`
    """

    plan: Plan
    settings: Settings
    build: Build
    machine: Machine
    cores: int
    room: Room

    def lineup(self, todo: Iterable[Planned]) -> tuple[Lineup[Planned], Durations]:
        """Return the order in which cases begin, and the durations to update as cases end.

        It is the plan's order, except that the last stage begins with the implementations that have taken longest so
        far, so that no long case runs alone at the end.
        """
        durations = Durations()

        def sooner(planned: Planned) -> tuple[int, float]:
            last = stage(planned.case) == LAST_STAGE
            return (1, -durations.expected(planned.case.implementation)) if last else (0, 0.0)

        if self.settings.jobs is not None:
            return Lineup(todo, sooner), durations
        return Lineup(todo, sooner, lambda planned: self.room.cost(planned.case), self.room.bytes), durations

    def refusal(self, planned: Planned) -> Record:
        """Return the record of a refused case, without running it."""
        status = Status.MISSING if planned.missing else Status.UNSUPPORTED
        return Record(**self._common(planned), verdict=Verdict(status=status, summary=planned.refused))

    def record(self, isolation: Isolation, planned: Planned) -> Record:
        """Run a case in a child, and return its record."""
        settings, common = self.settings, self._common(planned)
        outcome = isolation.call("fpxbench.sweep.trial:run_trial", self._request(planned, common["seed"]),
                                 timeout_s=settings.timeout_s, purpose=planned.case.id)
        elapsed = outcome.elapsed_s - outcome.waited_s      # waiting for another case's timing does not count
        if outcome.value is None:
            return Record(**common, verdict=outcome.failure, elapsed_s=elapsed)
        result = outcome.read(TrialResult)
        if result.verdict.status is not Status.OK:
            result.verdict = with_log(result.verdict, outcome.log_tail)
            if self.machine.kind != "cpu" and result.verdict.status in DAMAGING:
                isolation.recycle()
        own = {name: getattr(result, name) for name in TrialResult.model_fields if name != "work_s"}
        return Record(**common, **own, elapsed_s=elapsed, overhead_s=outcome.elapsed_s - result.work_s)

    def _common(self, planned: Planned) -> dict[str, Any]:
        name, seed = planned.case.implementation, self.settings.seed
        return {
            "case": planned.case, "build": self.build, "machine": self.machine,
            "seed": seed if seed is not None else secrets.randbelow(1 << 31),
            "about": self.plan.about.get(name, ""), "source": self.plan.sources.get(name, ""),
            "activations": _digest(planned),
        }

    def _request(self, planned: Planned, seed: int) -> TrialRequest:
        settings, machine = self.settings, self.machine
        return TrialRequest(
            case=planned.case, weight=planned.weight, activations=planned.activations, device=machine.kind, seed=seed,
            impls=[str(path.resolve()) for path in settings.impls],
            read_gb_per_s=machine.read_gb_per_s, cache_bytes=machine.cache_bytes,
            timing_budget_s=settings.timing_budget_s, check_budget_s=CHECK_BUDGET_S[settings.profile],
            cores=self.cores,
        )


def machine_here(isolation: Isolation, device: str | None, name: str | None, *, timed: bool) -> Machine:
    """Return the machine of `device` (None: the default), with its read bandwidth if `timed`.

    Measuring it waits for other sweeps' timings. Raise ValueError for a missing device, and CannotStart.
    """
    how = "measured" if timed else "described"
    outcome = isolation.call(f"fpxbench.checking.machine:{how}", device, name, timeout_s=PREPARATION_TIMEOUT_S)
    return outcome.required(Machine, f"the device {device or 'of this machine'!r} could not be {how}")


def _digest(planned: Planned) -> str:
    return planned.activations.digest if planned.activations is not None else ""


def _already_measured(store: Store, machine: Machine, build: Build, plan: Plan, settings: Settings,
                      ) -> dict[str, Record]:
    """Return the records that answer this sweep's questions: of this build and device, of implementations that have not
    been edited, on the same activations, with the seed that was asked for, and timed if this sweep times."""
    path = store.file(machine.name, build)
    if not path.exists():
        return {}
    records, _ = store.read(path)
    activations = {planned.case.id: _digest(planned) for planned in plan.cases}
    return {
        record.case.id: record for record in latest(records)
        if record.build.key == build.key and record.source == plan.sources.get(record.case.implementation, "")
        and (record.machine.device, record.machine.arch) == (machine.device, machine.arch)
        and record.activations == activations.get(record.case.id)
        and settings.seed in (None, record.seed)
        and record.answers(timed=bool(settings.timing_budget_s))
    }

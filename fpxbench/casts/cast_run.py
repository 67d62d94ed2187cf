"""Run many conversions on one build and machine, isolated and in batches. Imports no torch."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fpxbench.builds.installed import installed_build
from fpxbench.casts.cast_plan import PARTS, batches, can_be_exhaustive, conversions
from fpxbench.casts.cast_record import RULES, CastRecord, CastResult
from fpxbench.casts.conversion import Conversion, Engine
from fpxbench.counted import counted
from fpxbench.records.record import Build, Machine
from fpxbench.records.store import Store, latest
from fpxbench.records.verdict import Status, with_log
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.progress import Progress
from fpxbench.sweep.run import machine_here
from fpxbench.sweep.settings import Settings

EVERY_FP32 = 1 << 32
_FAULT = re.compile(r"(CUDA|HIP) (driver )?error|illegal memory access|device-side assert|AcceleratorError")


@dataclass
class CastRun:
    """One record for each chosen conversion, those of earlier runs included."""

    build: Build
    machine: Machine
    records: list[CastRecord] = field(default_factory=list)
    resumed: int = 0
    interrupted: bool = False


def run_casts(settings: Settings, engines: Sequence[str] = (), globs: Sequence[str] = (), *, exhaustive: bool = False,
                 progress: Progress | None = None) -> CastRun:
    """Run and check every chosen conversion that has no record yet (with `fresh`, every one).

    Without a device in `settings`, those of the CPU and, where there is one, of the GPU; all are stored under one
    machine. `exhaustive` gives casts from fp32 to FP8 all 2**32 inputs: minutes each. Ctrl-C ends the run early and
    keeps what is done (`interrupted`). Raises CannotStart, and ValueError for a selection that matches nothing.
    """
    conversions([settings.device] if settings.device else ["cpu", "cuda"], engines, globs)      # raises early
    build, store = installed_build(), Store(settings.results, CastRecord)
    with Isolation(settings.memory_limit) as isolation:
        machine = machine_here(isolation, settings.device, settings.machine, timed=False)
        store.make_folder()
        devices = [settings.device] if settings.device else ["cpu"] + ["cuda"] * (machine.kind == "cuda")
        chosen = conversions(devices, engines, globs)
        run = CastRun(build, machine)
        done = {} if settings.fresh else _already_checked(store, machine, build)
        if exhaustive:
            done = {name: record for name, record in done.items()
                    if record.inputs == EVERY_FP32 or not can_be_exhaustive(record.conversion)}
        run.records = [done[conversion.id] for conversion in chosen if conversion.id in done]
        run.resumed = len(run.records)
        todo = [conversion for conversion in chosen if conversion.id not in done]
        with progress or Progress(len(todo), announce=False) as shown:
            if run.resumed:
                shown.say(f"{run.resumed} conversions were checked before and are kept (--fresh checks them again)")
            try:
                for record in _records(isolation, todo, settings, build, machine, shown, exhaustive):
                    store.append(record)
                    run.records.append(record)
                    shown.finished(record)
            except KeyboardInterrupt:
                run.interrupted = True
                kept = len(run.records) - run.resumed
                shown.say(f"interrupted; kept {counted(kept, 'record')} in {store.file(machine.name, build)}")
    order = {conversion.id: number for number, conversion in enumerate(chosen)}
    run.records.sort(key=lambda record: order[record.id])
    return run


def _records(isolation: Isolation, todo: list[Conversion], settings: Settings, build: Build, machine: Machine,
             shown: Progress, exhaustive: bool) -> Iterator[CastRecord]:
    engine: Engine | None = None
    whole = [conversion for conversion in todo if exhaustive and can_be_exhaustive(conversion)]
    for batch in [
        *batches(conversion for conversion in todo if conversion not in whole),
        *([conversion] for conversion in whole),
    ]:
        shown.starting(batch[0].id)
        if engine is not None and batch[0].engine is not engine:
            isolation.recycle()     # whether Triton interprets is decided when it is imported
        engine = batch[0].engine
        started = time.monotonic()
        if batch[0] in whole:
            results = [_on_every_input(isolation, batch[0], settings.timeout_s, shown)]
        else:
            results = _run_batch(isolation, batch, settings.timeout_s)
        elapsed = (time.monotonic() - started) / len(batch)
        for result in results:
            of_result = {name: getattr(result, name) for name in CastResult.model_fields}
            yield CastRecord(build=build, machine=machine, elapsed_s=elapsed, **of_result)


def _run_batch(isolation: Isolation, batch: list[Conversion], timeout_s: float) -> list[CastResult]:
    """Run a batch in one call; if that dies, hangs, or may have damaged a GPU's context, run each by itself."""
    outcome = isolation.call("fpxbench.casts.cast_trial:run_conversions", batch, timeout_s=timeout_s)
    if outcome.value is not None:
        results = outcome.read(list[CastResult])
        damaged = any(
            result.verdict.status is Status.ERROR and _FAULT.search(result.verdict.summary) for result in results
        )
        if damaged:
            isolation.recycle()     # a GPU's fault is sticky: results after it in this child mean nothing
        if len(batch) == 1:
            verdict = results[0].verdict
            verdict = with_log(verdict, outcome.log_tail) if verdict.status is Status.ERROR else verdict
            return [results[0].model_copy(update={"verdict": verdict})]
        if not damaged:     # what raised is run again alone, so that the log is its own
            return [
                again
                for result in results
                for again in (
                    _run_batch(isolation, [result.conversion], timeout_s)
                    if result.verdict.status is Status.ERROR
                    else [result]
                )
            ]
    elif len(batch) == 1:
        return [CastResult(conversion=batch[0], verdict=outcome.failure)]
    return [result for conversion in batch for result in _run_batch(isolation, [conversion], timeout_s)]


def _on_every_input(isolation: Isolation, conversion: Conversion, timeout_s: float, shown: Progress) -> CastResult:
    """Run all parts, one call each, so that progress shows and a hang is noticed."""
    for part in range(PARTS):
        shown.starting(f"{conversion.id}, {part / PARTS:.0%} of 2**32 inputs")
        outcome = isolation.call("fpxbench.casts.exhaustive:run_part", conversion, part, timeout_s=timeout_s)
        if outcome.value is None:
            return CastResult(conversion=conversion, verdict=outcome.failure)
        if results := outcome.read(list[CastResult]):
            return results[0]
    raise RuntimeError(f"{conversion.id}: no result after the last part")


def _already_checked(store: Store[CastRecord], machine: Machine, build: Build) -> dict[str, CastRecord]:
    """Return records of this build by the current rules."""
    path = store.file(machine.name, build)
    if not path.exists():
        return {}
    records, _ = store.read(path)
    return {record.id: record for record in latest(records)
            if record.build.key == build.key and record.rules == RULES and record.verdict.status is not Status.MISSING}

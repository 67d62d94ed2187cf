"""The table of one model: prepare it, then measure each row in isolation. Imports no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fpxbench.builds.installed import installed_build
from fpxbench.counted import counted
from fpxbench.model.generate_messages import GenerateSettings, Mode, Prepared, RowRequest
from fpxbench.model.generate_record import GenerationRecord, RowResult, row_id
from fpxbench.records.record import Build, Machine
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict, with_log
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.progress import Progress
from fpxbench.sweep.run import DAMAGING, machine_here
from fpxbench.sweep.settings import default_memory_limit


@dataclass
class GenerateRun:
    """The records of a table, in the order of its rows."""

    build: Build
    machine: Machine
    prepared: Prepared
    records: list[GenerationRecord] = field(default_factory=list)
    interrupted: bool = False


def run_table(settings: GenerateSettings, results: Path, machine_name: str | None = None, *,
              timeout_s: float = 600.0, memory_limit: int | None = None,
              announce: Callable[[str], None] | None = None) -> GenerateRun:
    """Measure every row of a model's table and store a record of each.

    Ctrl-C ends the run early and keeps the rows measured so far (`interrupted`). Raise CannotStart, and ValueError for
    what the user has to correct.
    """
    build, store = installed_build(), Store(results, GenerationRecord)
    with Isolation(memory_limit or default_memory_limit(), announce) as isolation, \
            tempfile.TemporaryDirectory(prefix="fpxbench-model-") as folder:
        work = Path(folder)
        reply = isolation.call("fpxbench.model.generate_measurement:prepare", settings, work, timeout_s=timeout_s)
        prepared = reply.required(Prepared, f"{settings.model} could not be prepared")
        isolation.recycle()     # so that the rows start without the memory that preparation used
        machine = machine_here(isolation, settings.device, machine_name, timed=True)
        store.make_folder()
        run = GenerateRun(build, machine, prepared)
        with Progress(len(prepared.rows)) as shown:
            isolation.announce = shown.say
            for line in prepared.not_loaded:
                shown.say(f"not loaded: {line}")
            if unasked := not_measured(settings.modes):
                shown.say(unasked)
            try:
                for row in prepared.rows:
                    shown.starting(row_id(prepared.model, row.scheme, row.implementation, settings.batch,
                                          compiled=row.compiled, stored=row.stored, merged=row.merged))
                    request = RowRequest(settings=settings, prepared=prepared, work=work, row=row, machine=machine)
                    record = _measured(isolation, request, build, timeout_s)
                    store.append(record)
                    run.records.append(record)
                    shown.finished(record)
            except KeyboardInterrupt:
                run.interrupted = True
                shown.say(f"interrupted; kept {counted(len(run.records), 'row')} in {store.file(machine.name, build)}")
    return run


def not_measured(modes: Sequence[Mode]) -> str:
    """Return a progress line that names the mode without rows; "" if both have some."""
    missing = [text for mode, text in (("eager", "eagerly"), ("compiled", "under torch.compile")) if mode not in modes]
    return f"no row is measured {missing[0]}: --modes eager,compiled measures both" if missing else ""


def _measured(isolation: Isolation, request: RowRequest, build: Build, timeout_s: float) -> GenerationRecord:
    row = request.row
    if row.refused:
        return _record(request, build, RowResult(
            implementation=row.implementation, verdict=Verdict(status=Status.UNSUPPORTED, summary=row.refused)), None)
    outcome = isolation.call("fpxbench.model.generate_measurement:measure", request, timeout_s=timeout_s)
    elapsed_s = outcome.elapsed_s - outcome.waited_s
    if outcome.value is None:
        verdict = outcome.failure
        if row.compiled:
            verdict = verdict.model_copy(update={"summary": f"under torch.compile it {verdict.summary}"})
        result = RowResult(implementation=row.implementation, verdict=verdict)
    else:
        result = outcome.read(RowResult)
        if result.verdict.status is not Status.OK:
            result.verdict = with_log(result.verdict, outcome.log_tail)
    if request.machine.kind != "cpu" and result.verdict.status in DAMAGING:
        isolation.recycle()
    return _record(request, build, result, elapsed_s)


def _record(request: RowRequest, build: Build, result: RowResult, elapsed_s: float | None) -> GenerationRecord:
    settings, prepared, row = request.settings, request.prepared, request.row
    return GenerationRecord(
        elapsed_s=elapsed_s, model=prepared.model, scheme=row.scheme, compiled=row.compiled, stored=row.stored,
        merged=row.merged, batch=settings.batch, prompt_tokens=prepared.prompt_tokens, new_tokens=settings.new_tokens,
        prompt=settings.prompt if prepared.model.kind != "random" else "", plain_sample=prepared.sample, build=build,
        machine=request.machine, **{name: getattr(result, name) for name in RowResult.model_fields})



"""`fpxbench confirm` and `bisect`: rerun builds to confirm a suspected change, or to find where it began."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from fpxbench.builds.timeline import Entry, Timeline
from fpxbench.builds.timeline.entry import DEFAULT_VARIANT
from fpxbench.cli.common import (
    DeviceOption,
    ImplsOption,
    JsonOption,
    ResultsOption,
    UsageError,
    err,
    known_workloads,
    new_app,
    out,
)
from fpxbench.cli.timeline_commands import TimelineOption
from fpxbench.counted import counted
from fpxbench.records.case import Activation, Case, split_id
from fpxbench.records.record import Build, Record
from fpxbench.records.store import Store
from fpxbench.regressions.confirm import BUDGET_S, LEVEL
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome, Metric
from fpxbench.workloads import ranks_in

if TYPE_CHECKING:
    from fpxbench.regressions.bisect import Bisection
    from fpxbench.regressions.confirm import Question
    from fpxbench.regressions.rerun import CaseRunner

app = new_app()

VariantOption = Annotated[
    str | None,
    typer.Option(
        "--variant",
        help="Variant of the builds: cpu, cu130, …  [dim]default: FPX_VARIANT, or that of the installed PyTorch[/]",
    ),
]
MachineOption = Annotated[str | None, typer.Option(
    "--machine", help="Name of this machine.  [dim]default: FPX_MACHINE, or its device's name[/]")]
EnvironmentsOption = Annotated[Path | None, typer.Option(
    "--environments", help="Folder of the environments.  [dim]default: FPX_ENVIRONMENTS, or .asv/env[/]")]
RetryOption = Annotated[bool, typer.Option("--retry", help="Retry installations that failed within the last day.")]
BudgetOption = Annotated[float, typer.Option(
    "--budget", help="Time limit for one case in minutes, without installation.", min=0.0)]


SuspectsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SUSPECT…|CASE GOOD BAD]",
        help="Ids of suspects, as printed by `fpxbench regressions`; or a case and two builds.",
    ),
]
LevelOption = Annotated[float, typer.Option(
    "--level", help="Confidence level of the interval that must exclude “no change”.", min=0.5, max=0.99999)]


@app.command()
def confirm(
    what: SuspectsArgument = None,
    results: ResultsOption = Path("results"),
    timeline: TimelineOption = Path(".timeline"),
    variant: VariantOption = None,
    device: DeviceOption = None,
    machine: MachineOption = None,
    impls: ImplsOption = None,
    environments: EnvironmentsOption = None,
    level: LevelOption = LEVEL,
    budget: BudgetOption = BUDGET_S / 60,
    retry: RetryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rerun two builds, interleaved, to confirm or refute a suspected regression.

    Every run is a process of its own. Without arguments, confirms every open suspect and every verdict that the newest
    builds changed on this machine. Each answer is stored with the records. docs/decision-rule.md, “Confirmation”,
    defines the rule.

    Exit status: 0; 1 if a regression was confirmed; 2 for a usage error; 130 after Ctrl-C, with all answers so far
    kept.
    """
    from fpxbench.builds.environments import REFUSED
    from fpxbench.regressions.confirm import confirm as confirm_question
    from fpxbench.regressions.rerun import CannotRun

    bench = _Bench(results, timeline, variant, device, machine, impls, environments, retry)
    asked = _questions(what or [], bench)
    if not asked:
        out.print("nothing to confirm: no suspect is open")
        return
    found: list[Confirmation] = []
    with bench.opened() as opened:
        for number, (question, good, bad) in enumerate(asked, 1):
            err.print(
                f"[{number}/{len(asked)}] {question.case.id}: {good.tag} against {bad.tag}", markup=False, style="bold"
            )
            entries = {"good": good, "bad": bad}

            def measure(side, seed, entries=entries, question=question):
                record = opened.run(entries[side], question.case, seed)
                _same_place(record, question)
                return record

            try:
                answer = confirm_question(question, measure, level=level, budget_s=budget * 60, say=_say)
            except (*REFUSED, CannotRun, _Elsewhere) as refusal:
                err.print(f"cannot be confirmed: {refusal}", markup=False, style="yellow")
                continue
            Store(results, Confirmation).append(answer)
            found.append(answer)
            print(answer.to_json()) if as_json else out.print(f"{answer.case.id}: [bold]{escape(answer.headline)}[/]")
            if not as_json and answer.outcome is ConfirmationOutcome.CONFIRMED and answer.upstream:
                out.print(f"  commits between them: {answer.upstream}", markup=False)
    if any(answer.outcome is ConfirmationOutcome.CONFIRMED and answer.direction == "worse" for answer in found):
        raise typer.Exit(1)


ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        help="What to compare: time or verdict.  [dim]default: verdict if the two builds differ in it, else time[/]",
    ),
]


@app.command()
def bisect(
    case: Annotated[str, typer.Argument(help="Case id, as printed by `fpxbench list cases`.")],
    good: Annotated[str, typer.Argument(help="A good build: a tag, a version, or a prefix of its hash.")],
    bad: Annotated[str, typer.Argument(help="A later, bad build.")],
    by: ByOption = None,
    results: ResultsOption = Path("results"),
    timeline: TimelineOption = Path(".timeline"),
    variant: VariantOption = None,
    device: DeviceOption = None,
    machine: MachineOption = None,
    impls: ImplsOption = None,
    environments: EnvironmentsOption = None,
    retry: RetryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the first bad build between two builds, and its upstream commits.

    Builds that do not install are skipped. Flaky verdicts are repeated until the chance of a missed failure is below
    1%.
    """
    from fpxbench.builds.environments import REFUSED
    from fpxbench.regressions.bisect import Skipped, bisect as search
    from fpxbench.regressions.rerun import CannotRun

    if by not in (None, "time", "verdict"):
        raise UsageError(f"--by {by!r}: time or verdict")
    bench = _Bench(results, timeline, variant, device, machine, impls, environments, retry)
    entries = _between(bench.find(good), bench.find(bad), bench.timeline.entries())
    wanted = _case(case, results)
    err.print(
        f"{counted(len(entries) - 2, 'build')} between {entries[0].tag} and {entries[-1].tag}: at most "
        f"{math.ceil(math.log2(len(entries)))} of them are run, unless some are skipped",
        markup=False,
        style="dim",
    )
    with bench.opened() as opened:

        def measure(number: int, seed: int) -> Record:
            try:
                return opened.run(entries[number], wanted, seed)
            except (*REFUSED, CannotRun) as refusal:
                raise Skipped(str(refusal)) from None

        try:
            found = search(
                wanted, [bench.build(entry) for entry in entries], [entry.tag for entry in entries],
                cast("Metric | None", by), measure, _say
            )
        except Skipped as refusal:
            raise UsageError(f"one of the two ends cannot be measured: {refusal}") from None
    if as_json:
        print(found.model_dump_json(by_alias=True))
    else:
        _print_bisection(found)


def _print_bisection(found: Bisection) -> None:
    out.print(
        f"first bad build by {found.by}: [bold]{escape(found.first_bad_tag)}[/]; {escape(found.last_good_tag)} is good"
    )
    if found.maybe:
        out.print(f"skipped between them, and possibly the first bad build: {', '.join(found.maybe)}", markup=False,
                  style="yellow")
    out.print(f"upstream commits: {found.upstream or 'unknown: the builds do not name their commits'}", markup=False)


# -- what the commands share
# ------------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    """The options from which a bench is made."""

    results: Path
    folder: Path
    variant: str | None
    device: str | None
    machine: str | None
    impls: list[Path] | None
    environments: Path | None
    retry: bool

    def __post_init__(self) -> None:
        self.machine = self.machine or os.environ.get("FPX_MACHINE") or None
        self.variant = self.variant or os.environ.get("FPX_VARIANT") or None

    @property
    def timeline(self) -> Timeline:
        return Timeline(self.folder)

    @contextmanager
    def opened(self) -> Iterator[CaseRunner]:
        """Open the bench. Raise UsageError for failures that say nothing about a build: no network, no disk space, no
        installer."""
        from fpxbench.builds.environments import UNAVAILABLE, Builds, Environments
        from fpxbench.regressions.rerun import CaseRunner, Conditions

        builds = Builds(self.timeline, Environments(self.environments, _say), self.results, self.variant,
                        machine=self.machine, device=self.device, retry=self.retry)
        try:
            with CaseRunner(
                builds, Conditions(device=self.device, machine=self.machine, impls=tuple(self.impls or ()))
            ) as bench:
                yield bench
        except UNAVAILABLE as error:
            raise UsageError(str(error)) from None

    def find(self, name: str) -> Entry:
        from fpxbench.builds.environments import current_build

        known_builds = self.timeline
        if here := current_build():
            known_builds.add([here])
        return known_builds.find(name)

    def build(self, entry: Entry) -> Build:
        """Return the build as the timeline describes it."""
        return Build(torch=entry.torch, triton=entry.own_triton, git=entry.git, channel=entry.channel, date=entry.date,
                     key=entry.key, variant=self.variant or DEFAULT_VARIANT)


def _say(line: str) -> None:
    err.print(f"  {line}", markup=False, style="dim")


def _questions(what: list[str], bench: _Bench) -> list[tuple[Question, Entry, Entry]]:
    """Return what to confirm, each with its good and its bad build."""
    from fpxbench.regressions.confirm import Question

    if len(what) == 3 and "/" in what[0]:
        good, bad = bench.find(what[1]), bench.find(what[2])
        return [(Question(_case(what[0], bench.results), "time"), good, bad)]
    if any("/" in word for word in what):
        raise UsageError(
            "fpxbench confirm CASE GOOD BAD: a case and the two builds; or ids of suspects, as `fpxbench regressions` "
            "prints"
        )
    from fpxbench.regressions.result_changes import find_changes

    found = find_changes(bench.results, bench.timeline)
    if not what:
        found = found.of_newest_builds()
    known = {
        each.id: each
        for each in (*found.suspects, *(event for event in found.events if event.series.metric == "verdict"))
    }
    for word in what:
        if word not in known:
            raise UsageError(f"no suspect {word!r}: `fpxbench regressions --results {bench.results}` lists them")
    chosen = [known[word] for word in what] or [each for each in known.values() if _is_due(each, bench)]
    return [_question(each, bench) for each in chosen]


def _is_due(finding, bench: _Bench) -> bool:
    """Return whether a finding is for the worse, unanswered, and of this machine and variant as far as those were
    given."""
    return (
        finding.direction == "worse"
        and finding.stands
        and finding.outcome in (None, ConfirmationOutcome.UNDECIDED)
        and bench.machine in (None, finding.series.machine)
        and bench.variant in (None, DEFAULT_VARIANT, finding.series.variant)
    )


def _question(finding, bench: _Bench) -> tuple[Question, Entry, Entry]:
    """Return the question for a finding, with the builds to run. The change behind a suspect may lie some builds before
    it was raised."""
    from fpxbench.regressions.change_report import Suspect
    from fpxbench.regressions.confirm import Question

    case = _case(finding.series.case, bench.results)
    metric: Metric
    if isinstance(finding, Suspect):
        ends, metric, size = (finding.surely_good, finding.raised_at), "time", math.log1p(finding.change)
    else:
        ends, metric, size = (finding.last_good, finding.first_bad), "verdict", None
    good, bad = (bench.find(build.key) for build in ends)
    return Question(case, metric, finding.id, size, finding.series.machine, finding.series.variant), good, bad


class _Elsewhere(Exception):
    """The suspect belongs to another machine or variant than the one that runs here."""


def _same_place(record: Record, question: Question) -> None:
    if question.machine not in (None, record.machine.name):
        raise _Elsewhere(
            f"it was seen on {question.machine}, and this machine is {record.machine.name}. If they are the same, pass "
            f"--machine {question.machine}"
        )
    if question.variant not in (None, record.build.variant):
        raise _Elsewhere(
            f"it was seen on builds for {question.variant}, and these are for {record.build.variant}: --variant "
            f"{question.variant}"
        )


def _case(case_id: str, results: Path) -> Case:
    """Return the case of that id as last recorded; if it never was, from the workload in its id."""
    parts = split_id(case_id)
    store = Store(results)
    for path in sorted(store.files(), key=os.path.getmtime, reverse=True):
        if f'"{case_id}"'.encode() in path.read_bytes():
            for record in reversed(store.read(path)[0]):
                if record.case.id == case_id:
                    return record.case
    known = known_workloads(ranks_in([parts["workload"]]))
    if parts["workload"] not in known:
        raise UsageError(
            f"no record of {case_id!r} in {results}, and no workload {parts['workload']!r}: `fpxbench list workloads` "
            f"prints them"
        )
    return known[parts["workload"]].case(parts["implementation"], parts["scheme"], int(parts["m"]),
                                         cast(Activation, parts["activation"]))


def _between(good: Entry, bad: Entry, entries: list[Entry]) -> list[Entry]:
    """Return `good`, `bad` and the builds between them that belong to the channel of `bad`."""
    order = {entry.key: place for place, entry in enumerate(entries)}
    if order[good.key] >= order[bad.key]:
        raise UsageError(
            f"{good.tag} is not older than {bad.tag}: fpxbench bisect CASE GOOD BAD looks for the first bad build "
            f"after a good one"
        )
    return [good, *(entry for entry in entries[order[good.key] + 1 : order[bad.key]] if entry.channel == bad.channel),
            bad]

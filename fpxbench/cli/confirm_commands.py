"""What is asked of two builds, or of those between them: `fpxbench confirm`, `bisect`, `compare`, `issues`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fpxbench.builds.timeline import Entry, Timeline, TimelineError
from fpxbench.builds.timeline.entry import DEFAULT_VARIANT
from fpxbench.cli.common import (
    DeviceOption,
    ImplsOption,
    JsonOption,
    ResultsOption,
    UsageError,
    err,
    new_app,
    out,
    results_folder,
)
from fpxbench.cli.timeline_commands import TimelineOption
from fpxbench.records.case import Case, split_id
from fpxbench.records.record import Build, Record
from fpxbench.records.store import Store, latest
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome

if TYPE_CHECKING:
    from fpxbench.regressions.confirm import Question
    from fpxbench.regressions.rerun import Bench

app = new_app()

VariantOption = Annotated[str | None, typer.Option(
    "--variant", help="What the builds were made for: cpu, cu130, …; default: a wheel that names none.  [dim]default: FPX_VARIANT, or as the PyTorch at hand[/]")]
MachineOption = Annotated[str | None, typer.Option("--machine", help="What this machine is called.  [dim]default: FPX_MACHINE, or its device's name[/]")]
EnvironmentsOption = Annotated[Path | None, typer.Option(
    "--environments", help="Folder of the builds' environments.  [dim]default: FPX_ENVIRONMENTS, or .asv/env[/]")]
RetryOption = Annotated[bool, typer.Option("--retry", help="Try again to install what failed less than a day ago.")]
BudgetOption = Annotated[float, typer.Option("--budget", help="Minutes that one case may take, installing not counted.", min=0.0)]


@app.command()
def confirm(
    what: Annotated[list[str] | None, typer.Argument(
        metavar="[SUSPECT…|CASE GOOD BAD]", help="Ids of suspects, as `fpxbench regressions` prints; or a case and two builds.")] = None,
    results: ResultsOption = Path("results"),
    timeline: TimelineOption = Path(".timeline"),
    variant: VariantOption = None,
    device: DeviceOption = None,
    machine: MachineOption = None,
    impls: ImplsOption = None,
    environments: EnvironmentsOption = None,
    level: Annotated[float, typer.Option("--level", help="Of the interval that must exclude “no change”.", min=0.5, max=0.99999)] = 0.999,
    budget: BudgetOption = 30.0,
    retry: RetryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run two builds in turn, in fresh processes, until it is clear whether a suspected change is one.

    Without arguments: every open suspect, and every verdict that the newest builds brought, of this machine. Each answer is kept with
    the records. docs/decision-rule.md, “Confirmation”, is the rule.

    Exit status: 0; 1 if a regression was confirmed; 2 for a mistake in the command; 130 after Ctrl-C, where what was answered is kept.
    """
    from fpxbench.builds.environments import REFUSED
    from fpxbench.regressions.confirm import confirm as second_look
    from fpxbench.regressions.rerun import CannotRun

    bench = _Bench(results, timeline, variant, device, machine, impls, environments, retry)
    asked = _questions(what or [], bench)
    if not asked:
        out.print("there is nothing to confirm: no suspect is open")
        return
    found: list[Confirmation] = []
    with bench.opened() as opened:
        for number, (question, good, bad) in enumerate(asked, 1):
            err.print(f"[{number}/{len(asked)}] {question.case.id}: {good.tag} against {bad.tag}", markup=False, style="bold")
            entries = {"good": good, "bad": bad}

            def measure(side, seed, entries=entries, question=question):
                record = opened.run(entries[side], question.case, seed)
                _same_place(record, question)
                return record

            try:
                answer = second_look(question, measure, level=level, budget_s=budget * 60, say=_say)
            except (*REFUSED, CannotRun, _Elsewhere) as refusal:
                err.print(f"cannot be answered: {refusal}", markup=False, style="yellow")
                continue
            Store(results, Confirmation).append(answer)
            found.append(answer)
            print(answer.to_json()) if as_json else out.print(f"{answer.case.id}: [bold]{escape(answer.headline)}[/]")
            if not as_json and answer.outcome is ConfirmationOutcome.CONFIRMED and answer.upstream:
                out.print(f"  commits between them: {answer.upstream}", markup=False)
    if any(answer.outcome is ConfirmationOutcome.CONFIRMED and answer.direction == "worse" for answer in found):
        raise typer.Exit(1)


@app.command()
def bisect(
    case: Annotated[str, typer.Argument(help="A case id, as `fpxbench list cases` prints.")],
    good: Annotated[str, typer.Argument(help="A build that is good: a tag, a version, the beginning of a hash.")],
    bad: Annotated[str, typer.Argument(help="A later one that is bad.")],
    by: Annotated[str | None, typer.Option("--by", help="time or verdict.  [dim]default: verdict where the two differ in it[/]")] = None,
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
    """Find the first bad build between two, and the upstream commits that came with it.

    Builds that do not install are skipped, flaky ones are run until it would be a wonder if they were bad.
    """
    from fpxbench.builds.environments import REFUSED
    from fpxbench.regressions.bisect import Skipped, bisect as search
    from fpxbench.regressions.rerun import CannotRun

    if by not in (None, "time", "verdict"):
        raise UsageError(f"--by {by!r}: time or verdict")
    bench = _Bench(results, timeline, variant, device, machine, impls, environments, retry)
    entries = _between(bench.find(good), bench.find(bad), bench.timeline.entries())
    wanted = _case(case, results)
    err.print(f"{len(entries) - 2} builds between {entries[0].tag} and {entries[-1].tag}: at most "
              f"{math.ceil(math.log2(len(entries)))} of them are tried, unless some are skipped", markup=False, style="dim")
    with bench.opened() as opened:

        def measure(number: int, seed: int) -> Record:
            try:
                return opened.run(entries[number], wanted, seed)
            except (*REFUSED, CannotRun) as refusal:
                raise Skipped(str(refusal)) from None

        try:
            found = search(wanted, [bench.build(entry) for entry in entries], [entry.tag for entry in entries], by, measure, _say)
        except Skipped as refusal:
            raise UsageError(f"one of the two ends cannot be measured: {refusal}") from None
    if as_json:
        print(found.model_dump_json(by_alias=True))
        return
    out.print(f"first bad build by {found.by}: [bold]{escape(found.first_bad_tag)}[/]; {escape(found.last_good_tag)} is good")
    if found.maybe:
        out.print(f"between them were skipped, and may be the first: {', '.join(found.maybe)}", markup=False, style="yellow")
    out.print(f"upstream commits: {found.upstream or 'not known, since the builds do not say which commits they are of'}", markup=False)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(metavar="A", help="The earlier build: a tag, a version, the beginning of a hash.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The later one.")],
    machine: Annotated[str | None, typer.Option("--machine", help="Only records of this machine.")] = None,
    results: ResultsOption = Path("results"),
    timeline: TimelineOption = Path(".timeline"),
    everything: Annotated[bool, typer.Option("--all", help="Show what has not changed, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what differs between two builds, from the records that there are: verdicts first, worst first, the unchanged folded.

    docs/decision-rule.md, “Comparison of two builds”, says when a time is called changed. It is no confirmation: that runs both again.
    """
    from fpxbench.regressions.compare import compare as rows_of

    held, results = Timeline(timeline), results_folder(results)
    sides = [_records_of_build(name, held, results, machine) for name in (before, after)]
    rows = rows_of(*sides)
    if as_json:
        print(json.dumps([row.model_dump(mode="json") for row in rows]))
        return
    _print_rows(rows, [before, after], everything)
    if not set.intersection(*({record.machine.name for record in side} for side in sides)):
        out.print("no machine has sweeps of both: run the same cases on both builds on one", style="bold")


@app.command()
def issues(
    results: ResultsOption = Path("results"),
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write ID.md and ID.title for each into this folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the text of an issue for each confirmed regression: what, since which build, how sure, how to reproduce, which commits."""
    from fpxbench.integrations.notify.github_issues import confirmed, issues as texts

    found = texts(confirmed(results))
    if as_json:
        print(json.dumps([vars(issue) for issue in found]))
        return
    if output is None:
        for issue in found:
            print(f"# {issue.title}\n\n{issue.body}")
        return
    output.mkdir(parents=True, exist_ok=True)
    for issue in found:
        (output / f"{issue.id}.title").write_text(issue.title + "\n", encoding="utf-8")
        (output / f"{issue.id}.md").write_text(issue.body, encoding="utf-8")
    out.print(f"{len(found)} in {output}", markup=False)


# -- what the commands share ------------------------------------------------------------------------------------------------


@dataclass
class _Bench:
    """Options that become a bench."""

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
    def opened(self) -> Iterator[Bench]:
        """Raises UsageError for what is no finding about a build: no network, no room, no installer."""
        from fpxbench.builds.environments import UNAVAILABLE, Builds, Environments
        from fpxbench.regressions.rerun import Bench, Conditions

        builds = Builds(self.timeline, Environments(self.environments, _say), self.results, self.variant, machine=self.machine,
                        device=self.device, retry=self.retry)
        try:
            with Bench(builds, Conditions(device=self.device, machine=self.machine, impls=tuple(self.impls or ()))) as bench:
                yield bench
        except UNAVAILABLE as error:
            raise UsageError(str(error)) from None

    def find(self, name: str) -> Entry:
        from fpxbench.builds.environments import current_build

        held = self.timeline
        try:
            if here := current_build():
                held.add([here])
            return held.find(name)
        except TimelineError as error:
            raise UsageError(str(error)) from None

    def build(self, entry: Entry) -> Build:
        """What the timeline knows of it, before it has been run."""
        return Build(torch=entry.torch, triton=entry.own_triton, git=entry.git, channel=entry.channel, date=entry.date, key=entry.key,
                     variant=self.variant or DEFAULT_VARIANT)


def _say(line: str) -> None:
    err.print(f"  {line}", markup=False, style="dim")


def _questions(what: list[str], bench: _Bench) -> list[tuple[Question, Entry, Entry]]:
    """What is to be confirmed, with the two builds that are to be run."""
    from fpxbench.regressions.confirm import Question

    if len(what) == 3 and "/" in what[0]:
        good, bad = bench.find(what[1]), bench.find(what[2])
        return [(Question(_case(what[0], bench.results), "time"), good, bad)]
    if any("/" in word for word in what):
        raise UsageError("fpxbench confirm CASE GOOD BAD: a case and the two builds; or ids of suspects, as `fpxbench regressions` prints")
    from fpxbench.regressions.result_changes import find_changes

    found = find_changes(bench.results, bench.timeline)
    if not what:
        found = found.of_newest_builds()
    known = {each.id: each for each in (*found.suspects, *(event for event in found.events if event.series.metric == "verdict"))}
    for word in what:
        if word not in known:
            raise UsageError(f"no suspect {word!r}: `fpxbench regressions --results {bench.results}` prints those that there are")
    chosen = [known[word] for word in what] or [each for each in known.values() if _is_due(each, bench)]
    return [_question(each, bench) for each in chosen]


def _is_due(finding, bench: _Bench) -> bool:
    """Worse, not answered yet, and, as far as that was said, of what is measured here."""
    return (finding.direction == "worse" and finding.outcome in (None, ConfirmationOutcome.UNDECIDED)
            and bench.machine in (None, finding.series.machine) and bench.variant in (None, DEFAULT_VARIANT, finding.series.variant))


def _question(finding, bench: _Bench) -> tuple[Question, Entry, Entry]:
    """A suspect's change may lie some builds off, so that it names the two to run; an event is between the two that it names."""
    from fpxbench.regressions.change_report import Suspect
    from fpxbench.regressions.confirm import Question

    case = _case(finding.series.case, bench.results)
    if isinstance(finding, Suspect):
        ends, metric, size = (finding.surely_good, finding.raised_at), "time", math.log1p(finding.change)
    else:
        ends, metric, size = (finding.last_good, finding.first_bad), "verdict", None
    good, bad = (bench.find(build.key) for build in ends)
    return Question(case, metric, finding.id, size, finding.series.machine, finding.series.variant), good, bad


class _Elsewhere(Exception):
    """The suspect is of another machine or of another variant than what runs here."""


def _same_place(record: Record, question: Question) -> None:
    if question.machine not in (None, record.machine.name):
        raise _Elsewhere(f"it was seen on {question.machine}, and this machine is {record.machine.name}. If they are the same, say "
                         f"--machine {question.machine}")
    if question.variant not in (None, record.build.variant):
        raise _Elsewhere(f"it was seen on builds for {question.variant}, and these are for {record.build.variant}: --variant {question.variant}")


def _case(case_id: str, results: Path) -> Case:
    """The case of that id: as it was recorded last or, if it never was, from the workload that it names."""
    parts = split_id(case_id)
    store = Store(results)
    for path in sorted(store.files(), key=os.path.getmtime, reverse=True):
        if f'"{case_id}"'.encode() in path.read_bytes():
            for record in reversed(store.read(path)[0]):
                if record.case.id == case_id:
                    return record.case
    from fpxbench.workloads import workloads

    known = workloads()
    if parts["workload"] not in known:
        raise UsageError(f"no record of {case_id!r} in {results}, and no workload {parts['workload']!r}: `fpxbench list workloads` prints them")
    shape = known[parts["workload"]]
    return Case(**parts | {"m": int(parts["m"])}, n=shape.n, k=shape.k)


def _between(good: Entry, bad: Entry, entries: list[Entry]) -> list[Entry]:
    """`good`, `bad` and what came out between them, in the later one's channel."""
    order = {entry.key: place for place, entry in enumerate(entries)}
    if order[good.key] >= order[bad.key]:
        raise UsageError(f"{good.tag} is not older than {bad.tag}: fpxbench bisect CASE GOOD BAD looks for the first bad build after a good one")
    return [good, *(entry for entry in entries[order[good.key] + 1:order[bad.key]] if entry.channel == bad.channel), bad]


def _records_of_build(name: str, held: Timeline, results: Path, machine: str | None) -> list[Record]:
    """The last record of each case of one build. A build is found on the timeline, or by the version in the records themselves."""
    try:
        key = held.find(name).key
    except TimelineError:
        key = None
    store, found, labels = Store(results), [], set()
    for path in store.files():
        if machine is not None and path.parent.parent.name != machine:
            continue
        first = next(iter(store.read(path)[0]), None)
        if first is None:
            continue
        labels.add(first.build.label)
        if key == first.build.key or name in (first.build.label, first.build.torch):
            read, broken = store.read(path)
            for line in broken:
                err.print(str(line), markup=False, style="yellow")
            found += [record for record in read if key in (None, record.build.key)]
    if not found:
        where = f" of machine {machine!r}" if machine else ""
        raise UsageError(f"no records{where} of build {name!r} in {results}: there are some of {', '.join(sorted(labels)) or 'none'}")
    return latest(found)


def _print_rows(rows, names: list[str], everything: bool) -> None:
    from fpxbench.regressions.compare import ChangeClass

    folded = [row for row in rows if row.change in (ChangeClass.UNCHANGED, ChangeClass.ONLY_ONE, ChangeClass.MACHINE)]
    shown = rows if everything else [row for row in rows if row not in folded]
    widths = [max((len(text) for text in column), default=0) for column in zip(*((row.change, row.case, row.machine) for row in shown), strict=True)]
    out.print(f"{names[0]} → {names[1]}", markup=False, style="bold")
    for row in shown:
        place = "  ".join(f"{text:{width}}" for text, width in zip((row.change, row.case, row.machine), widths, strict=True))
        out.print(f"{place}  {_in_words(row)}", markup=False, style=_STYLES.get(row.change))
    counts = {change: sum(row.change is change for row in rows) for change in ChangeClass}
    out.print("; ".join(f"{count} {change}" for change, count in counts.items() if count), markup=False, style="bold")
    if not everything and folded:
        out.print("--all shows the others, too", style="dim")


_STYLES = {"verdict worse": "red", "slower": "red", "faster": "green", "verdict better": "green"}


def _in_words(row) -> str:
    from fpxbench.stats import percent

    def interval(found: tuple[float, float, float]) -> str:
        return f"{percent(found[0])} [{percent(found[1], '')}, {percent(found[2], '')}]"

    said = f"{row.before or 'not measured'} → {row.after or 'not measured'}"
    if row.time:
        said = f"{interval(row.time)}  {row.before_us:.4g} → {row.after_us:.4g} us"
        said += f"; speedup over dense {interval(row.speedup)}" if row.speedup else ""
    return said + (f"  ({row.variants[0]} → {row.variants[1]})" if row.variants else "")

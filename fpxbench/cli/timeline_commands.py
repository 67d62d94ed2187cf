"""`fpxbench timeline`: the PyTorch builds in order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fpxbench.builds.installed import NoPyTorch, installed_build
from fpxbench.builds.timeline import CHANNELS, Entry, Timeline, commit_hash
from fpxbench.builds.timeline.measured import measured
from fpxbench.cli.common import JsonOption, ResultsOption, UsageError, err, new_app, new_table, out, print_table
from fpxbench.counted import counted

if TYPE_CHECKING:
    from fpxbench.builds.index.fetch import Fetcher
    from fpxbench.builds.index.pip_settings import PipSettings

app = new_app()

timeline_app = typer.Typer(no_args_is_help=True, help="Manage the timeline of builds: sync, list, show, here.")
app.add_typer(timeline_app, name="timeline")

TimelineOption = Annotated[Path, typer.Option(
    "--timeline", help="Folder of the timeline, which asv uses as its repository.", show_default=True)]
SinceOption = Annotated[str | None, typer.Option(
    "--since", help="Only builds from this date (2026-01-01) or version (2.9) on.")]
ChannelOption = Annotated[str | None, typer.Option(
    "--channel", help="release or nightly.  [dim]default: release; nightly with --variant; both with --index[/]")]
VariantsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        help="PyTorch's index for cu130, cpu, rocm7.2, …: nightlies or, with --channel release, releases. Repeatable.",
    ),
]
IndexOption = Annotated[list[str] | None, typer.Option(
    "--index", help="Use this package index or folder of wheels instead. Repeatable.")]
KeepOption = Annotated[int | None, typer.Option(
    "--keep", help="Add only this many newest builds of each channel.", min=1)]
GitOption = Annotated[bool, typer.Option(
    "--git", help="Read the upstream commit of each build, which downloads 1.5 MB of its wheel once.")]


@timeline_app.command()
def sync(
    channel: ChannelOption = None,
    variant: VariantsOption = None,
    index: IndexOption = None,
    since: SinceOption = None,
    keep: KeepOption = None,
    git: GitOption = False,
    timeline: TimelineOption = Path(".timeline"),
    as_json: JsonOption = False,
) -> None:
    """Add the builds of package indexes to the timeline.

    Adds the installed build, releases from pip's configured index, and nightlies from PyTorch's index for a variant.

    Exit status: 0; 1 if an index could not be read (the others are added, and the next sync continues); 2 for a usage
    error.
    """
    from fpxbench.builds.timeline.sync import SyncFilter, parse_since, sync as sync_timeline

    channels = _channels(channel, bool(variant), bool(index))
    wanted = SyncFilter(channels=channels, since=parse_since(since) if since else None, keep=keep, git=git)
    known_builds = Timeline(timeline)
    try:
        installed = [installed_build()]
    except NoPyTorch:  # a machine that only syncs
        installed = []
    added_here = known_builds.add(installed).added
    settings, fetcher = _fetching(needs_pip=not index and not variant)
    if channels == {"nightly"} and not variant and not index and installed:
        variant = [installed[0].variant]
    places = _places(settings, channels, variant or [], index or [])
    bar = Progress(TextColumn("asking {task.description} for its Triton"), BarColumn(), MofNCompleteColumn(),
                   console=err, transient=True, disable=not err.is_terminal)
    task = bar.add_task("", visible=False)

    def progress(done: int, total: int, tag: str) -> None:
        bar.update(task, completed=done, total=total, description=tag, visible=True)

    try:
        with bar:
            outcome = sync_timeline(known_builds, places, fetcher, wanted, progress)
    except KeyboardInterrupt:
        err.print("fpxbench: interrupted; what was read is kept, and the next sync continues from there")
        raise typer.Exit(130) from None
    outcome.added = [*added_here, *outcome.added]
    if as_json:
        print(json.dumps(vars(outcome)))
    else:
        _print_outcome(outcome, known_builds)
    for sentence in outcome.problems:
        err.print(f"fpxbench: {sentence}", markup=False, style="red")
    if outcome.problems:
        raise typer.Exit(1)


def _fetching(needs_pip: bool) -> tuple[PipSettings, Fetcher]:
    """Return pip's settings and what reads indexes by them. Raise UsageError where there is no pip and it is needed."""
    from fpxbench.builds.index.fetch import Fetcher, Unreachable
    from fpxbench.builds.index.pip_settings import NoPip, PipSettings, pip_settings

    try:
        settings = pip_settings()
    except NoPip as error:
        if needs_pip:
            raise UsageError(str(error)) from None
        settings = PipSettings()
    try:
        return settings, Fetcher(settings)
    except Unreachable as error:
        raise UsageError(str(error)) from None


def _channels(channel: str | None, variant: bool, index: bool) -> frozenset[str]:
    if channel not in (None, "release", "nightly"):
        raise UsageError(f"--channel {channel!r}: choose release or nightly")
    if channel:
        return frozenset({channel})
    return frozenset({"release", "nightly"} if index else {"nightly"} if variant else {"release"})


def _places(settings, channels: frozenset[str], variants: list[str], indexes: list[str]) -> list:
    from fpxbench.builds.index.listing import NIGHTLY_INDEX, RELEASE_INDEX, extra_location, pip_locations

    if indexes and variants:
        raise UsageError("--index and --variant exclude each other: give one of them")
    if indexes:
        return [extra_location(url) for url in indexes]
    for name in variants:
        if not name.replace(".", "").isalnum():
            raise UsageError(f"--variant {name!r}: a variant has a name such as cpu, cu130 or rocm7.2")
    if "release" in channels:
        return [*pip_locations(settings), *(extra_location(RELEASE_INDEX.format(variant=name)) for name in variants)]
    if not variants:
        raise UsageError("nightlies need --variant (cpu, cu130, rocm7.2, …) or --index URL")
    return [extra_location(NIGHTLY_INDEX.format(variant=name)) for name in variants]


def _print_outcome(outcome, known_builds: Timeline) -> None:
    for address, count in outcome.read.items():
        out.print(f"{address}: {counted(count, 'build')}", markup=False, style="dim")
    for sentence in outcome.remarks:
        out.print(sentence, markup=False, style="yellow")
    for what, tags in (("new", outcome.added), ("back on the index", outcome.returned),
                       ("no longer on the index, kept here", outcome.vanished)):
        if tags:
            out.print(f"{len(tags)} {what}: {', '.join(tags[:-6:-1])}{', …' if len(tags) > 5 else ''}", markup=False)
    if outcome.read and not (outcome.added or outcome.returned or outcome.vanished):
        out.print("no new builds")
    out.print(f"{counted(len(known_builds.entries()), 'build')} on the timeline   next: fpxbench timeline "
              f"list", style="dim")


@timeline_app.command("list")
def list_(
    channel: Annotated[
        str | None, typer.Option("--channel", help="release, nightly or source.  [dim]default: all[/]")
    ] = None,
    since: SinceOption = None,
    timeline: TimelineOption = Path(".timeline"),
    results: ResultsOption = Path("results"),
    as_json: JsonOption = False,
) -> None:
    """List the builds, newest first, with date, Triton version and number of records per machine."""
    from fpxbench.builds.timeline.sync import is_recent, parse_since

    if channel not in (None, *CHANNELS):
        raise UsageError(f"--channel {channel!r}: choose from {', '.join(CHANNELS)}")
    earliest = parse_since(since) if since else None
    known = Timeline(timeline).entries()
    if not known and not as_json:
        out.print(f"the timeline {timeline} is empty: `fpxbench timeline sync` fills it", markup=False)
        return
    entries = [
        entry
        for entry in reversed(known)
        if channel in (None, entry.channel) and is_recent(entry, earliest)
    ]
    if not entries and not as_json:
        raise UsageError(f"the timeline {timeline} has no such build: `fpxbench timeline sync` adds builds")
    counts, here = _counts(results), _installed_key()
    if as_json:
        print(json.dumps([_metadata(entry, counts.get(entry.key, {}), here) for entry in entries]))
        return
    table = new_table("build", "date", "Triton", "variants", "measured", "")
    for entry in entries:
        table.add_row(
            *map(
                escape,
                (entry.tag, _day(entry), entry.own_triton or "", " ".join(entry.variants),
                 _measured_text(counts.get(entry.key, {})),
                 "; ".join([*(["installed here"] if entry.key == here else []), *entry.marks])),
            )
        )
    print_table(table)


@timeline_app.command()
def show(
    build: Annotated[
        str, typer.Argument(help="A tag, a version, a channel (its newest build) or a prefix of a commit hash.")
    ],
    timeline: TimelineOption = Path(".timeline"),
    results: ResultsOption = Path("results"),
    as_json: JsonOption = False,
) -> None:
    """Show one build: dates, commits, requirements of each variant, wheels, records, and its name in asv."""
    entry = Timeline(timeline).find(build)
    _show(
        entry, _counts(results).get(entry.key, {}), as_json, {"wheels": [wheel.model_dump() for wheel in entry.wheels]}
    )


@timeline_app.command()
def here(
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            help="Look in this interpreter, a path or a command.  [dim]default: the one that runs fpxbench[/]",
        ),
    ] = None,
    timeline: TimelineOption = Path(".timeline"),
    results: ResultsOption = Path("results"),
    as_json: JsonOption = False,
) -> None:
    """Show the installed PyTorch on the timeline, and add it if it is not there.

    A known release or nightly is found by its version; any other build gets a commit of its own.
    """
    build = installed_build(python)
    known_builds = Timeline(timeline)
    new = bool(known_builds.add([build]).added)
    entry = known_builds.find(build.key)
    _show(entry, _counts(results).get(entry.key, {}), as_json, {"installed": build.model_dump(), "new": new})
    if entry.git and build.git and not entry.git.startswith(build.git) and not build.git.startswith(entry.git):
        err.print(
            f"fpxbench: this PyTorch calls itself {build.torch} and was built from {build.git[:12]}, not from "
            f"{entry.git[:12]} as that build was: its results would be stored as the other's",
            markup=False,
            style="yellow",
        )


# Output.


def _metadata(entry: Entry, counts: dict[str, int], here: str | None) -> dict:
    return {
        "build": entry.tag,
        "key": entry.key,
        "channel": entry.channel,
        "torch": entry.torch,
        "triton": entry.own_triton,
        "git": entry.git,
        "date": entry.date,
        "seen": entry.seen,
        "variants": {name: vars(pins) for name, pins in entry.variants.items()},
        "measured": counts,
        "vanished": entry.vanished,
        "yanked": entry.yanked,
        "failures": {name: failure.model_dump() for name, failure in entry.failures.items()},
        "marks": entry.marks,
        "installed_here": entry.key == here,
    }


def _show(entry: Entry, counts: dict[str, int], as_json: bool, more: dict) -> None:
    if as_json:
        print(json.dumps(_metadata(entry, counts, _installed_key()) | more))
        return
    table = Table(box=None, show_header=False, pad_edge=False, title=escape(f"{entry.tag}: PyTorch {entry.torch}"),
                  title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(name: str, value: str | None) -> None:
        if value:
            table.add_row(name, escape(value))

    row("channel", entry.channel)
    row("date", entry.date or f"not known; it was there by {entry.seen}")
    row("commit on the timeline", entry.key)
    row("for asv", f"asv run {entry.tag}^!   asv show {entry.tag}   asv compare {entry.tag} …")
    row("upstream commit", entry.git)
    row("Triton", entry.own_triton)
    for name, pins in entry.variants.items():
        row(f"{name} is installed by", " ".join(pins.requirements.split("\n")).strip())
    for address, source in entry.sources.items():
        fitting = sum(wheel.fits for wheel in source.wheels)
        gone = f", until {source.vanished}" if source.vanished else ""
        row("wheels", f"{len(source.wheels)} for Linux, {fitting} of them for this Python, on {address}{gone}")
    row("measured", _measured_text(counts))
    row("remarks", "; ".join(entry.marks))
    out.print(table)
    for name, failure in entry.failures.items():
        out.print(f"{name}, when it failed to install on {failure.day}:", markup=False, style="bold")
        out.print(failure.log_tail, markup=False)


def _day(entry: Entry) -> str:
    return entry.day if entry.dated else f"by {entry.day}"


def _measured_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{machine}: {count}" for machine, count in sorted(counts.items()))


def _counts(results: Path) -> dict[str, dict[str, int]]:
    """Return the number of records by commit of the build and by machine."""
    found: dict[str, Counter[str]] = {}
    for one in measured(results):
        found.setdefault(commit_hash(one.build), Counter())[one.machine] += one.records
    return {key: dict(counter) for key, counter in found.items()}


def _installed_key() -> str | None:
    try:
        return installed_build().key
    except NoPyTorch:
        return None

"""`fpxbench notify`: send confirmed regressions where people look."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpxbench.cli.common import ResultsOption, UsageError, err, new_app, out, results_folder
from fpxbench.cli.timeline_commands import TimelineOption
from fpxbench.counted import counted
from fpxbench.integrations.notify.channels.github import API, GitHub
from fpxbench.integrations.notify.channels.webhook import DEFAULT, Webhook
from fpxbench.integrations.notify.delivery import Channel, DeliveryAttempt, DeliveryError, deliver, due
from fpxbench.whole_file import write_whole

if TYPE_CHECKING:
    from fpxbench.integrations.notify.notice import Notice
    from fpxbench.records.record import Record
    from fpxbench.regressions.movements import Movement
    from fpxbench.regressions.result_changes import ResultChanges

app = new_app()

_MOST_SHOWN = 10


SendOption = Annotated[bool, typer.Option("--send", help="Send, and write files. Without it: print what would be.")]
GithubOption = Annotated[str | None, typer.Option(
    "--github", metavar="OWNER/NAME", help="Issues of this repository; token: GITHUB_TOKEN.")]
PullRequestOption = Annotated[int | None, typer.Option(
    "--pull-request", min=1, help="Comment on this pull request instead of issues.")]
GithubApiOption = Annotated[str, typer.Option("--github-api", help="API of GitHub, or of GitHub Enterprise.")]
WebhookOption = Annotated[list[str] | None, typer.Option(
    "--webhook", metavar="URL", help="POST JSON to this URL. Repeatable.")]
TemplateOption = Annotated[Path | None, typer.Option(
    "--template", help="File with the webhook's JSON body, a Jinja template.")]
AppriseOption = Annotated[list[str] | None, typer.Option(
    "--apprise", metavar="URL", help="Slack, Discord, e-mail, …: a URL of apprise. Repeatable.")]
OpenMetricsOption = Annotated[Path | None, typer.Option(
    "--openmetrics", help="Write OpenMetrics text for Prometheus to this file.")]
HudOption = Annotated[Path | None, typer.Option(
    "--hud", help="Write PyTorch HUD's benchmark schema v3 (JSON) to this file.")]
AtomOption = Annotated[Path | None, typer.Option("--atom", help="Write an Atom feed to this file.")]
ReportUrlOption = Annotated[str, typer.Option(
    "--report-url", help="Where the report is published, for the feed's links.")]
EventsOption = Annotated[bool, typer.Option("--events", help="Also send changed verdicts that were not run again.")]


@app.command()
def notify(
    results: ResultsOption = Path("results"),
    timeline: TimelineOption = Path(".timeline"),
    send: SendOption = False,
    github: GithubOption = None,
    pull_request: PullRequestOption = None,
    github_api: GithubApiOption = API,
    webhook: WebhookOption = None,
    template: TemplateOption = None,
    apprise: AppriseOption = None,
    openmetrics: OpenMetricsOption = None,
    hud: HudOption = None,
    atom: AtomOption = None,
    report_url: ReportUrlOption = "",
    events: EventsOption = False,
) -> None:
    """Send each new regression once to each channel. A dry run unless --send is given.

    Every change is sorted by its cause: the build, the machine, the suite, noise. Only the build's changes are sent,
    after `fpxbench confirm` confirmed them. URLs that hold a secret can be given by an environment variable:
    --webhook env:NAME. docs/notify.md has the rule and examples.

    Exit status: 0; 1 if something could not be delivered, which the next run tries again; 2 for a usage error.
    """
    from fpxbench.builds.timeline import Timeline
    from fpxbench.integrations.notify.notice import notices
    from fpxbench.regressions.movements import movements
    from fpxbench.regressions.result_changes import find_changes

    results = results_folder(results)
    failed, channels = _channels(github, pull_request, github_api, webhook or [], template, apprise or [])
    changes = find_changes(results, Timeline(timeline))
    if not changes.newest_of:
        raise UsageError(f"--results {results}: no records, so that there is nothing to send; "
                         f"`fpxbench run --results {results}` makes some")
    for trouble in changes.troubles:
        err.print(trouble, markup=False, style="yellow")
    moved = movements(results, changes)
    found = notices(results, moved, events)
    _print_causes(moved)
    files = {path: kind for path, kind in ((openmetrics, "openmetrics"), (hud, "hud"), (atom, "atom")) if path}
    if channels:
        failed = (_send(results, channels, found) if send else _preview(results, channels, found)) or failed
    elif not files:
        out.print(f"{len(found)} to send, and no channel given: --github, --webhook, --apprise, …", style="bold")
    for path, kind in files.items():
        failed = not _write(path, kind, results, changes, moved, report_url, send) or failed
    if failed:
        raise typer.Exit(1)


def _channels(
    github: str | None, pull_request: int | None, api: str, webhooks: list[str], template: Path | None,
    apprise: list[str],
) -> tuple[bool, list[Channel]]:
    """Return whether a channel is missing, and the others."""
    from fpxbench.integrations.notify.channels.chat import Chat

    if pull_request and not github:
        raise UsageError(f"--pull-request {pull_request}: of which repository? Add --github OWNER/NAME")
    if template and not webhooks:
        raise UsageError(f"--template {template}: of which webhook? Add --webhook URL")
    found: list[Channel] = []
    if github:
        found.append(GitHub(github, os.environ.get("GITHUB_TOKEN"), pull_request=pull_request, api=api))
    body = template.read_text(encoding="utf-8") if template else DEFAULT
    found += [Webhook(_url(url, "--webhook"), body) for url in webhooks]
    missing = False
    for url in apprise:
        try:
            found.append(Chat(_url(url, "--apprise")))
        except DeliveryError as error:
            err.print(str(error), markup=False, style="red")
            missing = True
    return missing, found


def _url(text: str, option: str) -> str:
    """Return the URL, which ``env:NAME`` keeps out of the process list and the shell's history."""
    if not text.startswith("env:"):
        return text
    name = text.removeprefix("env:")
    if not os.environ.get(name):
        raise UsageError(f"{option} {text}: the environment variable {name} is not set")
    return os.environ[name]


def _print_causes(moved: list[Movement]) -> None:
    counts = Counter(one.cause for one in moved)
    out.print("changes by cause: " + (", ".join(f"{count} {cause}" for cause, count in counts.items()) or "none"))
    quiet = [one for one in moved if not one.calls]
    for one in quiet[:_MOST_SHOWN]:
        what = one.change.series.case if hasattr(one.change, "series") else counted(one.change.cases, "case")
        out.print(f"  {one.cause}: {what}: {one.reason}", markup=False, style="dim")
    if len(quiet) > _MOST_SHOWN:
        out.print(f"  … and {len(quiet) - _MOST_SHOWN} more that call nobody", style="dim")


def _preview(results: Path, channels: list[Channel], found: list[Notice]) -> bool:
    """Print what would be sent. Return whether something could not be rendered."""
    waiting, broken = due(results, channels, found)
    for line in broken:
        err.print(line, markup=False, style="yellow")
    failed = False
    for channel, notice in waiting:
        try:
            print(f"would send to {channel.name}:\n{channel.preview(notice)}\n")
        except DeliveryError as error:
            err.print(f"{channel.name}: {error}", markup=False, style="red")
            failed = True
    before = len(channels) * len(found) - len(waiting)
    out.print(f"dry run: {len(waiting)} to send, {before} sent before; --send sends", style="bold")
    return failed


def _send(results: Path, channels: list[Channel], found: list[Notice]) -> bool:
    """Send what is due. Return whether something failed."""
    done: list[DeliveryAttempt] = []
    for one in deliver(results, channels, found):
        done.append(one)
        if one.error:
            err.print(f"not sent: {one.error}; the next run tries again", markup=False, style="red")
        else:
            out.print(f"sent to {one.channel.name}: {one.notice.title} {one.where}".rstrip(), markup=False)
    failures = sum(bool(one.error) for one in done)
    out.print(f"{len(done) - failures} sent, {failures} {'channel' if failures == 1 else 'channels'} failed",
              style="bold")
    return failures > 0


def _write(path: Path, kind: str, results: Path, changes: ResultChanges, moved: list[Movement], report_url: str,
           send: bool) -> bool:
    """Write a file whole or not at all, or print what would be written. Return False if its library is missing."""
    from fpxbench.integrations.notify.hud import hud_records
    from fpxbench.integrations.notify.openmetrics import openmetrics
    from fpxbench.reports.history.feed import feed

    try:
        content = (feed(results, report_url) if kind == "atom"
                   else openmetrics(_newest(results, changes), moved).encode() if kind == "openmetrics"
                   else json.dumps(hud_records(_newest(results, changes)), indent=1).encode())
    except DeliveryError as error:
        err.print(str(error), markup=False, style="red")
        return False
    if not send:
        print(f"would write {path}:\n{content.decode()}")
        return True
    write_whole(path, content)
    out.print(f"wrote {path}", markup=False)
    return True


def _newest(results: Path, changes: ResultChanges) -> list[Record]:
    """Return the records of the newest build of each machine, channel and variant."""
    from fpxbench.records.store import Store, latest

    store: Store[Record] = Store(results)
    files = dict.fromkeys(store.file(machine, build) for machine, build in changes.newest_of)
    return [record for path in files if path.is_file() for record in latest(store.read(path)[0])]

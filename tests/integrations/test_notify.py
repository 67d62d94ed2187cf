"""`fpxbench notify`: what is sent, to whom, once; what is never sent; what is never printed."""

import json
import os
import sys
from xml.etree import ElementTree

import pytest
from commands import command
from local_server import FakeGitHub, serving
from nights import EAGER, FUSED, nightly, nights, slower
from sample_records import GPU, case

from fpxbench.integrations.notify.channels.webhook import Webhook
from fpxbench.integrations.notify.delivery import FILE, DeliveryError, masked
from fpxbench.integrations.notify.notice import notices
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Flag
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome, Interval
from fpxbench.regressions.movements import Cause, movements
from fpxbench.regressions.result_changes import find_changes

BAD = 28
SECRET = "xoxb-S3CRET"


def confirmation(of=FUSED, outcome=ConfirmationOutcome.CONFIRMED, **more) -> Confirmation:
    """Return a stored answer: `of` takes 10% longer since build `BAD`."""
    return Confirmation(case=of, metric="time", machine=GPU, good=nightly(BAD - 1), build=nightly(BAD),
                        outcome=outcome, message="+10.0% [9.1, 10.9]", started_at="2026-07-01T03:00:00+00:00",
                        time=Interval(value=1.1, low=1.09, high=1.11, level=0.9999, pairs=15), **more)


@pytest.fixture
def results(tmp_path):
    """Return records of 32 nights and one confirmed regression."""
    nights(tmp_path / "results", 32, edit=slower(1.1, BAD))
    Store(tmp_path / "results", Confirmation).append(confirmation())
    return tmp_path / "results"


def notify(results, *options: str, exit_code: int = 0, **environment: str) -> str:
    """Run the command, and return what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GITHUB_TOKEN", raising=False)
        for name, value in environment.items():
            patch.setenv(name, value)
        result = command("notify --results", results, "--timeline", results / "no-timeline", *options)
    if result.exception and not isinstance(result.exception, SystemExit):
        from fpxbench.cli.common import user_message

        assert exit_code == 2, result.exception
        return user_message(result.exception)
    assert result.exit_code == exit_code, result.output
    return result.output


def test_a_dry_run_prints_what_would_be_sent_and_sends_and_writes_nothing(results):
    with serving() as server:
        shown = notify(results, "--webhook", f"{server.url}/hook/{SECRET}", "--github", "some/repo",
                       "--github-api", server.url, "--atom", str(results / "feed.xml"), GITHUB_TOKEN=SECRET)
    assert not server.requests and not (results / FILE).exists() and not (results / "feed.xml").exists()
    assert FUSED.id in shown and "slower since 2.15.0.dev20260629" in shown and "dry run: 2 to send" in shown
    assert SECRET not in shown


def test_what_a_dry_run_prints_is_what_is_sent(results):
    with serving() as server:
        shown = notify(results, "--webhook", server.url)
        notify(results, "--webhook", server.url, "--send")
    [sent] = server.bodies()
    body = shown[shown.index("\n{"):shown.rindex("}") + 1]
    assert json.loads(body) == sent
    assert sent["notice"]["cause"] == "build" and sent["notice"]["cases"] == [FUSED.id]


def test_nothing_is_sent_twice_to_one_channel(results):
    with serving() as server, serving() as other:
        notify(results, "--webhook", server.url, "--send")
        notify(results, "--webhook", server.url, "--send")
        notify(results, "--webhook", server.url, "--webhook", other.url, "--send")
    assert len(server.requests) == len(other.requests) == 1


def test_what_could_not_be_delivered_is_sent_by_the_next_run(results):
    with serving(lambda request: (503, {})) as server:
        shown = notify(results, "--webhook", f"{server.url}/{SECRET}", "--send", exit_code=1)
        assert "answered 503" in shown and "the next run tries again" in shown
    address = server.url
    shown = notify(results, "--webhook", f"{address}/{SECRET}", "--send", exit_code=1)
    assert "cannot be reached" in shown and SECRET not in shown
    with serving() as server:
        notify(results, "--webhook", server.url, "--send")
    assert len(server.requests) == 1


def test_a_channel_that_fails_stops_no_other(results):
    with serving(lambda request: (500, {})) as broken, serving() as server:
        notify(results, "--webhook", broken.url, "--webhook", server.url, "--send", exit_code=1)
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed(results):
    with serving() as elsewhere, serving(lambda request: (302, {"to": elsewhere.url})) as server:
        assert "moved" in notify(results, "--webhook", server.url, "--send", exit_code=1)
    assert not elsewhere.requests


def test_an_issue_is_opened_once_and_updated_when_cases_come_in(results):
    github = FakeGitHub()
    with serving(github) as server:
        options = ("--github", "some/repo", "--github-api", server.url, "--send")
        assert "https://github.example/1" in notify(results, *options, GITHUB_TOKEN="t0ken")
        notify(results, *options, GITHUB_TOKEN="t0ken")
        assert server.bodies("PATCH") == []
        Store(results, Confirmation).append(confirmation(case("triton_fused", "e2m3-row")))
        notify(results, *options, GITHUB_TOKEN="t0ken")
    [issue] = github.entries
    assert "and 1 more" in issue["title"] and "e2m3-row" in issue["body"] and issue["labels"] == ["regression"]


def test_a_lost_state_file_opens_no_second_issue(results):
    github = FakeGitHub()
    github.entries = [{"number": n, "id": n, "body": "another", "title": ""} for n in range(2000, 2150)]
    with serving(github) as server:
        options = ("--github", "some/repo", "--github-api", server.url, "--send")
        notify(results, *options, GITHUB_TOKEN="t0ken")
        (results / FILE).unlink()
        notify(results, *options, GITHUB_TOKEN="t0ken")
    assert len(server.bodies("POST")) == 1 and len(server.bodies("PATCH")) == 1


def test_a_pull_request_gets_a_comment(results):
    github = FakeGitHub()
    with serving(github) as server:
        notify(results, "--github", "some/repo", "--pull-request", "7", "--github-api", server.url, "--send",
               GITHUB_TOKEN="t0ken")
    assert server.requests[-1].path == "/repos/some/repo/issues/7/comments"
    assert FUSED.id in github.entries[0]["body"]


def test_github_without_a_token_or_with_a_wrong_one_is_one_sentence(results):
    with serving(FakeGitHub()) as server:
        options = ("--github", "some/repo", "--github-api", server.url, "--send")
        assert "GITHUB_TOKEN is not set" in notify(results, *options, exit_code=1)
        shown = notify(results, *options, exit_code=1, GITHUB_TOKEN=SECRET)
    assert "401" in shown and "not accepted" in shown and SECRET not in shown


def test_a_template_makes_the_body_and_its_secrets_stay_out_of_a_dry_run(results, tmp_path):
    template = tmp_path / "pager.json"
    template.write_text('{"routing_key": {{ secret("PAGER_KEY") | tojson }}, "summary": {{ notice.title | tojson }}}')
    with serving() as server:
        options = ("--webhook", server.url, "--template", str(template))
        shown = notify(results, *options, PAGER_KEY=SECRET)
        assert '"routing_key": "***"' in shown and SECRET not in shown
        notify(results, *options, "--send", PAGER_KEY=SECRET)
        assert server.bodies()[0]["routing_key"] == SECRET
    assert SECRET not in (results / FILE).read_text()


@pytest.mark.parametrize(("template", "why"), [
    ("{{ notice.title }}", "makes no JSON"), ("{{ notice.nothing }}", "nothing"),
    ("{{ ''.__class__.mro() }}", "unsafe"),
])
def test_a_template_that_makes_no_json_or_reaches_out_of_its_sandbox_is_refused(results, template, why):
    moved = movements(results, find_changes(results))
    with pytest.raises(DeliveryError, match=why):
        Webhook("http://127.0.0.1:1", template).preview(notices(results, moved)[0])


def test_apprise_delivers_title_and_text(results):
    pytest.importorskip("apprise")
    with serving() as server:
        url = server.url.replace("http://", f"json://user:{SECRET}@")
        shown = notify(results, "--apprise", url)
        assert SECRET not in shown and FUSED.id in shown
        notify(results, "--apprise", "env:CHAT", "--send", CHAT=url)
        notify(results, "--apprise", url, "--send")
    [sent] = server.bodies()
    assert FUSED.id in sent["title"] and "Confirmed by running both builds again" in sent["message"]


def test_without_apprise_its_channel_is_missing_and_the_others_go_on(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "apprise", None)
    with serving() as server:
        shown = notify(results, "--apprise", f"slack://{SECRET}", "--webhook", server.url, "--send", exit_code=1)
    assert "pip install 'fpxbench[notify]'" in shown and len(server.requests) == 1


@pytest.mark.parametrize("url", [f"https://user:{SECRET}@host/a?b={SECRET}", f"slack://{SECRET}/b/c",
                                 f"https://host:99999999/{SECRET}", f"json://{SECRET}@host"])
def test_a_masked_url_keeps_no_secret_and_tells_two_apart(url):
    assert SECRET not in masked(url) and "***" in masked(url)
    assert masked(url) != masked(url + "x")


def test_a_url_that_is_none_is_refused_without_being_shown(results):
    message = notify(results, "--webhook", f"hooks.example/{SECRET}", exit_code=2)
    assert "not an http" in message and SECRET not in message


def test_no_records_is_an_error_and_no_silence(tmp_path):
    (tmp_path / "results").mkdir()
    assert "no records" in notify(tmp_path / "results", "--github", "some/repo", exit_code=2)


def test_a_damaged_state_file_is_reported_and_costs_its_own_line_only(results):
    with serving() as server:
        notify(results, "--webhook", server.url, "--send")
        with open(results / FILE, "a") as file:
            file.write('{"channel": 1')
        assert "not a delivery" in notify(results, "--webhook", server.url)
        Store(results, Confirmation).append(confirmation(EAGER))
        notify(results, "--webhook", server.url, "--send")
        notify(results, "--webhook", server.url, "--send")
    assert len(server.requests) == 2


def causes(results) -> dict[str, Cause]:
    """Return the cause of each case that changed."""
    return {getattr(one.change, "series", one.change).model_dump().get("case", "dense"): one.cause
            for one in movements(results, find_changes(results))}


def test_a_change_that_nobody_ran_again_calls_nobody(tmp_path):
    nights(tmp_path, 32, edit=slower(1.2, BAD))
    assert causes(tmp_path) == {FUSED.id: Cause.UNCONFIRMED}
    assert not any(one.calls for one in movements(tmp_path, find_changes(tmp_path)))


def test_another_method_of_timing_calls_nobody(tmp_path):
    slow = slower(1.2, BAD)

    def edit(night, one):
        one = slow(night, one)
        timing = one.timing.model_copy(update={"method": 1 + (night >= BAD)})
        return one.model_copy(update={"timing": timing}) if one.case.id == FUSED.id else one

    nights(tmp_path, 32, edit=edit)
    assert causes(tmp_path) == {FUSED.id: Cause.SUITE}


def test_a_machine_that_got_slower_calls_nobody(tmp_path):
    nights(tmp_path, 32, edit=slower(1.2, BAD, dense=1.2))
    assert causes(tmp_path) == {"dense": Cause.MACHINE}


def edited(since: int, **fields):
    """Return an edit: the case is 20% slower since a build, and its record has other `fields`."""
    slow = slower(1.2, since)

    def edit(night, one):
        one = slow(night, one)
        return one.model_copy(update=fields) if night >= since and one.case.id == FUSED.id else one

    return edit


@pytest.mark.parametrize(("fields", "cause"), [
    ({"machine": GPU.model_copy(update={"facts": {"driver": "590.1"}})}, Cause.MACHINE),
    ({"flags": [Flag.THROTTLED]}, Cause.MACHINE),
    ({"source": "edited"}, Cause.SUITE),
])
def test_what_else_changed_with_the_build_is_the_cause(tmp_path, fields, cause):
    before = GPU.model_copy(update={"facts": {"driver": "580.2"}})
    fields = {"machine": before, **fields}
    nights(tmp_path, 32, edit=edited(BAD, **fields), machine=before)
    assert causes(tmp_path)[FUSED.id] is cause


@pytest.mark.parametrize(("outcome", "cause"), [
    (ConfirmationOutcome.CONFIRMED, Cause.BUILD), (ConfirmationOutcome.REFUTED, Cause.NOISE),
    (ConfirmationOutcome.UNDECIDED, Cause.UNCONFIRMED)])
def test_a_confirmation_decides(tmp_path, outcome, cause):
    nights(tmp_path, 32, edit=slower(1.2, BAD))
    [suspect] = find_changes(tmp_path).suspects
    Store(tmp_path, Confirmation).append(confirmation(outcome=outcome, suspect=suspect.id))
    assert causes(tmp_path)[FUSED.id] is cause
    assert bool(notices(tmp_path, movements(tmp_path, find_changes(tmp_path)))) is (cause is Cause.BUILD)


def test_what_a_later_build_fixed_is_not_sent(tmp_path):
    def edit(night, one):
        return slower(1.2, BAD)(night, one) if night < 40 else one

    nights(tmp_path, 46, edit=edit)
    worse = next(one for one in find_changes(tmp_path).suspects if one.change > 0)
    Store(tmp_path, Confirmation).append(confirmation(suspect=worse.id))
    assert not notices(tmp_path, movements(tmp_path, find_changes(tmp_path)))


def crashing(night, one):
    if night < BAD or one.case.id != FUSED.id:
        return one
    return one.model_copy(update={"timing": None, "verdict": Verdict(
        status=Status.CRASH, kind=Kind.COMPILER_ABORT, signal="SIGABRT", summary="died by SIGABRT")})


def test_a_changed_verdict_is_sent_before_it_was_run_again_only_if_asked_for(tmp_path):
    nights(tmp_path, 32, edit=crashing)
    moved = movements(tmp_path, find_changes(tmp_path))
    assert not notices(tmp_path, moved)
    [notice] = notices(tmp_path, moved, unconfirmed_events=True)
    assert notice.what == "crash (compiler_abort)" and not notice.confirmed and "Not run again yet" in notice.body


def test_openmetrics_can_be_parsed_with_every_odd_label(results, tmp_path):
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    odd = GPU.model_copy(update={"device": 'odd "device"\\ of\ntwo lines'})
    nights(results, 1, machine=odd, first=40)
    file = tmp_path / "fpxbench.prom"
    notify(results, "--openmetrics", str(file), "--send")
    families = {family.name: family for family in parser.text_string_to_metric_families(file.read_text())}
    samples = families["fpxbench_case_time_seconds"].samples
    assert {sample.labels["device"] for sample in samples} >= {odd.device}
    assert all(0 < sample.value < 1 for sample in samples)
    assert {sample.labels["cause"] for sample in families["fpxbench_movements"].samples}
    assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []


def test_hud_gets_a_metric_each_and_no_time_of_a_case_that_is_not_right(tmp_path):
    nights(tmp_path / "results", 30, edit=crashing)
    notify(tmp_path / "results", "--hud", str(tmp_path / "hud.json"), "--send")
    entries = json.loads((tmp_path / "hud.json").read_text())
    of = {(entry["model"]["backend"], entry["metric"]["name"]): entry for entry in entries}
    assert of["triton_fused", "is_right"]["metric"]["benchmark_values"] == [0.0]
    assert ("triton_fused", "latency_us") not in of
    latency = of["eager_upcast", "latency_us"]
    assert latency["benchmark"]["name"] == "fpxbench" and latency["schema_version"] == "v3"
    assert latency["dependencies"]["pytorch"]["version"] == nightly(29).torch
    assert latency["runners"][0]["gpu_info"] == GPU.device


def test_the_feed_is_valid_and_the_same_for_the_same_records(results, tmp_path):
    Store(results, Confirmation).append(confirmation(EAGER, evidence=Verdict(
        status=Status.CRASH, kind=Kind.COMPILER_ABORT, signal="SIGABRT", summary="<b>&\x1b[31m", log_tail="\x00\x1b]")))
    one, two = tmp_path / "one.xml", tmp_path / "two.xml"
    for file in (one, two):
        notify(results, "--atom", str(file), "--send", "--report-url", "https://example.org/report")
    assert one.read_bytes() == two.read_bytes()
    name = "{http://www.w3.org/2005/Atom}"
    root = ElementTree.fromstring(one.read_bytes())
    assert all(root.find(name + each) is not None for each in ("id", "title", "updated", "author"))
    entries = root.findall(name + "entry")
    assert len(entries) == 2 and len({entry.findtext(name + "id") for entry in entries}) == 2
    assert entries[0].find(name + "link").get("href") == "https://example.org/report/regressions.html"


def test_a_folder_that_cannot_be_written_leaves_the_old_file(results, tmp_path):
    missing = tmp_path / "no" / "such" / "feed.xml"
    assert "No such file" in notify(results, "--atom", str(missing), "--send", exit_code=2)
    assert os.listdir(tmp_path) == ["results"]

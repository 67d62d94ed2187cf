"""The timeline is filled from package indexes: builds are added, their metadata is read, no failure loses anything."""

import re
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import date, timedelta

import pytest
from local_index import ELSEWHERE, GIT, Listed, LocalIndex, html_page, json_page, send

from fpxbench.builds.index.fetch import Fetcher
from fpxbench.builds.index.listing import extra_location, index_location
from fpxbench.builds.index.pip_settings import PipSettings
from fpxbench.builds.timeline import Timeline, TimelineError, commit_hash
from fpxbench.builds.timeline.sync import ALL_BUILDS, SyncFilter, parse_since, sync
from fpxbench.records.record import Build

SETTINGS = PipSettings(timeout_s=60, retries=0)
RELEASES = (Listed("2.13.0", day="2026-07-08"), Listed("2.14.1", day="2026-09-30", triton="triton~=3.8.0"))


def nightly(day, **more):
    return Listed(f"2.15.0.dev{day:%Y%m%d}+cu130", triton="triton==3.9.0+git1a2b3c4d", **more)


NIGHTLIES = [nightly(date(2026, 11, day)) for day in (18, 19, 20)]


@pytest.fixture
def timeline(tmp_path):
    return Timeline(tmp_path / "timeline")


def run(timeline, *indexes, which=ALL_BUILDS, settings=SETTINGS, places=None):
    return sync(timeline, places or [index_location(index.url) for index in indexes], Fetcher(settings), which)


def tags(timeline):
    return [entry.tag for entry in timeline.entries()]


# What is added, and its metadata.
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "html"])
def test_every_release_that_an_index_lists_is_added_with_its_triton(timeline, form):
    with LocalIndex(*RELEASES, form=form) as index:
        result = run(timeline, index)
    assert result.added == tags(timeline) == ["2.13.0", "2.14.1"] and not result.problems
    assert [entry.own_triton for entry in timeline.entries()] == ["3.7.1", "3.8.0"]
    assert [entry.key for entry in timeline.entries()] == [
        commit_hash(Build(torch=version, channel="release", variant="cpu")) for version in ("2.13.0", "2.14.1")]


def test_a_release_is_dated_by_its_first_upload_and_not_by_this_machine(timeline):
    with LocalIndex(Listed("2.13.0", day="2026-07-09"), Listed("2.13.0", ELSEWHERE, day="2026-07-08")) as index:
        run(timeline, index)
    (entry,) = timeline.entries()
    assert (entry.day, entry.dated) == ("2026-07-08", True)


def test_where_the_page_gives_no_dates_the_servers_clock_says_by_when_a_release_was_there(timeline):
    with LocalIndex(Listed("2.13.0"), form="html") as index:
        run(timeline, index)
    (entry,) = timeline.entries()
    assert (entry.seen, entry.dated) == ("2026-11-20", False)


def test_a_mirror_that_dates_everything_1970_gives_no_date(timeline):
    with LocalIndex(Listed("2.13.0", day="1970-01-01")) as index:
        run(timeline, index)
    assert not timeline.entries()[0].dated


def test_a_nightly_is_dated_by_its_version(timeline):
    with LocalIndex(*NIGHTLIES, form="html") as index:
        run(timeline, index)
    assert [(entry.tag, entry.day) for entry in timeline.entries()] == [
        (f"nightly-202611{day}", f"2026-11-{day}") for day in (18, 19, 20)]


def test_pins_say_which_wheel_which_triton_and_where(timeline):
    with LocalIndex(NIGHTLIES[0]) as index:
        run(timeline, places=[extra_location(index.url)])
        (entry,) = timeline.entries()
    assert entry.pins("cu130").requirements == (
        f"--extra-index-url {index.url}\ntorch==2.15.0.dev20261118+cu130\ntriton==3.9.0+git1a2b3c4d\n")
    assert entry.pins("cpu") is None


def test_variants_of_one_version_are_one_build_and_share_its_triton(timeline):
    """The CPU wheel asks for no Triton, and gets the one that the build's other wheel asks for."""
    with LocalIndex(RELEASES[0], Listed("2.13.0+cpu", triton=None)) as index:
        run(timeline, index)
    (entry,) = timeline.entries()
    assert {name: pins.requirements for name, pins in entry.variants.items()} == {
        "default": "torch===2.13.0\ntriton==3.7.1\n", "cpu": "torch==2.13.0+cpu\ntriton==3.7.1\n"}


def test_a_triton_of_an_unreleased_commit_is_not_asked_of_another_variants_index(timeline):
    with LocalIndex(NIGHTLIES[0], Listed("2.15.0.dev20261118+cpu", triton=None)) as index:
        run(timeline, index)
    assert timeline.entries()[0].pins("cpu").triton is None


def test_markers_are_judged_for_the_wheel_and_not_for_this_machine(timeline):
    asked = 'triton==2.3.1; platform_machine == "aarch64" and python_version < "3.9"'
    with LocalIndex(Listed("2.3.1", "cp38-cp38-manylinux2014_aarch64", triton=asked)) as index:
        run(timeline, index)
    assert timeline.entries()[0].own_triton == "2.3.1"


def test_what_the_commit_shows_are_files_that_pip_reads(timeline):
    with LocalIndex(RELEASES[1]) as index:
        run(timeline, index)
    shown = subprocess.run(["git", f"--git-dir={timeline.path}", "show", "2.14.1:requirements.txt"],
                           capture_output=True, text=True).stdout
    assert shown == "torch===2.14.1\ntriton==3.8.0\n"
    root = subprocess.run(["git", f"--git-dir={timeline.path}", "--no-replace-objects", "show",
                           "2.14.1:requirements.txt"],
                          capture_output=True, text=True).stdout
    assert root == "torch==2.14.1\n"


def test_without_a_metadata_file_the_wheels_own_is_read_by_parts_and_tells_the_commit_too(timeline):
    big = Listed("2.14.1", metadata=False, padding=300_000, triton="triton~=3.8.0")
    with LocalIndex(big) as index:
        run(timeline, index)
    (entry,) = timeline.entries()
    assert (entry.own_triton, entry.git) == ("3.8.0", GIT)
    assert [asked.rpartition(" ")[2] for asked in index.asked] == ["/simple/torch/", "bytes=-65536"]


def test_a_server_that_gives_whole_files_only_is_not_asked_for_them_and_not_asked_again(timeline):
    big = Listed("2.14.1", metadata=False, padding=300_000)
    with LocalIndex(big, ranges=False) as index:
        first, second = run(timeline, index), run(timeline, index)
    assert (first.asked, second.asked) == (1, 0) and not first.problems
    assert timeline.entries()[0].own_triton is None


def test_upstream_commits_are_read_where_they_are_asked_for(timeline):
    with LocalIndex(*RELEASES) as index:
        run(timeline, index)
        assert {entry.git for entry in timeline.entries()} == {None}
        run(timeline, index, which=SyncFilter(git=True))
        assert {entry.git for entry in timeline.entries()} == {GIT}
        assert run(timeline, index, which=SyncFilter(git=True)).asked == 0


@pytest.mark.parametrize(("which", "added"), [
    (SyncFilter(since=parse_since("2026-11-19")), ["nightly-20261119", "nightly-20261120"]),
    (SyncFilter(since=parse_since("2.14")), ["2.14.1", "nightly-20261118", "nightly-20261119", "nightly-20261120"]),
    (SyncFilter(keep=1), ["2.14.1", "nightly-20261120"]),
    (SyncFilter(channels=frozenset({"release"})), ["2.13.0", "2.14.1"]),
    (SyncFilter(channels=frozenset({"nightly"}), keep=2), ["nightly-20261119", "nightly-20261120"]),
])
def test_only_builds_that_pass_the_filter_are_added(timeline, which, added):
    with LocalIndex(*RELEASES, *NIGHTLIES) as index:
        run(timeline, index, which=which)
    assert tags(timeline) == added


def test_the_newest_are_asked_first(timeline):
    with LocalIndex(*NIGHTLIES) as index:
        run(timeline, index)
    assert re.findall(r"dev(\d+).*metadata", "\n".join(index.asked)) == ["20261120", "20261119", "20261118"]


def test_a_sync_of_nothing_new_reads_the_page_and_nothing_else(timeline):
    with LocalIndex(*RELEASES, *NIGHTLIES) as index:
        run(timeline, index)
        index.asked.clear()
        result = run(timeline, index)
    assert index.asked == ["GET /simple/torch/"]
    assert (result.added, result.vanished, result.returned, result.asked) == ([], [], [], 0)


# Builds that come and go.
# ------------------------------------------------------------------------------------------------


def test_a_build_that_vanished_stays_marked_and_comes_back(timeline):
    with LocalIndex(*NIGHTLIES) as index:
        run(timeline, index)
        index.wheels = NIGHTLIES[1:]
        assert run(timeline, index).vanished == ["nightly-20261118"]
        gone = timeline.find("nightly-20261118")
        assert gone.vanished == "2026-11-20" and gone.marks == ["gone from the index since 2026-11-20"]
        assert gone.own_triton == "3.9.0+git1a2b3c4d"
        assert run(timeline, index).vanished == []
        index.wheels = NIGHTLIES
        assert run(timeline, index).returned == ["nightly-20261118"]
        assert not timeline.find("nightly-20261118").vanished
    assert tags(timeline) == ["nightly-20261118", "nightly-20261119", "nightly-20261120"]


def test_a_build_that_another_index_still_has_has_not_vanished(timeline):
    with LocalIndex(*RELEASES) as one, LocalIndex(*RELEASES) as other:
        run(timeline, one, other)
        one.wheels = list(RELEASES[:1])
        assert run(timeline, one, other).vanished == []


def test_an_index_that_suddenly_lists_nothing_is_a_problem_and_marks_nothing(timeline):
    with LocalIndex(*RELEASES) as index:
        run(timeline, index)
        index.wheels = []
        result = run(timeline, index)
    assert result.vanished == [] and not any(entry.marks for entry in timeline.entries())
    assert "lists no build of PyTorch, but used to list 2" in " ".join(result.problems)


def test_yanked_wheels_a_missing_wheel_and_a_missing_hash_are_marked(timeline):
    wheels = [Listed("2.10.0", yanked=True), Listed("2.11.0", ELSEWHERE), Listed("2.12.0", sha256=False),
              Listed("2.13.0", yanked=True), Listed("2.13.0", ELSEWHERE)]
    with LocalIndex(*wheels) as index:
        run(timeline, index)
    marks = {entry.tag: entry.marks for entry in timeline.entries()}
    assert marks == {"2.10.0": ["yanked"],
                     "2.11.0": [f"no wheel for Python {sys.version_info[0]}.{sys.version_info[1]} here"],
                     "2.12.0": ["listed without a hash"], "2.13.0": []}


def test_a_replaced_wheel_is_reported(timeline):
    with LocalIndex(NIGHTLIES[0]) as index:
        run(timeline, index)
        index.wheels = [nightly(date(2026, 11, 18), padding=9)]
        result = run(timeline, index)
    assert "has replaced torch-2.15.0.dev20261118+cu130" in " ".join(result.remarks)


def test_a_nightly_that_is_removed_before_its_metadata_is_read_is_added_and_reported(timeline):
    with LocalIndex(*NIGHTLIES) as index:
        index.faults["dev20261119.*(metadata|whl)"] = lambda request: send(request, 404, b"")
        result = run(timeline, index)
    assert "nightly-20261119: the index does not have torch-2.15.0.dev20261119" in result.remarks[0]
    assert [entry.own_triton for entry in timeline.entries()] == ["3.9.0+git1a2b3c4d", None, "3.9.0+git1a2b3c4d"]


def test_invalid_wheel_names_are_skipped_and_reported(timeline):
    odd = ["torch-2.x.y-cp311-cp311-linux_x86_64.whl", "torch-2.13.0-cp311.whl",
           "torch-2.13.0-cp311-cp311-\x1b[31mlinux.whl",
           "torch-2.15.0.dev20261399-" + ELSEWHERE + ".whl", "torch-2.15.0a0+gitcf30153-" + ELSEWHERE + ".whl"]
    with LocalIndex(RELEASES[0], *(Listed("2.13.0", name=name) for name in odd)) as index:
        result = run(timeline, index)
    assert tags(timeline) == ["2.13.0"] and not result.problems
    unreadable, neither = result.remarks
    assert "'torch-2.x.y-cp311-cp311-linux_x86_64.whl' and 2 more" in unreadable
    assert "dev20261399" in neither and "and 1 more" in neither
    assert "\x1b" not in "".join(result.remarks)


# Failures.
# --------------------------------------------------------------------------------------------------------


def broken_off(body, content_type, announced):
    def answer(request):
        request.send_response(200)
        request.send_header("Content-Type", content_type)
        request.send_header("Content-Length", str(announced)) if announced else request.send_header("Connection",
                                                                                                    "close")
        request.end_headers()
        request.wfile.write(body)
        request.close_connection = True
    return answer


def silent(request):
    time.sleep(3)


def dripping(request):
    request.send_response(200)
    request.send_header("Content-Length", "100000")
    request.end_headers()
    for _ in range(100):
        request.wfile.write(b" ")
        request.wfile.flush()
        time.sleep(0.1)


JSON, HTML = json_page(list(RELEASES)), html_page(list(RELEASES))
FAULTS = {
    "server error": (lambda request: send(request, 503, b"maintenance"), "answers HTTP 503"),
    "forbidden": (lambda request: send(request, 403, b""), "answers HTTP 403: it needs credentials"),
    "silent": (silent, "did not answer within 2 s"),
    "dripping": (dripping, "is too slow"),
    "half JSON": (broken_off(JSON[:-40], "application/vnd.pypi.simple.v1+json", 0), "broke off in the middle"),
    "half JSON, cut connection": (broken_off(JSON[:-40], "application/vnd.pypi.simple.v1+json", len(JSON)),
                                  "broke off in the middle"),
    "half HTML": (broken_off(HTML[:-40], "text/html", 0), "broke off in the middle"),
    "half HTML, cut connection": (broken_off(HTML[:-40], "text/html", len(HTML)), "broke off in the middle"),
    "other JSON": (lambda request: send(request, 200, b'{"files": 3}', "application/vnd.pypi.simple.v1+json"),
                   "not the page of a package index"),
    "newer JSON": (lambda request: send(request, 200, JSON.replace(b'"1.1"', b'"9.0"'),
                                        "application/vnd.pypi.simple.v1+json"),
                   "not the page of a package index"),
    "a picture": (lambda request: send(request, 200, b"\x89PNG", "image/png"),
                  "is image/png, not a page of a package index"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_index_in_trouble_is_one_sentence_loses_nothing_and_the_next_sync_goes_on(timeline, fault):
    answer, message = FAULTS[fault]
    with LocalIndex(RELEASES[0]) as index, LocalIndex(*NIGHTLIES) as other:
        run(timeline, index)
        before = timeline.entries()
        index.faults["^/simple/"] = answer
        fetcher = Fetcher(PipSettings(timeout_s=2, retries=0))
        fetcher._total_s = 4.0
        result = sync(timeline, [index_location(index.url), index_location(other.url)], fetcher)
        (problem,) = result.problems
        assert message in problem and index.url in problem and "\n" not in problem
        assert result.added == ["nightly-20261118", "nightly-20261119",
                                "nightly-20261120"], "the other index is read all the same"
        assert [entry for entry in timeline.entries() if entry.channel == "release"] == before
        index.faults.clear()
        index.wheels = list(RELEASES)
        assert run(timeline, index).added == ["2.14.1"]


def test_an_index_that_is_down_is_one_sentence(timeline):
    with LocalIndex() as index:
        pass
    (problem,) = run(timeline, index).problems
    assert problem == f"{index.url}/torch/ cannot be reached: the connection was refused"


def test_no_index_that_has_pytorch_is_one_sentence(timeline):
    with LocalIndex() as index:
        index.faults["^/simple/"] = lambda request: send(request, 404, b"")
        assert "lists a wheel of PyTorch" in run(timeline, index).problems[0]
        assert "does not exist (HTTP 404)" in run(timeline, places=[extra_location(index.url)]).problems[0]


def test_a_server_that_stops_answering_is_given_up_on_and_what_was_read_is_kept(timeline):
    wheels = [nightly(date(2026, 11, 20) - timedelta(days=number)) for number in range(10)]
    with LocalIndex(*wheels) as index:
        index.faults["dev202611(1[0-8]).*metadata"] = lambda request: send(request, 503, b"")
        result = run(timeline, index)
        assert len(tags(timeline)) == 10
        assert [entry.tag for entry in timeline.entries() if entry.own_triton] == ["nightly-20261119",
                                                                                   "nightly-20261120"]
        problem, *_ = result.problems
        assert "the Triton of 3 builds could not be read; 5 more were not tried; the next sync tries again" in problem
        index.faults.clear()
        assert run(timeline, index).asked == 8
    assert all(entry.own_triton for entry in timeline.entries())


def test_metadata_that_is_not_what_the_page_announced_is_not_believed(timeline):
    with LocalIndex(*RELEASES) as index:
        index.faults["2.13.0.*metadata"] = lambda request: send(request, 200,
                                                                b"Name: torch\nRequires-Dist: triton==6.6.6\n")
        result = run(timeline, index)
    assert "differs from the index's hash" in result.problems[0]
    assert timeline.find("2.13.0").own_triton is None


@pytest.mark.parametrize("data", [b"PK\x03\x04 half a wheel", b"", b"PK\x05\x06" + b"\0" * 18])
def test_a_partial_wheel_is_reported(timeline, data):
    half = Listed("2.13.0", metadata=False)
    half.data = data
    with LocalIndex(half, RELEASES[1]) as index:
        result = run(timeline, index)
    assert "2.13.0" in result.problems[0] and "\n" not in result.problems[0]
    assert tags(timeline) == ["2.13.0", "2.14.1"]


def test_two_syncs_at_once_hold_everything(timeline):
    with LocalIndex(*RELEASES) as one, LocalIndex(*NIGHTLIES) as other:
        threads = [threading.Thread(target=run, args=(Timeline(timeline.path), index)) for index in (one, other) * 3]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tags(timeline) == ["2.13.0", "2.14.1", "nightly-20261118", "nightly-20261119", "nightly-20261120"]
    assert all(entry.own_triton for entry in timeline.entries())
    subprocess.run(["git", f"--git-dir={timeline.path}", "fsck", "--strict", "--no-dangling"], check=True,
                   capture_output=True)


def test_a_sync_that_is_interrupted_keeps_what_it_learnt(timeline):
    def interrupt(done, total, tag):
        if done == 2:
            raise KeyboardInterrupt

    with LocalIndex(*NIGHTLIES) as index:
        with pytest.raises(KeyboardInterrupt):
            sync(timeline, [index_location(index.url)], Fetcher(SETTINGS), progress=interrupt)
        assert [entry.own_triton is not None for entry in timeline.entries()] == [False, True, True]
        assert run(timeline, index).asked == 1


def test_a_disk_that_takes_no_more_is_one_sentence_and_loses_nothing(timeline):
    """No file may grow beyond 1 kB: git's pack cannot be written."""
    with LocalIndex(*RELEASES) as index:
        run(timeline, index, which=SyncFilter(keep=1))
        before = timeline.entries()
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(TimelineError, match="The timeline is unchanged") as caught:
                run(timeline, index)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert "\n" not in str(caught.value)
        assert timeline.entries() == before
        run(timeline, index)
    assert tags(timeline) == ["2.13.0", "2.14.1"]
    assert not list((timeline.path / "objects/pack").glob("tmp_*"))


def test_a_git_that_was_killed_in_the_middle_does_not_stop_the_next_sync(timeline):
    with LocalIndex(*RELEASES) as index:
        run(timeline, index, which=SyncFilter(keep=1))
        for name in ("HEAD.lock", "packed-refs.lock", "refs/tags/2.13.0.lock"):
            (timeline.path / name).parent.mkdir(parents=True, exist_ok=True)
            (timeline.path / name).touch()
        run(timeline, index)
    assert tags(timeline) == ["2.13.0", "2.14.1"]


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_after_many_nightlies_one_more_asks_the_index_for_two_pages(timeline, count):
    wheels = [nightly(date(2024, 1, 1) + timedelta(days=number)) for number in range(count)]
    with LocalIndex(*wheels[:-1]) as index:
        assert len(run(timeline, index).added) == count - 1
        index.wheels = wheels
        index.asked.clear()
        assert run(timeline, index).added == [f"nightly-{date(2024, 1, 1) + timedelta(days=count - 1):%Y%m%d}"]
    assert len(index.asked) == 2

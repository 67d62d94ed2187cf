"""A build has one hash, everywhere and for good, and builds stand in the order in which they came out."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from fpxbench.record import Build
from fpxbench.timeline import Timeline, TimelineError, commit_hash, identity, tag_name


def build(torch, channel="release", **more):
    return Build(torch=torch, channel=channel, variant=more.pop("variant", "cpu"), **more)


R9, R13, R14 = build("2.9.0"), build("2.13.0"), build("2.14.1")
N18 = build("2.15.0.dev20261118+cu130", "nightly", date="2026-11-18")
N20 = build("2.15.0.dev20261120+cu130", "nightly", date="2026-11-20")
OWN = build("2.15.0a0+gitcf30153", "source", git="cf30153c4c131c8164ee7798e5022d810682e2cb", triton="3.9.0")


def git(path, *args):
    done = subprocess.run(["git", f"--git-dir={path}", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def timeline(path, *builds, today="2026-11-23"):
    made = Timeline(path)
    made.hold(builds, today=today)
    return made


def test_hashes_are_pinned_since_stored_results_are_filed_under_them():
    assert commit_hash(R13) == "185f0a691eae321dac5e88a4312fb676d2438a49"
    assert commit_hash(N20) == "ea6915a128fdc936477171bc781e1ef68f944d87"
    assert commit_hash(OWN) == "96e6da4603da34656d72501e6a59d0028b1a58c4"


def test_a_hash_is_the_commit_that_git_stores(tmp_path):
    for known in (R13, N20, OWN):
        path = tmp_path / tag_name(known)
        timeline(path, known)
        assert git(path, "rev-parse", f"{tag_name(known)}^{{commit}}") == commit_hash(known)
        git(path, "fsck", "--strict", "--no-dangling")


def test_clock_user_and_configuration_do_not_reach_the_hash(tmp_path, monkeypatch):
    here = git(timeline(tmp_path / "here", R13, today="2026-11-23").path, "rev-parse", "release")
    config = tmp_path / "gitconfig"
    config.write_text(
        "[user]\nname = Somebody Else\nemail = else@example.com\n[commit]\ngpgsign = true\n[i18n]\ncommitEncoding = latin1\n"
        "[core]\nautocrlf = true\n[init]\ndefaultBranch = trunk\ndefaultObjectFormat = sha256\n[gc]\nauto = 0\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    config.rename(tmp_path / ".gitconfig")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    monkeypatch.setenv("GIT_AUTHOR_DATE", "2001-01-01T00:00:00")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    there = timeline(tmp_path / "there", R13, today="1999-12-31")
    monkeypatch.delenv("GIT_DIR")
    assert git(there.path, "rev-parse", "release") == here == commit_hash(R13)


def test_what_a_build_was_made_for_and_what_is_learnt_of_it_do_not_reach_the_hash():
    assert commit_hash(build("2.13.0+cpu")) == commit_hash(build("2.13.0+cu130", variant="cu130", triton="3.7.1", date="2026-07-08"))
    assert commit_hash(build("2.15.0.dev20261120+cpu", "nightly")) == commit_hash(N20)


def test_builds_that_differ_have_hashes_that_differ():
    others = [OWN.model_copy(update=change) for change in ({"git": "0" * 40}, {"triton": "3.8.0"}, {"torch": "2.15.0a0+git0000000"})]
    everyone = [R9, R13, R14, N18, N20, OWN, *others]
    assert len({commit_hash(one) for one in everyone}) == len(everyone)
    assert len({tag_name(one) for one in everyone}) == len(everyone)


def test_a_build_inserted_later_moves_no_hash(tmp_path):
    made = timeline(tmp_path / "t", R9, R14, N20, OWN)
    before = {entry.tag: entry.key for entry in made.entries()}
    made.hold([R13, N18])
    after = {entry.tag: entry.key for entry in made.entries()}
    assert before.items() < after.items()
    assert git(made.path, "rev-list", "release").split() == [commit_hash(one) for one in (R14, R13, R9)]
    assert git(made.path, "rev-list", "nightly").split() == [commit_hash(one) for one in (N20, N18)]
    assert git(made.path, "rev-list", "source").split() == [commit_hash(OWN)]
    assert git(made.path, "rev-list", f"{tag_name(R13)}^!").split() == [commit_hash(R13)]


def test_the_order_does_not_depend_on_the_order_of_arrival(tmp_path):
    builds = [R9, R13, R14, N18, N20]
    refs = set()
    for number, order in enumerate((builds, builds[::-1], [R13, N20, R9, N18, R14])):
        made = Timeline(tmp_path / str(number))
        for one in order:
            made.hold([one], today="2026-11-23")
        assert [entry.tag for entry in made.entries()] == ["2.9.0", "2.13.0", "2.14.1", "nightly-20261118", "nightly-20261120"]
        refs.add(git(made.path, "rev-list", "release"))
    assert len(refs) == 1


def test_author_and_committer_date_are_the_builds_date(tmp_path):
    made = timeline(tmp_path / "t", N20)
    assert git(made.path, "log", "-1", "--format=%at %ct", "nightly") == "1795132800 1795132800"


def test_a_release_whose_date_is_unknown_stands_before_every_later_version(tmp_path):
    made = timeline(tmp_path / "t", build("2.14.1", date="2026-11-01"), today="2026-11-23")
    made.hold([R9, R13], today="2026-11-23")
    assert [(entry.tag, entry.day, entry.dated) for entry in made.entries()] == [
        ("2.9.0", "2026-10-30", False), ("2.13.0", "2026-10-31", False), ("2.14.1", "2026-11-01", True)]


def test_a_date_learnt_later_moves_the_commit_and_keeps_its_hash(tmp_path):
    made = timeline(tmp_path / "t", R13)
    assert "date" not in json.loads(git(made.path, "show", "release:build.json"))
    made.hold([build("2.13.0+cu130", date="2026-07-08")])
    assert git(made.path, "log", "-1", "--format=%H %as", "release") == f"{commit_hash(R13)} 2026-07-08"
    assert json.loads(git(made.path, "show", "release:build.json"))["date"] == "2026-07-08"
    made.hold([R13], today="2026-12-24")
    assert git(made.path, "log", "-1", "--format=%as", "release") == "2026-07-08"


def test_a_commit_holds_the_identity_and_the_pin(tmp_path):
    made = timeline(tmp_path / "t", N20)
    assert json.loads(git(made.path, "--no-replace-objects", "show", "nightly:build.json")) == identity(N20)
    assert git(made.path, "show", "nightly:requirements.txt") == "torch==2.15.0.dev20261120"


def test_holding_what_is_held_writes_nothing(tmp_path):
    made = timeline(tmp_path / "t", R13, N20)
    before = sorted((path, path.stat().st_mtime_ns) for path in made.path.rglob("*") if path.is_file() and path.suffix != ".lock")
    made.hold([R13, N20], today="2027-01-01")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in made.path.rglob("*") if path.is_file() and path.suffix != ".lock")


def test_several_processes_may_hold_at_once(tmp_path):
    nightlies = [build(f"2.15.0.dev202611{day:02}", "nightly", date=f"2026-11-{day:02}") for day in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: Timeline(tmp_path / "t").hold([one]), nightlies))
    assert git(tmp_path / "t", "rev-list", "nightly").split() == [commit_hash(one) for one in reversed(nightlies)]


def test_head_is_the_build_that_is_pointed_at(tmp_path):
    made = timeline(tmp_path / "t", R13, R14, N20)
    made.point_at(R13)
    assert git(made.path, "rev-parse", "HEAD") == commit_hash(R13)
    assert git(made.path, "rev-parse", "release") == commit_hash(R14)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_path_that_holds_something_else_is_left_alone(tmp_path, what):
    path = tmp_path / "mine"
    if what == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    else:
        path.write_text("mine")
    with pytest.raises(TimelineError, match="mine is not a timeline"):
        Timeline(path).hold([R13])
    assert sorted(tmp_path.rglob("*")) == [path] if what == "file" else [path, path / "notes.txt"]


def test_without_git_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TimelineError, match="install git"):
        Timeline(tmp_path / "t").hold([R13])

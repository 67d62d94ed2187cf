"""A build has one hash, everywhere and for good, and builds stand in the order in which they came out."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from fpxbench.builds.timeline import (
    Entry,
    IndexedBuild,
    Timeline,
    TimelineError,
    Wheel,
    commit_hash,
    identity,
    tag_name,
)
from fpxbench.records.record import Build


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
    made.add(builds, today=today)
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
        "[user]\nname = Somebody Else\nemail = else@example.com\n[commit]\ngpgsign = true\n[i18n]\n"
        "commitEncoding = latin1\n"
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
    assert commit_hash(build("2.13.0+cpu")) == commit_hash(build("2.13.0+cu130", variant="cu130", triton="3.7.1",
                                                                 date="2026-07-08"))
    assert commit_hash(build("2.15.0.dev20261120+cpu", "nightly")) == commit_hash(N20)


def test_builds_that_differ_have_hashes_that_differ():
    others = [OWN.model_copy(update=change) for change in ({"git": "0" * 40}, {"triton": "3.8.0"},
                                                           {"torch": "2.15.0a0+git0000000"})]
    everyone = [R9, R13, R14, N18, N20, OWN, *others]
    assert len({commit_hash(one) for one in everyone}) == len(everyone)
    assert len({tag_name(one) for one in everyone}) == len(everyone)


def test_a_build_inserted_later_moves_no_hash(tmp_path):
    made = timeline(tmp_path / "t", R9, R14, N20, OWN)
    before = {entry.tag: entry.key for entry in made.entries()}
    made.add([R13, N18])
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
            made.add([one], today="2026-11-23")
        assert [entry.tag for entry in made.entries()] == ["2.9.0", "2.13.0", "2.14.1", "nightly-20261118",
                                                           "nightly-20261120"]
        refs.add(git(made.path, "rev-list", "release"))
    assert len(refs) == 1


def test_author_and_committer_date_are_the_builds_date(tmp_path):
    made = timeline(tmp_path / "t", N20)
    assert git(made.path, "log", "-1", "--format=%at %ct", "nightly") == "1795132800 1795132800"


def test_a_release_whose_date_is_unknown_stands_before_every_later_version(tmp_path):
    made = timeline(tmp_path / "t", build("2.14.1", date="2026-11-01"), today="2026-11-23")
    made.add([R9, R13], today="2026-11-23")
    assert [(entry.tag, entry.day, entry.dated) for entry in made.entries()] == [
        ("2.9.0", "2026-10-30", False), ("2.13.0", "2026-10-31", False), ("2.14.1", "2026-11-01", True)]


def test_a_date_learnt_later_moves_the_commit_and_keeps_its_hash(tmp_path):
    made = timeline(tmp_path / "t", R13)
    assert "date" not in json.loads(git(made.path, "show", "release:build.json"))
    made.add([build("2.13.0+cu130", date="2026-07-08")])
    assert git(made.path, "log", "-1", "--format=%H %as", "release") == f"{commit_hash(R13)} 2026-07-08"
    assert json.loads(git(made.path, "show", "release:build.json"))["date"] == "2026-07-08"
    made.add([R13], today="2026-12-24")
    assert git(made.path, "log", "-1", "--format=%as", "release") == "2026-07-08"


def test_a_commit_holds_the_identity_and_the_pin(tmp_path):
    made = timeline(tmp_path / "t", N20)
    assert json.loads(git(made.path, "--no-replace-objects", "show", "nightly:build.json")) == identity(N20)
    assert git(made.path, "show", "nightly:requirements.txt") == "torch==2.15.0.dev20261120"


def test_adding_a_known_build_writes_nothing(tmp_path):
    made = timeline(tmp_path / "t", R13, N20)
    before = sorted((path, path.stat().st_mtime_ns) for path in made.path.rglob("*") if path.is_file()
                    and path.suffix != ".lock")
    made.add([R13, N20], today="2027-01-01")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in made.path.rglob("*") if path.is_file()
                            and path.suffix != ".lock")


def test_nightlies_of_one_day_and_two_versions_have_a_tag_each_whatever_comes_first(tmp_path):
    branched = build("2.16.0.dev20261120", "nightly", date="2026-11-20")
    for number, order in enumerate(([N20, branched], [branched, N20])):
        made = Timeline(tmp_path / str(number))
        for one in order:
            made.add([one])
        assert {entry.tag: entry.key for entry in made.entries()} == {
            "nightly-20261120": commit_hash(N20), "nightly-20261120-2.16.0.dev20261120": commit_hash(branched)}
        assert git(made.path, "tag").split() == ["nightly-20261120", "nightly-20261120-2.16.0.dev20261120"]
        assert made.find("nightly-20261120").key == commit_hash(N20)


def test_an_installed_builds_metadata_is_merged_with_an_indexs(tmp_path):
    made = Timeline(tmp_path / "t")
    wheel = Wheel(filename="torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl", sha256="ab" * 32)
    made.merge([Entry(channel="release", torch="2.13.0", date="2026-07-08",
                      sources={"https://index": IndexedBuild(wheels=(wheel,), triton={"default": "triton==3.7.1"})})])
    made.add([build("2.13.0+cpu", git=OWN.git, triton="3.9.0")])
    (entry,) = made.entries()
    assert (entry.key, entry.git, entry.own_triton, entry.day) == (commit_hash(R13), OWN.git, "3.7.1", "2026-07-08")


def test_a_failure_to_install_is_kept_on_the_build_until_it_installs(tmp_path):
    made = timeline(tmp_path / "t", R13, R14)
    before = git(made.path, "rev-list", "release")
    made.failed_to_install(commit_hash(R13), "cu130", "ERROR: No space left on device")
    entry = made.find("2.13.0")
    assert entry.failures["cu130"].log_tail == "ERROR: No space left on device"
    assert entry.marks == [f"cu130 failed to install on {entry.failures['cu130'].day}"]
    made.add([R13])
    assert made.find("2.13.0").failures, "holding a build does not say that it installs"
    made.installed(commit_hash(R13), "cpu")
    assert made.find("2.13.0").failures
    made.installed(commit_hash(R13), "cu130")
    assert not made.find("2.13.0").marks
    assert git(made.path, "rev-list", "release") == before
    with pytest.raises(TimelineError, match="no build of commit 000000000000"):
        made.failed_to_install("0" * 40, "cpu", "")


@pytest.mark.parametrize(("name", "tag"), [
    ("2.13.0", "2.13.0"), ("2.13.0+cu130", "2.13.0"), ("release", "2.14.1"), ("nightly", "nightly-20261120"),
    ("nightly-20261118", "nightly-20261118"), ("2.15.0.dev20261118", "nightly-20261118"),
    ("2.15.0.dev20261118+rocm7.2", "nightly-20261118"),
    ("185f0a69", "2.13.0"), (commit_hash(R13), "2.13.0"), ("2.15.0a0+gitcf30153", tag_name(OWN)),
    (tag_name(OWN), tag_name(OWN)),
])
def test_a_build_is_found_by_tag_version_channel_and_the_beginning_of_its_hash(tmp_path, name, tag):
    assert timeline(tmp_path / "t", R9, R13, R14, N18, N20, OWN).find(name).tag == tag


def test_a_name_of_no_build_or_of_several_is_an_error_with_the_way_out(tmp_path):
    other = OWN.model_copy(update={"triton": "3.8.0"})
    made = timeline(tmp_path / "t", R13, R14, OWN, other)
    with pytest.raises(TimelineError, match=r"no build '2.13.9' is on the timeline: did you mean 2.13.0"):
        made.find("2.13.9")
    with pytest.raises(TimelineError, match="sync --channel nightly"):
        made.find("nightly")
    with pytest.raises(TimelineError, match=f"could be source-.*{commit_hash(other)[:8]}"):
        made.find("2.15.0a0+gitcf30153")
    with pytest.raises(TimelineError, match="no build '18'"):
        made.find("18")


def test_a_clock_that_says_1970_dates_no_commit_before_it(tmp_path):
    made = timeline(tmp_path / "t", R9, R13, R14, today="1970-01-01")
    assert [(entry.tag, entry.day) for entry in made.entries()] == [(tag, "1970-01-01")
                                                                    for tag in ("2.9.0", "2.13.0", "2.14.1")]
    git(made.path, "fsck", "--strict", "--no-dangling")


@pytest.mark.parametrize("odd", [
    {"torch": "not.a.version"}, {"triton": "3.7.1\x1b[31m"}, {"git": "; rm -rf /"}, {"date": "yesterday"},
    {"date": "1812-06-24"}])
def test_a_build_that_cannot_be_is_refused(tmp_path, odd):
    with pytest.raises(ValueError):
        Timeline(tmp_path / "t").add([R14.model_copy(update={"variant": "cu130"} | odd)])
    assert Timeline(tmp_path / "t").entries() == []


def test_somebodys_own_tag_is_left_alone(tmp_path):
    made = timeline(tmp_path / "t", R13)
    tree = git(made.path, "hash-object", "-w", "-t", "tree", "/dev/null")
    git(made.path, "-c", "user.name=me", "-c", "user.email=me@example.com", "tag", "mine", tree)
    made.add([R14])
    assert [entry.tag for entry in made.entries()] == ["2.13.0", "2.14.1"]
    assert git(made.path, "tag").split() == ["2.13.0", "2.14.1", "mine"]


def test_what_cannot_be_read_is_named_with_the_way_out(tmp_path):
    made = timeline(tmp_path / "t", R13)
    blob = subprocess.run(["git", f"--git-dir={made.path}", "hash-object", "-w", "--stdin"], input="{",
                          capture_output=True, text=True).stdout.strip()
    tree = subprocess.run(["git", f"--git-dir={made.path}", "mktree"], input=f"100644 blob {blob}\tbuild.json\n",
                          capture_output=True, text=True)
    commit = git(made.path, "-c", "user.name=me", "-c", "user.email=me@example.com", "commit-tree", "-m", "broken",
                 tree.stdout.strip())
    git(made.path, "update-ref", f"refs/replace/{commit_hash(R13)}", commit)
    with pytest.raises(TimelineError, match="build.json of commit 185f0a691eae cannot be read.*Remove the folder"):
        made.entries()


def test_several_processes_may_hold_at_once(tmp_path):
    nightlies = [build(f"2.15.0.dev202611{day:02}", "nightly", date=f"2026-11-{day:02}") for day in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: Timeline(tmp_path / "t").add([one]), nightlies))
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
        Timeline(path).add([R13])
    assert sorted(tmp_path.rglob("*")) == [path] if what == "file" else [path, path / "notes.txt"]


def test_without_git_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TimelineError, match="install git"):
        Timeline(tmp_path / "t").add([R13])

"""`fpxbench timeline`: what it prints, what it exits with, and that a mistake is one sentence."""

import json
import os
import sys
from pathlib import Path

import pytest
from local_index import ELSEWHERE, Listed, LocalIndex, html_page, send
from sample_records import case, record, write

from fpxbench import cli
from fpxbench.builds.installed import installed_build
from fpxbench.builds.timeline import Timeline
from fpxbench.records.record import Build

HERE = installed_build()
WHEELS = (Listed("2.9.0", ELSEWHERE, day="2025-10-15", triton="triton==3.5.0"),
          Listed("2.98.1", day="2099-09-30", triton="triton~=3.8.0"),
          Listed("2.99.0.dev20991120+cu130", triton="triton==3.9.0+git1a2b3c4d"))


@pytest.fixture
def fpxbench(tmp_path, monkeypatch, capsys):
    """Run a command in a folder of its own: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["fpxbench", "timeline", *args])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            sys.exit(0)
        return (ended.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def synced(fpxbench):
    with LocalIndex(*WHEELS) as index:
        status, stdout, stderr = fpxbench("sync", "--index", index.url)
        assert (status, stderr) == (0, ""), stderr
        yield fpxbench, index, stdout


def test_sync_says_what_is_new_and_what_next(synced):
    fpxbench, index, stdout = synced
    assert f"{index.url}: 3 builds\n4 new: " in stdout and "next: fpxbench timeline list" in stdout
    status, stdout, _ = fpxbench("sync", "--index", index.url)
    assert status == 0 and "no new builds" in stdout


def test_list_is_newest_first_with_triton_what_was_measured_where_and_what_is_odd(synced):
    fpxbench, index, _ = synced
    old = Build(torch="2.9.0+cu128", triton="3.5.0", channel="release", variant="cu128")
    write(Path("results"), [record(case(m=m), build=old) for m in (1, 2, 3)] + [record(case(), build=HERE)])
    _, stdout, _ = fpxbench("list")
    lines = stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["build", "nightly-20991120", "2.98.1", HERE.label, "2.9.0"]
    assert lines[1].split()[1:4] == ["2099-11-20", "3.9.0+git1a2b3c4d", "cu130"]
    assert "installed here" in lines[3] and "cpu-epyc-2c: 1" in lines[3]
    assert "cpu-epyc-2c: 3" in lines[4] and "no wheel for Python" in lines[4]
    assert "nightly" not in fpxbench("list", "--channel", "release")[1] and "2.9.0" not in fpxbench("list", "--since",
                                                                                                    "2.10")[1]
    facts = {entry["build"]: entry for entry in json.loads(fpxbench("list", "--json")[1])}
    assert facts["2.9.0"]["measured"] == {"cpu-epyc-2c": 3} and facts[HERE.label]["installed_here"] is True


def test_an_empty_timeline_says_how_it_is_filled_and_an_empty_choice_is_an_error(fpxbench, tmp_path):
    assert fpxbench("list") == (0, "the timeline .timeline is empty: `fpxbench timeline sync` fills it\n", "")
    with LocalIndex(*WHEELS) as index:
        fpxbench("sync", "--index", index.url)
    status, _, stderr = fpxbench("list", "--channel", "source")
    assert status == 2 and "has no such build" in stderr


def test_source_builds_that_share_a_file_of_records_are_counted_apart(fpxbench, tmp_path):
    builds = [Build(torch="2.15.0a0+gitcf30153", triton=triton, git="cf30153c", channel="source", variant="cu130")
              for triton in ("3.8.0", "3.9.0")]
    write(tmp_path / "results",
          [record(case(), build=builds[0]), *(record(case(m=m), build=builds[1]) for m in (1, 2))])
    (path,) = tmp_path.glob("results/*/records/*.jsonl")
    with open(path, "a") as file:
        file.write("half a li\n" + "[" * 200_000 + "\n")      # too deep to parse, from another machine
    Timeline(".timeline").add(builds)
    counts = {entry["triton"]: entry["measured"] for entry in json.loads(fpxbench("list", "--json")[1])}
    assert counts == {"3.8.0": {"cpu-epyc-2c": 1}, "3.9.0": {"cpu-epyc-2c": 2}}


def test_show_gives_dates_pins_wheels_and_what_asv_calls_it(synced):
    fpxbench, index, _ = synced
    for name in ("nightly-20991120", "2.99.0.dev20991120+cu130", "nightly"):
        status, stdout, _ = fpxbench("show", name)
        text = " ".join(stdout.split())
        assert status == 0
        assert f"--extra-index-url {index.url} torch==2.99.0.dev20991120+cu130 triton==3.9.0+git1a2b3c4d" in text
        assert "asv run nightly-20991120^!" in text and "2099-11-20" in text
        assert f"1 for Linux, 1 of them for this Python, on {index.url}" in text
    (wheel,) = json.loads(fpxbench("show", "2.98.1", "--json")[1])["wheels"]
    assert wheel["filename"] == WHEELS[1].name and wheel["sha256"] == WHEELS[1].sha256


def test_show_gives_an_installers_last_lines_as_they_are(synced):
    fpxbench, _, _ = synced
    timeline = Timeline(".timeline")
    timeline.failed_to_install(timeline.find("2.98.1").key, "default", "ERROR: [red]No space left[/red] on device")
    assert "ERROR: [red]No space left[/red] on device" in fpxbench("show", "2.98.1")[1]
    assert "default failed to install on" in fpxbench("list")[1]


def test_here_holds_the_installed_build_and_says_its_place(fpxbench):
    status, stdout, stderr = fpxbench("here")
    assert (status, stderr) == (0, "") and HERE.key in stdout
    assert json.loads(fpxbench("here", "--json")[1])["new"] is False
    printed = json.loads(fpxbench("here", "--json", "--python", sys.executable)[1])
    assert printed["installed"]["torch"] == HERE.torch and printed["key"] == HERE.key


def test_a_pytorch_that_claims_another_builds_version_is_reported(fpxbench):
    Timeline(".timeline").add([HERE.model_copy(update={"git": "0" * 40})])
    status, _, stderr = fpxbench("here")
    assert status == 0 and "not from 000000000000" in stderr


def test_what_is_learnt_before_an_index_fails_is_kept_and_the_exit_status_is_1(fpxbench):
    with LocalIndex(*WHEELS) as good, LocalIndex() as bad:
        bad.faults["."] = lambda request: send(request, 500, b"")
        status, stdout, stderr = fpxbench("sync", "--index", good.url, "--index", bad.url)
        assert status == 1 and "4 new" in stdout
        assert stderr == f"fpxbench: {bad.url}/torch/ answers HTTP 500\n"
        printed = json.loads(fpxbench("sync", "--index", good.url, "--index", bad.url, "--json")[1])
    assert printed["problems"] == [f"{bad.url}/torch/ answers HTTP 500"]
    assert printed["added"] == [] and printed["read"] == {good.url: 3}


def test_offline_the_installed_build_is_added(fpxbench, monkeypatch):
    with LocalIndex() as index:
        pass
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    status, stdout, stderr = fpxbench("sync")
    assert status == 1 and stderr == f"fpxbench: {index.url}/torch/ cannot be reached: the connection was refused\n"
    assert f"1 new: {HERE.label}" in stdout and [entry.key for entry in Timeline(".timeline").entries()] == [HERE.key]


def test_releases_come_from_where_pip_looks(fpxbench, monkeypatch):
    with LocalIndex(*WHEELS) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index.url)
        assert fpxbench("sync")[0] == 0
    timeline = Timeline(".timeline")
    assert {entry.tag for entry in timeline.entries()} == {"2.9.0", "2.98.1", HERE.label}
    assert timeline.find("2.98.1").pins().requirements == "torch===2.98.1\ntriton==3.8.0\n"


def test_nightlies_come_from_the_index_of_their_variant(fpxbench, monkeypatch):
    with LocalIndex(*WHEELS) as index:
        monkeypatch.setattr("fpxbench.builds.index.listing.NIGHTLY_INDEX", index.url + "/{variant}")
        index.faults["/simple/cu130/torch/"] = lambda request: send(request, 200, html_page(list(WHEELS)), "text/html")
        assert fpxbench("sync", "--variant", "cu130")[0] == 0
    assert {entry.tag for entry in Timeline(".timeline").entries()} == {HERE.label, "nightly-20991120"}


@pytest.mark.parametrize(("args", "text"), [
    (("show", "2.99"), "no build '2.99' is on the timeline"),
    (("list", "--channel", "weekly"), "--channel 'weekly': choose from release, nightly, source"),
    (("sync", "--channel", "source"), "--channel 'source': choose release or nightly"),
    (("sync", "--since", "yesterday"), "--since 'yesterday': a day such as 2026-01-01, or a version such as 2.9"),
    (("sync", "--since", "2026-02-30"), "--since '2026-02-30'"),
    (("sync", "--variant", "../cu130"), "--variant '../cu130': a variant has a name such as cpu, cu130 or rocm7.2"),
    (("sync", "--index", "wheels", "--variant", "cu130"), "--index and --variant exclude each other"),
    (("sync", "--index", "s3://bucket"), "'s3://bucket' is not a package index"),
    (("here", "--python", "no-such-python"), "'no-such-python' is not an interpreter"),
])
def test_a_mistake_is_one_sentence_that_names_the_value(fpxbench, args, text):
    status, stdout, stderr = fpxbench(*args)
    assert status == 2 and not stdout
    assert stderr.startswith("fpxbench: ") and text in stderr and len(stderr.splitlines()) == 1


def test_a_folder_that_is_no_timeline_is_one_sentence(fpxbench, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    status, _, stderr = fpxbench("here", "--timeline", "mine")
    assert status == 2 and "mine is not a timeline of builds" in stderr

"""asv works by itself: run, show, compare and publish, over cases that are right, crash, give NaN and are refused."""

import json
import math
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import sample_casts
from asv.util import UserError
from commands import fpxbench
from few_targets import write_few_targets
from places import CHECKOUT
from small_index import offline, write_torch

from fpxbench.builds.environments import Installation
from fpxbench.builds.installed import installed_build
from fpxbench.builds.timeline import Timeline, commit_hash
from fpxbench.records.record import Build, Record
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status

HERE = installed_build()
EARLIER = Build(torch="2.9.0+cu128", triton="3.5.0", channel="release", variant="cu128")
DENSE = "dense/bf16/llama3-8b.k.tp8/m1/bf16"
CRASHING, NAN_GIVING, SLOW = (f"{name}/e4m3fn-row/canary.codes/m1/bf16" for name in ("crashing", "nan_giving", "slow"))

IMPLEMENTATIONS = '''
"""Implementations that end in every way that asv must take."""

import ctypes
import time

import torch

from fpxbench.implementation import Implementation, Support, implementation


class Reference(Implementation):
    layout = "bytes"

    def supports(self, scheme, device):
        return Support.yes() if scheme.quantized else Support.no("quantized weights only")

    def max_elements(self, device):
        return 64 * 256  # the canary: what is wrong gets a diagnosis, which takes long on a real layer

    def matmul(self, x, weight):
        return x @ weight.dequantize().to(x.dtype).T


@implementation("crashing")
class Crashing(Reference):
    """Reads address 0."""

    def matmul(self, x, weight):
        ctypes.string_at(0)


@implementation("nan_giving")
class NanGiving(Reference):
    """Multiplies by NaN."""

    def matmul(self, x, weight):
        return super().matmul(x, weight) * float("nan")


@implementation("refusing")
class Refusing(Reference):
    """Refuses every scheme."""

    def supports(self, scheme, device):
        return Support.no("it refuses every scheme")


@implementation("planted")
class Planted(Reference):
    """Right, unless the build says that it is to crash."""

    def matmul(self, x, weight):
        if getattr(torch, "planted", "") == "crash":
            ctypes.string_at(0)
        return super().matmul(x, weight)


@implementation("slow")
class Slow(Reference):
    """Right, after a long while."""

    def matmul(self, x, weight):
        time.sleep(60)
        return super().matmul(x, weight)
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with what a checkout has for asv, where asv has measured products and codecs once."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(CHECKOUT / "asv.conf.json", folder)
    shutil.copytree(CHECKOUT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "implementations.py").write_text(IMPLEMENTATIONS)
    (folder / "home").mkdir()
    done = asv(folder, "run", "HEAD", "--bench", "^matmul", "--bench", "^codec",
               FPX_IMPLEMENTATION="dense,crashing,nan_giving,refusing")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stderr").write_text(done.stderr)
    write_few_targets(folder / "results")
    return folder


def environment(folder, **variables):
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FPX_", "ASV"))}
    selection = {"FPX_PROFILE": "smoke", "FPX_IMPLS": "implementations.py", "FPX_SCHEME": "bf16,e4m3fn-row",
                 "FPX_WORKLOAD": "canary.codes/m1,llama3-8b.k.tp8/m1", "FPX_MACHINE": "here",
                 "FPX_TIMING_BUDGET_S": "0.05"}
    return own | {"HOME": str(folder / "home")} | selection | variables


def asv(folder, *args, **variables):
    return subprocess.run([sys.executable, "-m", "asv", *args], cwd=folder, env=environment(folder, **variables),
                          capture_output=True, text=True)


def results(folder, machine="here"):
    (path,) = (folder / "results" / machine).glob("*-pytorch-*.json")
    return json.loads(path.read_text())


def figures(folder, benchmark, module="matmul"):
    """Return what asv stored, by case; asv's "skipped" is NaN."""
    stored = results(folder)
    row = dict(zip(stored["result_columns"], stored["results"][f"{module}.{benchmark}"], strict=False))
    ids = [case.strip("'") for case in row["params"][0]]
    return dict(zip(ids, row["result"], strict=True)), row


def test_the_benchmarks_import_no_pytorch(folder):
    code = """
        import sys
        sys.path.insert(0, ".")
        import benchmarks.matmul
        heavy = {"torch", "triton", "transformers", "scipy", "plotly"} & set(sys.modules)
        assert not heavy, heavy
        assert benchmarks.matmul.CASES
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=folder, env=environment(folder),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_results_are_filed_under_the_installed_build(folder):
    stored = results(folder)
    assert stored["commit_hash"] == HERE.key
    assert stored["env_name"] == f"pytorch-py{sys.version_info[0]}.{sys.version_info[1]}-FPX_VARIANT{HERE.variant}"


def test_no_series_depends_on_a_path_or_on_the_systems_version(folder):
    stored = results(folder)
    assert str(folder) not in json.dumps(stored)
    assert stored["params"]["os"] == "Linux"
    assert stored["params"]["ram"].endswith(" GiB")


def test_a_right_case_has_a_time_with_an_interval_in_seconds(folder):
    latency, row = figures(folder, "track_latency")
    (record,) = [r for r in Store(folder / "results").read_all()[0] if r.case.id == DENSE]
    assert latency[DENSE] == pytest.approx(record.timing.median_us * 1e-6, rel=1e-3)
    index = list(latency).index(DENSE)
    assert row["stats_ci_99_a"][index] <= latency[DENSE] <= row["stats_ci_99_b"][index]
    assert json.loads((folder / "results/benchmarks.json").read_text())["matmul.track_latency"]["unit"] == "seconds"


@pytest.mark.parametrize("case", [CRASHING, NAN_GIVING])
def test_a_case_that_is_not_right_has_no_time_and_no_speedup(folder, case):
    assert math.isnan(figures(folder, "track_latency")[0].get(case, math.nan))
    assert math.isnan(figures(folder, "track_speedup")[0].get(case, math.nan))


def test_a_canary_is_no_parameter_of_what_is_timed_nor_a_dense_scheme_of_sqnr(folder):
    assert DENSE in figures(folder, "track_latency")[0]
    for name in ("track_latency", "track_speedup", "track_kernels_launched"):
        assert not [case for case in figures(folder, name)[0] if "/canary." in case]
    assert DENSE not in figures(folder, "track_sqnr")[0]


def test_status_is_a_number_and_worse_is_more(folder):
    status, _ = figures(folder, "track_status")
    assert status[DENSE] == 1
    assert 1 < status[NAN_GIVING] < status[CRASHING] == 9


def test_what_an_implementation_refuses_is_no_benchmark(folder):
    cases = figures(folder, "track_status")[0]
    assert DENSE in cases and not [case for case in cases if case.startswith("refusing/")]


def test_everything_stored_is_a_number_and_none_is_infinite(folder):
    stored = results(folder)
    assert len([name for name in stored["results"] if name.startswith("matmul.")]) == 7
    for name, row in stored["results"].items():
        for value in dict(zip(stored["result_columns"], row, strict=False))["result"]:
            assert isinstance(value, int | float) and not math.isinf(value), (name, value)


def test_the_codec_is_timed_beside_a_copy_and_where_it_is_installed_ml_dtypes(folder):
    for name in ("track_time", "track_time_against_copy", "track_time_against_ml_dtypes"):
        by_row, _ = figures(folder, name, "codec")
        assert by_row and all(value > 0 for value in by_row.values()), (name, by_row)


def test_what_the_detector_and_casts_are_looked_up_by_is_what_was_measured(monkeypatch):
    from fpxbench.benchmarks import detector, numerics
    from fpxbench.casts import cast_run

    monkeypatch.setattr(detector, "SERIES", 2)
    monkeypatch.setattr(detector, "BUILDS", 40)
    cache = detector.setup_cache()
    missed = [look_up(cache, step) for look_up in (detector.track_missed_by_the_rule,
                                                   detector.track_missed_after_confirmation) for step in detector.STEPS]
    alarms = [look_up(cache, series) for look_up in (detector.track_suspects, detector.track_false_alarms)
              for series in detector.track_suspects.params[0]]
    assert len(missed) + len(alarms) == len(cache) and all(0 <= share <= 1 for share in missed)
    assert all(0 <= alarm < math.inf for alarm in alarms)

    found = [sample_casts.record(status=Status.WRONG), sample_casts.record(sample_casts.conversion("finfo/e5m2/e5m2"))]
    monkeypatch.setattr(cast_run, "run_casts", lambda *asked: SimpleNamespace(interrupted=False, records=found))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)     # setup_cache's handler is for its process
    cache = numerics.setup_cache()
    assert [numerics.track_differing(cache, one.id) for one in found] == [7, 0]
    assert [numerics.track_status(cache, one.id) for one in found] == [8, 1]


@pytest.mark.slow_core
@pytest.mark.slow
def test_every_other_benchmark_has_figures(folder):
    """`generate` has none without a model; `targets` some where Triton is installed."""
    done = asv(folder, "run", "HEAD", "--bench", "^(detector|generate|numerics|targets)")
    assert done.returncode == 0, done.stdout + done.stderr
    for name, row in results(folder)["results"].items():
        assert row, name
        if name.startswith(("detector.", "numerics.track_status")):
            assert all(isinstance(value, int | float) and math.isfinite(value) for value in row[0]), (name, row)


def test_progress_reaches_asvs_own_stderr(folder):
    shown = (folder / "stderr").read_text()
    assert CRASHING in shown and "SIGSEGV" in shown, shown


def test_show_prints_the_metrics_of_the_build(folder):
    done = asv(folder, "show", HERE.label)
    assert done.returncode == 0, done.stderr
    assert DENSE in done.stdout
    unmeasured = [line for line in done.stdout.splitlines() if "n/a" in line and "/bf16" in line]     # cases
    assert all("crashing" in line or "nan_giving" in line for line in unmeasured), "only what is wrong lacks a metric"


def store_for_earlier_build(folder, machine):
    """Return what asv would have stored, had this run been on EARLIER."""
    stored = results(folder) | {"commit_hash": commit_hash(EARLIER), "env_name": "pytorch-py3.11-FPX_VARIANTcu128"}
    stored["params"] = stored["params"] | {"machine": machine}
    path = folder / "results" / machine / f"{stored['commit_hash'][:8]}-{stored['env_name']}.json"
    path.write_text(json.dumps(stored))
    return path


@pytest.fixture(scope="module")
def two_builds(folder):
    """Return results of an earlier build come in from another machine: its records, and what asv stored there."""
    there = folder / "results" / "elsewhere"
    there.mkdir()
    machine = json.loads((folder / "results/here/machine.json").read_text())
    (there / "machine.json").write_text(json.dumps(machine | {"machine": "elsewhere"}))
    store_for_earlier_build(folder, "elsewhere")
    record = Store(folder / "results").read_all()[0][0]
    Store(folder / "results").append(
        Record.model_validate(
            record.model_dump(by_alias=True)
            | {"build": EARLIER, "machine": record.machine.model_copy(update={"name": "elsewhere"})}
        )
    )
    return folder


def test_compare_sets_two_builds_side_by_side(two_builds):
    earlier = store_for_earlier_build(two_builds, "here")
    done = asv(two_builds, "compare", "--machine", "here", EARLIER.label, HERE.label)
    earlier.unlink()
    assert done.returncode == 0, done.stdout
    assert f"track_latency('{DENSE}')" in done.stdout


def test_publish_writes_every_build_and_the_report(two_builds):
    done = asv(two_builds, "publish")
    assert done.returncode == 0, done.stdout + done.stderr
    html = two_builds / ".asv/html"
    index = json.loads((html / "index.json").read_text())
    assert set(index["revision_to_hash"].values()) == {HERE.key, commit_hash(EARLIER)}
    assert {"2.9.0", HERE.label} <= set(index["tags"])
    assert '<a href="fpxbench/index.html">' in (html / "index.html").read_text()
    assert (html / "fpxbench/index.html").is_file()


# -- builds that are not installed
# --------------------------------------------------------------------------------------------

GOOD, REFUSED, GOOD_TOO, CRASHING_SINCE = (f"2.15.0.dev2026110{day}" for day in (1, 2, 3, 4))
GOOD_KEY, REFUSED_KEY, CRASHING_KEY = (
    commit_hash(Build(torch=f"{version}+cpu", channel="nightly", variant="cpu"))
    for version in (GOOD, REFUSED, CRASHING_SINCE)
)


@pytest.fixture(scope="module")
def nightlies(tmp_path_factory):
    """Return a timeline of three nightlies beside the installed build: one is right, one does not install, and on the
    last the case crashes. `asv run ALL` has walked the channel."""
    folder = tmp_path_factory.mktemp("nightlies")
    shutil.copy(CHECKOUT / "asv.conf.json", folder)
    (folder / "benchmarks").mkdir()
    for name in ("__init__.py", "matmul.py", "tracking.py"):
        shutil.copy(CHECKOUT / "benchmarks" / name, folder / "benchmarks")
    (folder / "implementations.py").write_text(IMPLEMENTATIONS)
    (folder / "home").mkdir()
    write_torch(folder / "index", f"{GOOD}+cpu", "a" * 40)
    write_torch(folder / "index", f"{REFUSED}+cpu", "b" * 40, requires=("nothing-is-called-this==99",))
    write_torch(folder / "index", f"{CRASHING_SINCE}+cpu", "d" * 40, "crash")
    done = fpxbench("timeline sync --index", folder / "index", cwd=folder, env=environment(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    done = asv(folder, "run", "ALL", "--skip-existing-successful", "--bench", "track_status", FPX_CHANNEL="nightly",
               **planted_only(folder))
    (folder / "stdout").write_text(done.stdout + done.stderr)
    assert done.returncode in (0, 2), done.stdout + done.stderr     # 2: a benchmark failed
    return folder


def planted_only(folder):
    return offline(folder) | {"FPX_IMPLEMENTATION": "planted", "FPX_SCHEME": "e4m3fn-row",
                              "FPX_WORKLOAD": "canary.codes/m1", "FPX_TIMING_BUDGET_S": "0"}


def status_of(folder, key):
    (path,) = (folder / "results" / "here").glob(f"{key[:8]}-*.json")
    stored = json.loads(path.read_text())
    row = dict(zip(stored["result_columns"], stored["results"]["matmul.track_status"], strict=False))
    return stored["env_name"], row["result"]


def test_builds_that_are_not_installed_are_installed_and_go_on_with_the_series(nightlies):
    name = f"pytorch-py{sys.version_info[0]}.{sys.version_info[1]}-FPX_VARIANT{HERE.variant}"
    assert status_of(nightlies, GOOD_KEY) == (name, [1])
    assert status_of(nightlies, CRASHING_KEY) == (name, [9])


def test_records_are_of_the_build_that_was_installed(nightlies):
    records, broken = Store(nightlies / "results").read_all()
    assert not broken and {record.build.key: record.verdict.status for record in records} == {
        GOOD_KEY: "ok", CRASHING_KEY: "crash"}


def test_a_build_that_does_not_install_fails_its_benchmarks_and_the_run_goes_on(nightlies):
    assert status_of(nightlies, REFUSED_KEY)[1] in (None, [None])
    assert "there is no version of nothing-is-called-this==99" in (nightlies / "stdout").read_text()
    (finding,), broken = Store(nightlies / "results", Installation).read_all()
    assert not broken and finding.build.key == REFUSED_KEY and finding.machine.name == "here"
    assert "cpu" in Timeline(nightlies / ".timeline").find(REFUSED_KEY).failures


def test_the_second_time_nothing_is_measured_and_a_single_build_can_be_asked_for(nightlies):
    before = len(Store(nightlies / "results").read_all()[0])
    done = asv(nightlies, "run", "nightly-20261101^!", "--skip-existing-successful", "--bench", "track_status",
               **planted_only(nightlies))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(Store(nightlies / "results").read_all()[0]) == before


def test_a_channel_can_be_left_out(nightlies):
    assert not list((nightlies / "results" / "here").glob(f"{HERE.key[:8]}-*.json")), (
        "a release, and nightlies were asked for"
    )
    done = asv(nightlies, "run", "NEW", "--dry-run", FPX_CHANNEL="weekly", **planted_only(nightlies))
    assert done.returncode == 1 and "FPX_CHANNEL='weekly'" in done.stdout + done.stderr
    done = asv(nightlies, "run", "NEW", "--bench", "track_status", FPX_CHANNEL="nightly", **planted_only(nightlies))
    assert "No commit hashes selected" in done.stdout + done.stderr     # all nightlies have results


@pytest.fixture(scope="module")
def four_nightlies(nightlies):
    """Return them with one more that is right, between the one that does not install and the one that crashes."""
    write_torch(nightlies / "index", f"{GOOD_TOO}+cpu", "c" * 40)
    done = fpxbench("timeline sync --index", nightlies / "index", cwd=nightlies, env=environment(nightlies))
    assert done.returncode == 0, done.stdout + done.stderr
    return nightlies


@pytest.mark.slow_core
@pytest.mark.slow   # half a minute each on two idle cores
def test_find_names_the_build_with_which_it_became_worse(four_nightlies):
    done = asv(four_nightlies, "find", "nightly", "matmul.track_status", **planted_only(four_nightlies))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Greatest regression found: " + CRASHING_KEY[:8] in done.stdout, done.stdout


@pytest.mark.slow
def test_continuous_compares_a_build_with_one_before(four_nightlies):
    done = asv(
        four_nightlies, "continuous", "nightly-20261101", "nightly-20261104", "--bench", "track_status",
        **planted_only(four_nightlies),
    )
    assert "PERFORMANCE DECREASED" in done.stdout, done.stdout + done.stderr


def test_variant_parts_and_channel_may_stand_in_the_matrix(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("FPX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FPX_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("FPX_PROGRESS", str(tmp_path / "progress"))
    from asv.config import Config
    from asv.environment import get_environments

    import fpxbench.integrations.asv  # noqa: F401  (asv finds the environment once it is imported)

    settings = {
        "project": "x",
        "repo": str(tmp_path / "timeline"),
        "environment_type": "pytorch",
        "env_dir": str(tmp_path / "env"),
    }
    matrix = {"env_nobuild": {"FPX_VARIANT": ["cpu", "cu130"], "FPX_PARTS": ["triton"], "FPX_CHANNEL": ["nightly"]}}
    names = [each.name for each in get_environments(Config.from_json(settings | {"matrix": matrix}), None)]
    here = f"pytorch-py{sys.version_info[0]}.{sys.version_info[1]}"
    assert names == [f"{here}-FPX_CHANNELnightly-FPX_PARTStriton-FPX_VARIANT{variant}" for variant in ("cpu", "cu130")]
    monkeypatch.setenv("FPX_PARTS", "torhc")
    with pytest.raises(UserError, match="FPX_PARTS='torhc'"):
        list(get_environments(Config.from_json(settings), None))


def test_ctrl_c_ends_the_run_and_keeps_what_was_measured(folder, tmp_path):
    master, slave = pty.openpty()
    variables = environment(folder, FPX_IMPLEMENTATION="dense,slow", FPX_WORKLOAD="canary.codes/m1",
                            FPX_RESULTS=str(tmp_path), FPX_TIMING_BUDGET_S="0", TERM="xterm", COLUMNS="200")
    process = subprocess.Popen([sys.executable, "-m", "asv", "run", "HEAD", "--bench", "^matmul"], cwd=folder,
                               env=variables, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    shown = b""
    deadline = time.monotonic() + 600
    while SLOW.encode() not in shown and time.monotonic() < deadline:
        if select.select([master], [], [], 1)[0]:
            shown += os.read(master, 1 << 16)
    assert SLOW.encode() in shown, shown.decode(errors="replace")
    process.send_signal(signal.SIGINT)
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([master], [], [], 0.05)[0]:
            try:
                shown += os.read(master, 1 << 16)
            except OSError:  # the terminal's other side is closed
                break
    assert process.wait(600) == 1
    assert b"What was measured is kept" in shown, shown.decode(errors="replace")
    records, broken = Store(tmp_path).read_all()
    assert [record.case.implementation for record in records] == ["dense"] and not broken

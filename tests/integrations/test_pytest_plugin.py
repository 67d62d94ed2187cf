"""`pytest --benchmark` runs the benchmarks and nothing else, and gives a time only to what is right."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

IMPLEMENTATIONS = '''
import ctypes
import os

import torch
import torch.nn.functional as F

from fpxbench.implementation import Implementation, Support, implementation

IN_THE_CHILD = os.getsid(0) == os.getpid()      # a watched child leads a session of its own


class Decoding(Implementation):
    layout = "bytes"
    calls = 0

    def supports(self, scheme, device):
        return Support.yes() if scheme.name == "e4m3fn-row" else Support.no(f"takes e4m3fn-row only, not {scheme.name}")

    def decode(self, weight):
        return weight.packed.view(torch.float8_e4m3fn).float() * weight.scales

    def matmul(self, x, weight):
        self.calls += 1
        return F.linear(x.float(), self.decode(weight)).to(x.dtype)


@implementation("mine_right")
class Right(Decoding):
    pass


@implementation("mine_wrong")
class Wrong(Decoding):
    def matmul(self, x, weight):
        return F.linear(x.float(), self.decode(weight).abs()).to(x.dtype)


@implementation("mine_crashing")
class Crashing(Decoding):
    def matmul(self, x, weight):
        ctypes.string_at(0)


@implementation("mine_tiring")
class Tiring(Decoding):
    """Right while it is checked, and for some calls while it is timed."""

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        return y if IN_THE_CHILD or self.calls < 6 else y * 2


@implementation("mine_raising")
class Raising(Decoding):
    """Right while it is checked, and raises when it is timed."""

    def matmul(self, x, weight):
        y = super().matmul(x, weight)
        if not IN_THE_CHILD and self.calls > 3:
            raise RuntimeError("tired of this")
        return y
'''

TESTS = """
    def test_of_the_project_itself():
        assert True

    def test_benchmark_of_the_project_itself(benchmark):
        benchmark(sum, [1, 2])
"""

SELECTION = ("--fpx-scheme", "e4m3fn-row", "--fpx-scheme", "mxfp4", "--fpx-workload", "llama3-8b.k.tp8/m1",
             "--fpx-device", "cpu")
BENCHMARK = ("--benchmark", "--benchmark-max-time", "0.1")


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest by itself in `folder`, as a user of some project would start it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "FPX_"))}
    return subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
                          cwd=folder, env=environment, capture_output=True, text=True, check=False)


def benchmarked(path: Path) -> dict[str, dict]:
    """Return what pytest-benchmark's JSON holds, by name."""
    return {entry["name"]: entry for entry in json.loads(path.read_text())["benchmarks"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Return a project with tests of its own, implementations of which one is right, and one that cannot be
    imported."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "test_project.py").write_text(textwrap.dedent(TESTS))
    (folder / "mine").mkdir()
    (folder / "mine" / "kernels.py").write_text(IMPLEMENTATIONS)
    (folder / "mine" / "mine_broken.py").write_text("import no_such_module\n")
    return folder


def test_ones_own_weight_and_activations_are_benchmarked(tmp_path) -> None:
    save_file({"w": torch.randn(64, 96)}, tmp_path / "w.safetensors")
    save_file({"x": torch.randn(5, 96), "short": torch.randn(5, 64)}, tmp_path / "x.safetensors")
    common = [*BENCHMARK, "-k", "eager_upcast", "--fpx-scheme", "mxfp4", "--fpx-device", "cpu", "--weights",
              "w.safetensors", "--activations"]
    right = run_pytest(tmp_path, *common, "x.safetensors:x")
    assert right.returncode == 0 and "own.w." in right.stdout, right.stdout + right.stderr
    wrong = run_pytest(tmp_path, *common, "x.safetensors:short")
    assert wrong.returncode != 0 and "has K = 64, and the chosen layers have 96" in wrong.stdout + wrong.stderr


@pytest.fixture(scope="module")
def session(project) -> subprocess.CompletedProcess[str]:
    """Return one run over all of them, saved to be compared with."""
    return run_pytest(project, *BENCHMARK, "--impls", "mine", "-k", "mine", *SELECTION, "--benchmark-json",
                      "out.json", "--benchmark-autosave")


def test_without_the_flag_no_benchmark_of_ours_runs_and_the_projects_tests_do(project):
    done = run_pytest(project, "-v")
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    assert "fpxbench::" not in done.stdout


def test_without_the_flag_the_plugin_loads_nothing_heavy():
    code = ("import sys, fpxbench.integrations.pytest.plugin; print([name for name in ('torch', 'pydantic', 'numpy', "
            "'psutil') if name in sys.modules])")
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_with_the_flag_only_benchmarks_run(session):
    assert "test_of_the_project_itself" not in session.stdout
    assert "test_project.py" not in session.stdout
    assert re.search(r"5 failed, 2 passed", session.stdout), session.stdout


def test_what_is_right_stands_beside_the_dense_baseline_in_a_group_of_its_scheme_and_workload(session):
    assert "benchmark 'e4m3fn-row | llama3-8b.k.tp8 m1 bf16': 2 tests" in session.stdout, session.stdout
    table = session.stdout.split("benchmark 'e4m3fn-row")[1].split("Legend:")[0]
    assert re.search(r"^mine_right\s+[\d,.]+", table, re.MULTILINE) and re.search(
        r"^dense\s+[\d,.]+", table, re.MULTILINE
    )
    assert not re.search(r"mine_(wrong|crashing|tiring|raising)", table), "a time was given to what is not right"


@pytest.mark.parametrize(("name", "verdict"), [
    ("mine_wrong", r"wrong \(sign_lost\): \S+"), ("mine_crashing", r"crash: died by SIGSEGV"),
    ("mine_tiring", r"wrong"), ("mine_raising", r"error: raised RuntimeError: tired of this")
])
def test_what_is_not_right_fails_with_its_verdict_and_no_traceback(session, name, verdict):
    failures = session.stdout.split("= FAILURES =")[1].split("= warnings summary")[0]
    said = failures.split(f"::{name} _")[1].split("\n____")[0]
    assert re.search(verdict, said), said
    assert "Traceback" not in said and "pytest_cases.py" not in said, said
    assert f"FAILED fpxbench::e4m3fn-row/llama3-8b.k.tp8/m1/bf16::{name}" in session.stdout


def test_a_crash_shows_where_it_was(session):
    assert re.search(r'kernels.py", line \d+ in matmul', session.stdout), session.stdout
    assert "Extension modules" not in session.stdout


def test_a_file_that_cannot_be_imported_fails_under_its_name(session):
    assert "FAILED fpxbench::mine_broken" in session.stdout
    assert "No module named 'no_such_module'" in session.stdout


def test_each_case_has_a_line_with_its_speedup_its_roofline_and_what_holds_it_back(session):
    section = session.stdout.split("= fpxbench =")[1]
    assert re.search(
        r"mine_right\s+[\d.]+x dense\s+[\d.]+% of roofline\s+31\.\d dB .*unfused.*writes the decoded weight", section
    ), section
    assert re.search(r"mine_wrong\s+wrong \(sign_lost\): \S+", section), section
    assert re.search(r"refused, not run: mine_right: mxfp4: takes e4m3fn-row only", section), section
    assert "native_float8" not in section, "what -k left out is not spoken of"
    assert all(": mine_" in line for line in section.splitlines() if "not run: " in line), section


def test_the_json_carries_metrics_of_right_cases_only(session, project):
    entries = benchmarked(project / "out.json")
    assert set(entries) == {"dense", "mine_right"}
    mine, dense = entries["mine_right"], entries["dense"]
    info = mine["extra_info"]
    assert mine["fullname"] == "fpxbench::e4m3fn-row/llama3-8b.k.tp8/m1/bf16::mine_right"
    assert info["packed_bytes"] == 128 * 4096 + 128 * 4
    assert info["speedup"] == pytest.approx(dense["stats"]["median"] / mine["stats"]["median"])
    assert info["gb_per_s"] == pytest.approx(info["bytes_min"] / mine["stats"]["median"] / 1e9)
    assert info["relative_error"] <= info["bound"]
    assert "unfused" in info["flags"]


def test_a_failure_says_how_to_run_just_that_case_again(session, project):
    again = re.search(r"again: (pytest .*::mine_raising)$", session.stdout, re.MULTILINE)[1]
    done = run_pytest(project, *shlex.split(again)[1:], "--collect-only", "-q")
    assert "fpxbench::e4m3fn-row/llama3-8b.k.tp8/m1/bf16::mine_raising" in done.stdout, done.stdout
    assert "mine_right" not in done.stdout


def test_a_saved_run_is_compared_with_by_id(session, project):
    # An id picks one case; its baseline comes with it.
    case = "fpxbench::e4m3fn-row/llama3-8b.k.tp8/m1/bf16::mine_right"
    done = run_pytest(project, *BENCHMARK, "--benchmark-compare", "--impls", "mine", *SELECTION, case)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    for name in ("mine_right", "dense"):
        assert re.search(rf"^{name} \(NOW\)", done.stdout, re.MULTILINE), done.stdout
        assert re.search(rf"^{name} \(0001_", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize(("arguments", "said"), [
    (("--fpx-scheme", "e4m3fm-row"), "did you mean"),
    (("--impls", "nowhere.py"), "no such file or folder"),
])
def test_a_mistake_on_the_command_line_is_one_sentence(project, arguments, said):
    done = run_pytest(project, "--benchmark", *arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr and arguments[1] in done.stderr
    assert "Traceback" not in done.stderr

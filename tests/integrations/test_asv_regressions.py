"""asv's own page of regressions works on the series of builds: what changed is placed on the build that changed it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from few_targets import write_few_targets
from nights import EAGER, FUSED, nightly, nights, timed
from places import CHECKOUT
from sample_records import GPU, case, record

from fpxbench.builds.timeline import Timeline, commit_hash
from fpxbench.integrations.asv_metrics import metrics_of
from fpxbench.records.record import Build, Record
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict

BUILDS, SINCE = 30, 22
QUICKER, CRASHING = case("native_float8"), case("compiled_mixed_mm", "e5m2-row")
CASES = (FUSED, EAGER, QUICKER, CRASHING)
# Metrics and units. benchmarks.matmul has them too, but plans a sweep when it is imported.
TRACKED = {
    "track_latency": ("latency", "seconds"),
    "track_speedup": ("speedup", "x"),
    "track_kernels_launched": ("kernels_launched", "kernels"),
    "track_status": ("status", "status"),
}
MACHINE = {"machine": GPU.name, "os": "Linux", "arch": "x86_64", "cpu": "", "num_cpu": "", "ram": ""}


def planted(night: int, one: Record) -> Record:
    """Return records in which from one build on a case is slower, one faster, one launches more kernels, and one
    crashes."""
    if night < SINCE:
        return one
    if one.case == CRASHING:
        return record(CRASHING, Verdict(status=Status.CRASH, summary="died"), machine=one.machine, build=one.build)
    if one.case == EAGER:
        return one.model_copy(update={"traffic": one.traffic.model_copy(update={"kernels_launched": 3})})
    return timed(one, one.timing.median_us * (1.10 if one.case == FUSED else 0.90), one.timing.baseline_us)


def stored(build: Build, records: dict[str, Record]) -> dict:
    """Return what asv stores of one build."""
    figures = [metrics_of(records[of.id]) for of in CASES]
    values = {
        name: [figure[0] if isinstance(figure, list) else figure for figure in (_plain(one[key]) for one in figures)]
        for name, (key, _) in TRACKED.items()
    }
    asked = {"FPX_VARIANT": build.variant}
    return {
        "version": 2,
        "commit_hash": commit_hash(build),
        "env_name": f"pytorch-py3.11-FPX_VARIANT{build.variant}",
        "python": "3.11",
        "date": int(datetime.fromisoformat(build.date).replace(tzinfo=UTC).timestamp() * 1000),
        "params": MACHINE | {"python": "3.11"} | asked,
        "requirements": {},
        "env_vars": asked,
        "durations": {},
        "result_columns": ["result", "params", "version", "started_at", "duration"],
        "results": {
            f"matmul.{name}": [row, [[repr(of.id) for of in CASES]], "1", 1_790_000_000_000, 1.0]
            for name, row in values.items()
        },
    }


def _plain(figure):
    """Return a benchmark's answer as asv stores it: of samples, their median."""
    return sorted(figure["samples"])[len(figure["samples"]) // 2] if isinstance(figure, dict) else figure


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkout with the results of 30 nightlies, published."""
    folder = tmp_path_factory.mktemp("asv")
    results = folder / "results"
    shutil.copy(CHECKOUT / "asv.conf.json", folder)
    shutil.copytree(CHECKOUT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    nights(results, BUILDS, CASES, noise=0.01, edit=planted)
    by_build: dict[Build, dict[str, Record]] = {}
    for one in Store(results).read_all()[0]:
        by_build.setdefault(one.build, {})[one.case.id] = one
    Timeline(folder / ".timeline").add(by_build)
    for build, records in by_build.items():
        text = stored(build, records)
        (results / GPU.name / f"{text['commit_hash'][:8]}-{text['env_name']}.json").write_text(json.dumps(text))
    (results / GPU.name / "machine.json").write_text(json.dumps(MACHINE | {"version": 1}))
    (results / "benchmarks.json").write_text(
        json.dumps(
            {"version": 2}
            | {
                f"matmul.{name}": {
                    "name": f"matmul.{name}",
                    "params": [[repr(of.id) for of in CASES]],
                    "param_names": ["case"],
                    "type": "track",
                    "code": "",
                    "unit": unit,
                    "version": "1",
                }
                for name, (_, unit) in TRACKED.items()
            }
        )
    )
    write_few_targets(results)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FPX_", "ASV"))}
    done = subprocess.run([sys.executable, "-m", "asv", "publish"], cwd=folder, capture_output=True, text=True,
                          env=own | {"HOME": str(folder), "FPX_MACHINE": GPU.name})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / ".asv/html"


@pytest.fixture(scope="module")
def found(published: Path) -> dict[str, list]:
    """Return asv's regressions by benchmark and case: last value, best value, and where it jumped."""
    return {row[0]: row[4:] for row in json.loads((published / "regressions.json").read_text())["regressions"]}


def test_asv_finds_what_got_worse_and_nothing_else(found) -> None:
    assert set(found) == {f"matmul.track_latency('{FUSED.id}')", f"matmul.track_kernels_launched('{EAGER.id}')",
                          f"matmul.track_status('{CRASHING.id}')"}


def test_asv_places_each_on_the_one_build_that_changed_it(found, published: Path) -> None:
    hashes = json.loads((published / "index.json").read_text())["revision_to_hash"]
    for _, _, jumps in found.values():
        [(before, after, _, _)] = jumps
        assert before is None, "one build, and no range of them"
        assert hashes[str(after)] == commit_hash(nightly(SINCE))


def test_asv_shows_by_how_much(found) -> None:
    last, best, _ = found[f"matmul.track_latency('{FUSED.id}')"]
    assert last / best == pytest.approx(1.10, abs=0.02)
    assert found[f"matmul.track_status('{CRASHING.id}')"][:2] == [9.0, 1.0]


def test_the_report_beside_it_tells_of_the_same_cases(published: Path) -> None:
    text = (published / "fpxbench/regressions.html").read_text()
    assert all(of.id in text for of in (FUSED, EAGER, CRASHING))
    assert text.count(f"builds/nightly-{nightly(SINCE).date.replace('-', '')}.html") >= 2, (
        "the crash and the kernels; a time may be placed some builds off"
    )

"""asv's result files from records that asv did not measure: a fleet's, or another machine's.

What asv writes after ``asv run`` is written through its own classes: the same file names, environments and
benchmarks, so that ``asv show``, ``compare`` and ``publish`` make no difference, and a later ``asv run`` on that
machine continues the same series.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asv import util
from asv.benchmarks import Benchmarks
from asv.environment import get_env_name
from asv.machine import Machine as AsvMachine
from asv.results import Results
from asv.runner import BENCHMARK_RUN_SCRIPT, BenchmarkResult

import fpxbench
from fpxbench.builds.installer import without_settings
from fpxbench.builds.timeline import Timeline, commit_hash
from fpxbench.integrations.asv_metrics import metrics_of
from fpxbench.records.record import Machine, Record
from fpxbench.records.store import Store, latest
from fpxbench.sweep.plan import SHARED_PLAN_VARIABLE

_TOOL = "pytorch"
_PREFIX = "matmul.track_"
_MODULES = ("__init__.py", "tracking.py", "matmul.py")
_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def write_results(results: Path, timeline: Timeline, files: Iterable[Path] | None = None) -> int:
    """Write asv's files for the records in `files` (None: all); return how many. Builds are added to the timeline.

    Records of two builds may share a file (source builds); asv has one file for each.
    """
    store: Store[Record] = Store(results)
    series: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for path in store.files() if files is None else files:
        for record in latest(store.read(path)[0]) if path.exists() else []:
            series[record.machine.name, commit_hash(record.build), record.build.variant].append(record)
    if not series:
        return 0
    timeline.add(record.build for records in series.values() for record in records[:1])
    days = {entry.key: entry.day for entry in timeline.entries()}
    cases = {record.case.id for records in series.values() for record in records}
    benchmarks = _benchmarks(results, cases)
    for (name, key, variant), records in series.items():
        machine = _machine(results / name, records[-1].machine)
        _write(results, machine, variant, days[key], key, records, benchmarks)
    return len(series)


def _write(results: Path, machine: dict[str, str], variant: str, day: str, key: str, records: list[Record],
           benchmarks: dict[str, dict]) -> None:
    variables = {"FPX_VARIANT": variant}
    stored = Results(
        machine | {"python": _PYTHON} | variables, {}, key, util.datetime_to_js_timestamp(_midnight(day)), _PYTHON,
        get_env_name(_TOOL, _PYTHON, {}, {("nobuild", "FPX_VARIANT"): variant}), variables)
    stored.load_data(str(results))      # benchmarks of casts and codec, which asv measured, stay
    metrics = {record.case.id: metrics_of(record) for record in records}
    started = datetime.fromisoformat(records[-1].started_at)
    for name, benchmark in benchmarks.items():
        metric = name.removeprefix(_PREFIX)
        asked = map(_case, benchmark["params"][0])
        stored.add_result(benchmark, _result([metrics.get(case, {}).get(metric, math.nan) for case in asked]), started)
    stored.save(str(results))


def _midnight(day: str) -> datetime:
    """Return the time of a build's commit on the timeline."""
    return datetime.fromisoformat(day).replace(tzinfo=UTC)


def _case(parameter: str) -> str:
    """Return the case that asv names by its ``repr``; its id has no quotes or backslashes in it."""
    return parameter.strip("'\"")


def _result(values: list[Any]) -> BenchmarkResult:
    """Return asv's result of a benchmark: samples become their median, with their statistics."""
    samples = [value["samples"] if isinstance(value, dict) else None for value in values]
    numbers = [value["number"] if isinstance(value, dict) else None for value in values]
    plain = [statistics.median(taken) if taken else value for value, taken in zip(values, samples, strict=True)]
    return BenchmarkResult(result=plain, samples=samples, number=numbers, errcode=0, stderr="", profile=None)


def _benchmarks(results: Path, cases: set[str]) -> dict[str, dict]:
    """Return asv's description of the benchmarks of matmul, for `cases` and those described so far, and store it."""
    path = Path(Benchmarks.get_benchmark_file_path(str(results)))
    known = util.load_json(str(path), Benchmarks.api_version) if path.exists() else {}
    for name, benchmark in known.items():
        if name.startswith(_PREFIX):
            cases |= set(map(_case, benchmark["params"][0]))
    found = {each["name"]: each for each in _discover(sorted(cases)) if each["name"].startswith(_PREFIX)}
    util.write_json(str(path), known | found, Benchmarks.api_version)
    return found


def _discover(cases: list[str]) -> list[dict]:
    """Return what asv discovers in ``benchmarks/matmul.py`` if these are the cases."""
    source = Path(fpxbench.__file__).parent / "benchmarks"
    with tempfile.TemporaryDirectory(prefix="fpxbench-asv-") as name:
        folder = Path(name)
        (folder / "benchmarks").mkdir()
        for module in _MODULES:
            shutil.copy(source / module, folder / "benchmarks" / module)
        (folder / "cases.json").write_text(json.dumps(cases))
        # asv's script takes PYTHONPATH from what it runs, unless it is called this.
        paths = {"ASV_PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
        done = subprocess.run(
            [sys.executable, BENCHMARK_RUN_SCRIPT, "discover", str(folder / "benchmarks"), str(folder / "found.json")],
            env=without_settings(os.environ) | paths | {SHARED_PLAN_VARIABLE: str(folder / "cases.json")},
            capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"asv cannot import the benchmarks: {done.stderr.strip()[-1000:]}")
        return json.loads((folder / "found.json").read_text())


def _machine(folder: Path, machine: Machine) -> dict[str, str]:
    """Return asv's description of a machine, made from its records unless asv has one.

    Every field is part of the path of a graph: none changes with the system's version.
    """
    path = folder / "machine.json"
    if path.exists():
        return {name: str(value) for name, value in util.load_json(str(path), AsvMachine.api_version).items()
                if name != "version"}
    found = {"machine": machine.name, "os": "Linux", "arch": machine.arch, "cpu": machine.device,
             "num_cpu": str(machine.facts.get("cores", "")),
             "ram": f"{round(machine.memory_bytes / 2**30)} GiB" if machine.memory_bytes else ""}
    util.write_json(str(path), found, AsvMachine.api_version)
    return found

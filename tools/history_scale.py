#!/usr/bin/env python3
"""Measure what a long history costs: the series index, the detector and the report of one more night.

    tools/history_scale.py --machines 20 --builds 1000 --cases 2000 --folder /tmp/scale

Of most builds only the series index is made up, written as the index itself writes it, beside records files of one
line; the newest `--recent` builds and the night's have all their records. `--records` writes every record of every
build, and measures how long the index takes to be made from them. Prints processor time and the peak memory of all
processes of each step. docs/nightly.md has the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import psutil

from fpxbench.builds.timeline import commit_hash
from fpxbench.records.case import Case
from fpxbench.records.record import Accuracy, Build, Machine, Record, Timing, Traffic
from fpxbench.records.store import Store
from fpxbench.records.verdict import Status, Verdict

IMPLEMENTATIONS = ("dense", "triton_fused", "eager_upcast", "native_float8", "compiled_mixed_mm", "peer_a", "peer_b")
SCHEMES = ("bf16", "e4m3fn-row", "e5m2-row", "e3m2-row", "mxfp4", "nvfp4", "e2m1-g32", "int8-row")
WORKLOADS = ("llama2-7b.o", "llama2-7b.qkv", "llama3-8b.k", "llama3-8b.down", "llama3-70b.o", "llama3-70b.down")
TOKENS = (1, 4, 16, 64, 256, 512)
NOISE = 0.01
FIRST_DAY = date(2024, 1, 1)
CRASH = Verdict(status=Status.CRASH, summary="died by SIGSEGV in libtriton.so, after 12.5 s")
STEPS = ("index", "detector", "report")


def cases(count: int) -> list[Case]:
    """Return so many cases."""
    product = itertools.product(TOKENS, WORKLOADS, IMPLEMENTATIONS, SCHEMES)
    found = [Case(implementation=one, scheme=scheme, workload=workload, m=m, n=4096, k=4096)
             for m, workload, one, scheme in itertools.islice(product, count)]
    if len(found) < count:
        raise SystemExit(f"--cases {count}: there are {len(found)} at most")
    return found


def build(number: int) -> Build:
    """Return a nightly, counted from 0."""
    day = FIRST_DAY + timedelta(days=number)
    found = Build(torch=f"2.15.0.dev{day:%Y%m%d}+cu130", triton="3.9.0", channel="nightly", variant="cu130",
                  date=day.isoformat())
    return found.model_copy(update={"key": commit_hash(found)})


class History:
    """Times and verdicts of one machine's cases on each build: noise, a step in some cases, a crash in others."""

    def __init__(self, number: int, builds: int, of: list[Case]) -> None:
        self.machine = Machine(name=f"gpu-{number:02d}", device="NVIDIA H100 80GB HBM3", arch="sm_90", kind="cuda",
                               memory_bytes=80 << 30, read_gb_per_s=3050.0, facts={"driver": "580.1"})
        self.cases, self.builds = of, builds
        rng = np.random.default_rng(number)
        self._level = rng.uniform(20, 400, len(of))
        self._since = np.where(rng.random(len(of)) < 0.02, rng.integers(1, builds + 1, len(of)), builds + 1)
        self._crashes = rng.random(len(of)) < 0.25
        self._seed = number

    def night(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return time, dense time and whether it crashes, of each case on a build."""
        noise, dense = np.random.default_rng((self._seed, number)).normal(0, NOISE, (2, len(self.cases)))
        changed = number >= self._since
        return (self._level * np.exp(noise + 0.06 * (changed & ~self._crashes)), 2.5 * self._level * np.exp(dense),
                changed & self._crashes)

    def records(self, number: int) -> Iterator[Record]:
        """Yield the records of a build."""
        on = build(number)
        for case, us, dense_us, crashes in zip(self.cases, *self.night(number), strict=True):
            timing = Timing(samples_us=(us * np.linspace(0.99, 1.01, 25)).round(3).tolist(), median_us=us,
                            ci95_us=(us * 0.995, us * 1.005), baseline_us=dense_us, speedup=dense_us / us)
            accuracy = Accuracy(relative_error=1.7e-3, bound=4e-3, worst_ulp=0.6, sqnr_db=31.5)
            yield Record(
                case=case, build=on, machine=self.machine, seed=1, source="1f2e3d4c", verdict=CRASH if crashes
                else Verdict(status=Status.OK), timing=None if crashes else timing, started_at=f"{on.date}T01:00:00Z",
                accuracy=Accuracy() if crashes else accuracy,
                traffic=Traffic() if crashes else Traffic(packed_bytes=case.n * case.k, bytes_min=case.n * case.k,
                                                          kernels_launched=1, peak_bytes=8192, kernels=["kernel_0d1d"]))


def write_records(results: Path, history: History, numbers: range) -> None:
    """Write the records of some builds, a file each."""
    for number in numbers:
        path = Store(results).file(history.machine.name, build(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(record.to_json() + "\n" for record in history.records(number)))


def write_index(results: Path, history: History, numbers: range) -> None:
    """Write the index of some builds, and a records file of one line for each."""
    import polars as pl

    from fpxbench.regressions.series_index import NAME, SCHEMA, FileState, Part, frame_of, part_of

    folder = results / history.machine.name / NAME
    folder.mkdir(parents=True, exist_ok=True)
    for part, month in itertools.groupby(numbers, lambda number: part_of(build(number).stem)):
        frames, files = [], {}
        for number in month:
            path = Store(results).file(history.machine.name, build(number))
            path.parent.mkdir(parents=True, exist_ok=True)
            first = next(history.records(number))
            path.write_text(first.to_json() + "\n")
            stat = path.stat()
            files[path.name] = FileState(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, "", [])
            us, dense_us, crashes = history.night(number)
            pattern = frame_of(path.name, [first]).head(1)
            right = ~crashes
            rows = pl.DataFrame({
                "case": [case.id for case in history.cases], "status": np.where(crashes, "crash", "ok"),
                "message": np.where(crashes, "died by SIGSEGV in libtriton.so, after … s", ""),
                "summary": np.where(crashes, CRASH.summary, ""),
                "median_us": np.where(right, us, np.nan), "baseline_us": np.where(right, dense_us, np.nan)})
            numbers_of = {name: np.where(right, pattern.get_column(name).fill_null(np.nan)[0], np.nan)
                          for name in ("relative_error", "sqnr_db", "packed_bytes", "kernels_launched", "peak_bytes")}
            rows = rows.with_columns(**{name: pl.Series(values) for name, values in numbers_of.items()})
            rest = [name for name in SCHEMA if name not in rows.columns]
            same = pattern.select(pl.col(rest).cast(pl.String)).row(0)
            rows = rows.with_columns(*(pl.lit(value).alias(name) for name, value in zip(rest, same, strict=True)))
            frames.append(rows.fill_nan(None).select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items()))
        Part(pl.concat(frames).lazy(), files).write(folder / f"{part}.parquet")


def make_history(results: Path, machines: int, builds: int, of: list[Case], recent: int, records: bool) -> None:
    """Write the history up to the last night but one."""
    for number in range(machines):
        history = History(number, builds, of)
        begin = 0 if records else max(0, builds - 1 - recent)
        write_index(results, history, range(begin))
        write_records(results, history, range(begin, builds - 1))


def step(name: str, results: Path, site: Path, jobs: int) -> None:
    """Run one step in this process."""
    from fpxbench.regressions.result_changes import find_changes
    from fpxbench.regressions.series import machine_names, panels_of

    if name == "index":
        for machine in machine_names(results):
            panels_of(results, machine)
    elif name == "detector":
        found = find_changes(results, jobs=jobs)
        print(f"{len(found.suspects):,} suspects, {len(found.events):,} events", file=sys.stderr)
    else:
        from fpxbench.reports.site import build_site

        build_site(results, site, jobs=jobs)


def measured(arguments: list[str]) -> dict[str, float]:
    """Run this tool with such arguments; return processor seconds, wall seconds and the peak memory in MB of its
    processes together."""
    began, peak = time.monotonic(), 0
    process = psutil.Popen([sys.executable, __file__, *arguments])
    while process.poll() is None:
        try:
            used = process.cpu_times()
            peak = max(peak, sum(one.memory_info().rss for one in (process, *process.children(recursive=True))))
        except psutil.Error:    # one of them ended meanwhile
            continue
        time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    return {"cpu_s": round(used.user + used.system + used.children_user + used.children_system, 1),
            "wall_s": round(time.monotonic() - began, 1), "peak_mb": round(peak / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("machines", 20), ("builds", 100), ("cases", 200), ("recent", 10), ("jobs", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, default=Path("build/scale"), help="where records and report go; emptied")
    parser.add_argument("--records", action="store_true", help="write every record, and make the index from them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    results, site = chosen.folder / "results", chosen.folder / "report"
    if chosen.step:
        step(chosen.step, results, site, chosen.jobs)
        return
    shutil.rmtree(chosen.folder, ignore_errors=True)
    of = cases(chosen.cases)
    make_history(results, chosen.machines, chosen.builds, of, chosen.recent, chosen.records)
    figures: dict[str, dict[str, float]] = {}

    def measure(label: str, name: str) -> None:
        figures[label] = measured(["--step", name, "--folder", str(chosen.folder), "--jobs", str(chosen.jobs)])
        if not chosen.json:
            print(f"{label:32}", *(f"{value:>10,} {unit}" for unit, value in figures[label].items()), flush=True)

    measure("index, made from the records" if chosen.records else "index, of the recent builds", "index")
    measure("report, the first", "report")
    for number in range(chosen.machines):
        write_records(results, History(number, chosen.builds, of), range(chosen.builds - 1, chosen.builds))
    for label, name in (("a night: index", "index"), ("a night: detector", "detector"), ("a night: report", "report")):
        measure(label, name)
    size = sum(path.stat().st_size for path in results.glob("*/.series/*"))
    points = chosen.machines * chosen.builds * chosen.cases
    summary = {"points": points, "index_bytes_a_point": round(size / points, 1), "steps": figures}
    print(json.dumps(summary) if chosen.json else f"{points:,} points, {summary['index_bytes_a_point']} bytes each")


if __name__ == "__main__":
    main()

"""Records in the benchmark schema v3 of PyTorch's HUD: a JSON list that its upload action takes.

https://github.com/pytorch/pytorch/wiki/How-to-integrate-with-PyTorch-OSS-benchmark-database. The action adds what it
knows of the workflow (repo, head_sha, job).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

from fpxbench.records.record import Record

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def hud_records(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Return one entry for each metric of each record. A case that is not right has its status only."""
    return [entry for record in records for entry in _entries(record)]


def _entries(record: Record) -> Iterator[dict[str, Any]]:
    common = _common(record)
    for name, values in _metrics(record).items():
        yield {**common, "metric": {"name": name, "benchmark_values": values}}


def _metrics(record: Record) -> dict[str, list[float]]:
    timing, state = record.timing, record.device_state
    found: dict[str, list[float]] = {"is_right": [float(record.verdict.status == "ok")]}
    if timing:
        found["latency_us"] = list(timing.samples_us)
    scalars: dict[str, float | None] = {
        "speedup_over_dense": timing.speedup if timing else None, "gb_per_s": record.traffic.gb_per_s,
        "roofline_fraction": record.traffic.roofline_fraction, "sqnr_db": record.accuracy.sqnr_db,
        "relative_error": record.accuracy.relative_error, "joules_per_call": state.joules_per_call if state else None,
    }
    return found | {name: [value] for name, value in scalars.items() if value is not None}


def _common(record: Record) -> dict[str, Any]:
    case, machine, build = record.case, record.machine, record.build
    gpu = machine.kind != "cpu"
    return {
        "schema_version": "v3",
        "timestamp": _seconds(record.started_at),
        "benchmark": {
            "name": "fpxbench", "mode": "inference", "dtype": _DTYPES[case.activation],
            "extra_info": {"scheme": case.scheme, "status": str(record.verdict.status),
                           "kind": str(record.verdict.kind or ""), "flags": ",".join(map(str, record.flags)),
                           "case": case.id},
        },
        "runners": [{"name": machine.name, "type": machine.kind, "cpu_info": "" if gpu else machine.device,
                     "gpu_info": machine.device if gpu else "", "extra_info": {"arch": machine.arch}}],
        "model": {"name": case.workload, "type": "micro-benchmark", "backend": case.implementation},
        "inputs": {name: {"dtype": "", "extra_info": {"value": str(size)}}
                   for name, size in (("m", case.m), ("n", case.n), ("k", case.k))},
        "dependencies": {
            "pytorch": {"repo": "pytorch/pytorch", "branch": build.channel, "sha": build.git or "",
                        "version": build.torch},
            "triton": {"repo": "triton-lang/triton", "branch": "", "sha": "", "version": build.triton or ""},
        },
    }


def _seconds(moment: str) -> int:
    parsed = datetime.fromisoformat(moment)
    return int((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp())

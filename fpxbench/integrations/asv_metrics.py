"""A record's metrics as asv stores them: finite numbers, NaN for "skipped", or samples with their number."""

from __future__ import annotations

import math

from fpxbench.model.generate_record import GenerationRecord
from fpxbench.records.record import Record
from fpxbench.records.verdict import SEVERITY, Status

# asv takes more for worse, and cannot give a ratio to 0: so 1 is `ok`, and the worst has the highest number.
STATUS_NUMBER = {status: len(SEVERITY) - severity for status, severity in SEVERITY.items()}
"""ok 1, unsupported 2, missing 3, error 4, oom 5, timeout 6, nonfinite 7, wrong 8, crash 9."""


def metrics_of(record: Record) -> dict[str, object]:
    """Return a record's metrics by the names of the benchmarks, without ``track_``."""
    timing, accuracy, traffic = record.timing, record.accuracy, record.traffic
    return {
        "latency": {"samples": [us * 1e-6 for us in timing.samples_us], "number": 1} if timing else math.nan,
        "speedup": _number(timing.speedup if timing else None),
        "relative_error": _number(accuracy.relative_error),
        "sqnr": _number(accuracy.sqnr_db),
        "packed_bytes": _number(traffic.packed_bytes),
        "kernels_launched": _number(traffic.kernels_launched),
        "status": STATUS_NUMBER[Status(record.verdict.status)],
    }


def generation_metrics(record: GenerationRecord) -> dict[str, object]:
    """Return the metrics of a model's row by the names of the benchmarks, without ``track_``."""
    speed, traffic = record.speed, record.traffic
    quality = record.quality[0] if record.quality else None
    return {
        "step_time": {"samples": list(speed.step_s), "number": 1} if speed else math.nan,
        "tokens_per_second": _number(speed.tokens_per_s if speed else None),
        "kl": _number(quality.kl.mean.value if quality and quality.kl else None),
        "kl_of_kernel": _number(quality.kl_kernel.mean.value if quality and quality.kl_kernel else None),
        "peak_memory": _number(traffic.peak_bytes if traffic else None),
        "joules_per_token": _number(traffic.joules_per_token if traffic else None),
        "status": STATUS_NUMBER[Status(record.verdict.status)],
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else value

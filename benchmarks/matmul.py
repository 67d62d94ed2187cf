"""Low-bit matmul, case by case, for asv: `setup_cache` runs one sweep, and each metric is a look-up.

A metric that a case lacks (no time, since it is wrong; no SQNR, since its weight is exact) is NaN, which asv treats as
skipped: not a failure of the benchmark, and no point on its graph. `track_status` and the report show failures.
"""

import math
import signal
import sys

from fpxbench.builds.installed import NoPyTorch
from fpxbench.integrations.asv_metrics import metrics_of
from fpxbench.sweep.plan import planned_cases
from fpxbench.sweep.settings import Settings

from .tracking import silent_for, tracked

SETTINGS = Settings.from_environment()
try:
    CASES = planned_cases(SETTINGS)
except NoPyTorch:   # an environment with Triton alone, which suffices for other benchmarks
    CASES = []
# A metric is tracked for the cases that can have it, since asv shows the others as `n/a`. asv would run a benchmark
# without cases once, without a parameter.
TIMED = [case for case in CASES if "/canary." not in case and "/m0/" not in case] or CASES
QUANTIZED = [case for case in CASES if case.split("/")[1] not in ("bf16", "fp16")] or CASES


# asv's limit applies to silence, and the sweep reports elsewhere: each case has its own limit.
@silent_for(7 * 24 * 3600)
def setup_cache() -> dict[str, dict]:
    """Run the sweep; return its metrics by case id."""
    from fpxbench.sweep.run import main_sweep

    # asv passes Ctrl-C on as SIGTERM, and a second later as SIGKILL: time enough to end the children.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sweep = main_sweep(SETTINGS)
    if sweep.interrupted:
        sys.exit("interrupted")
    return {record.case.id: metrics_of(record) for record in sweep.records}


def _look_up(cache: dict[str, dict], case: str, metric: str):
    return cache[case][metric] if case in cache else math.nan


@tracked("seconds", "case", TIMED)
def track_latency(cache, case):
    """Time of one call."""
    return _look_up(cache, case, "latency")


@tracked("x", "case", TIMED)
def track_speedup(cache, case):
    """Speedup over the dense 16-bit product, interleaved with it."""
    return _look_up(cache, case, "speedup")


@tracked("1", "case", CASES)
def track_relative_error(cache, case):
    """Relative error against the exact product with the weight as stored."""
    return _look_up(cache, case, "relative_error")


@tracked("dB", "case", QUANTIZED)
def track_sqnr(cache, case):
    """Signal to quantization noise of the stored weight."""
    return _look_up(cache, case, "sqnr")


@tracked("bytes", "case", CASES)
def track_packed_bytes(cache, case):
    """Bytes of the stored weight, scales included."""
    return _look_up(cache, case, "packed_bytes")


@tracked("kernels", "case", TIMED)
def track_kernels_launched(cache, case):
    """Kernels launched by one call."""
    return _look_up(cache, case, "kernels_launched")


@tracked("status", "case", CASES)
def track_status(cache, case):
    """Status: 1 is ok, 2 unsupported, 3 missing, 4 error, 5 oom, 6 timeout, 7 nonfinite, 8 wrong, 9 crash."""
    return _look_up(cache, case, "status")

"""A language model, scheme by scheme, for asv: `setup_cache` runs `fpxbench generate` once, and each metric is a
look-up.

FPX_MODEL names the model. The default is SmolLM2 from its wheel (not in the profile `smoke`); without that wheel
everything is skipped. Each scheme uses the same implementation on every build, regardless of which is fastest in the
records.
"""

import math
import signal
import sys
from fnmatch import fnmatchcase

from fpxbench.integrations.asv_metrics import generation_metrics
from fpxbench.model.generate_record import BASELINES
from fpxbench.model.model_benchmark import ModelBenchmark, row_name
from fpxbench.sweep.settings import Settings

from .tracking import silent_for, tracked

SETTINGS = Settings.from_environment()
ASKED = ModelBenchmark.from_environment(SETTINGS.profile)
SCHEMES = {
    "smoke": ("e4m3fn-row",),
    "quick": ("e4m3fn-row", "mxfp4"),
    "full": ("e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "e3m4-row", "e3m2-row", "e2m3-row", "mxfp4", "nvfp4"),
}[SETTINGS.profile]
CHOSEN = [name for name in SCHEMES if not SETTINGS.scheme or any(fnmatchcase(name, glob) for glob in SETTINGS.scheme)]
ROWS = [row_name(scheme, mode) for mode in ASKED.modes for scheme in (*BASELINES, *CHOSEN)]
QUANTIZED = [row for row in ROWS if not row.startswith("bf16")]


# asv's limit applies to silence, and the run reports elsewhere: each row has its own limit.
@silent_for(24 * 3600)
def setup_cache() -> dict[str, dict]:
    """Measure the rows; return their metrics by row."""
    # asv passes Ctrl-C on as SIGTERM, and a second later as SIGKILL: time enough to end the child.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = ASKED.measured(SETTINGS, [*BASELINES[1:], *CHOSEN])
    if run is None:
        return {}
    if run.interrupted:
        sys.exit("interrupted")
    return {row_name(record.scheme, record.mode): generation_metrics(record) for record in run.records}


def _look_up(cache: dict[str, dict], row: str, metric: str):
    return cache.get(row, {}).get(metric, math.nan)


@tracked("seconds", "row", ROWS)
def track_step_time(cache, row):
    """Time of one decode step, which gives one token to each sequence."""
    return _look_up(cache, row, "step_time")


@tracked("tokens/s", "row", ROWS)
def track_tokens_per_second(cache, row):
    """Tokens per second while decoding."""
    return _look_up(cache, row, "tokens_per_second")


@tracked("nats", "row", QUANTIZED)
def track_kl(cache, row):
    """Mean KL divergence of next-token distributions from the unquantized model."""
    return _look_up(cache, row, "kl")


@tracked("nats", "row", QUANTIZED)
def track_kl_of_kernel(cache, row):
    """Mean KL divergence from the same codes decoded exactly: what the kernel adds."""
    return _look_up(cache, row, "kl_of_kernel")


@tracked("bytes", "row", ROWS)
def track_peak_memory(cache, row):
    """Most memory in use while generating: of the device, or of the process on a CPU."""
    return _look_up(cache, row, "peak_memory")


@tracked("joules", "row", ROWS)
def track_joules_per_token(cache, row):
    """Energy of a token, where the device has a counter."""
    return _look_up(cache, row, "joules_per_token")


@tracked("status", "row", ROWS)
def track_status(cache, row):
    """Status: 1 is ok, 2 unsupported, 3 missing, 4 error, 5 oom, 6 timeout, 7 nonfinite, 8 wrong, 9 crash."""
    return _look_up(cache, row, "status")

"""Casts, conversion by conversion, for asv: `setup_cache` checks them once, and each metric is a look-up.

A build that changes a cast (E4M3FN's overflow from NaN to 448, in 2.12) is a step in the number of inputs that differ
from a fixed reference. The profiles `smoke` and `quick` check eager PyTorch; `full` checks every conversion.
"""

import math
import signal
import sys

from fpxbench.builds.installed import NoPyTorch, installed_build
from fpxbench.casts.cast_plan import conversions
from fpxbench.casts.conversion import Engine
from fpxbench.integrations.asv_metrics import STATUS_NUMBER
from fpxbench.sweep.settings import Settings

from .tracking import silent_for, tracked

SETTINGS = Settings.from_environment()
ENGINES = () if SETTINGS.profile == "full" else (Engine.EAGER,)
GLOBS = {
    "smoke": ("cast/fp32", "finfo"),
    # FP8 to FP8 is left out
    "quick": ("cast/fp*", "cast/bf16", "cast/e*/fp*", "cast/e*/bf16", "scale_then_cast", "finfo", "*/uint*"),
    "full": (),
}[SETTINGS.profile]
# The devices are unknown until PyTorch is imported: without a GPU, its conversions have no values.
try:
    DEVICES = [SETTINGS.device] if SETTINGS.device else ["cpu"] + ["cuda"] * (installed_build().variant != "cpu")
    CONVERSIONS = [conversion.id for conversion in conversions(DEVICES, ENGINES, GLOBS)]
except NoPyTorch:   # an environment with Triton alone, which suffices for other benchmarks
    CONVERSIONS = []


# asv's limit applies to silence, and the run reports elsewhere: each batch has its own limit.
@silent_for(24 * 3600)
def setup_cache() -> dict[str, dict]:
    """Check the conversions; return their metrics by conversion id."""
    from fpxbench.casts.cast_run import run_casts

    # asv passes Ctrl-C on as SIGTERM, and a second later as SIGKILL: time enough to end the children.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run = run_casts(SETTINGS, ENGINES, GLOBS)
    if run.interrupted:
        sys.exit("interrupted")
    return {
        record.id: {
            "differing": math.nan if record.differing is None else record.differing,
            "status": STATUS_NUMBER[record.verdict.status],
        }
        for record in run.records
    }


@tracked("inputs", "conversion", CONVERSIONS)
def track_differing(cache, conversion):
    """Inputs whose result is not the nearest number, saturated: what a format's standard allows counts too."""
    return cache[conversion]["differing"] if conversion in cache else math.nan


@tracked("status", "conversion", CONVERSIONS)
def track_status(cache, conversion):
    """Status: 1 is ok, 2 unsupported, 3 missing, 4 error, 6 timeout, 8 wrong, 9 crash."""
    return cache[conversion]["status"] if conversion in cache else math.nan

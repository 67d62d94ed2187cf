"""Speed of encoding, decoding and packing, for asv: `setup_cache` runs measure_rows once, and each metric is a look-up.

asv treats larger as worse, so speeds are reported as times; `fpxbench codec` prints the speeds, for every format and
layout.
"""

import math
import signal
import sys

from fpxbench.casts.codec_speed import COPY, OWN, SpeedRow, measure_rows
from fpxbench.sweep.isolation import Isolation
from fpxbench.sweep.settings import Settings

from .tracking import silent_for, tracked

SETTINGS = Settings.from_environment()
SMOKE = SETTINGS.profile == "smoke"
FORMATS = (
    ("e4m3fn", "e2m1") if SMOKE else ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e3m4", "e3m2", "e2m3", "e2m1", "e8m0")
)
PACKED = (
    ("planar/6",)
    if SMOKE
    else ("planar/4", "planar/6", "nibbles_low_first/4", "bitstream/6", "torchao_fp6/6", "fp6_llm/6")
)

ENCODED = [f"encode/{name}/fp32" for name in FORMATS]
DECODED = [f"decode/{name}" for name in FORMATS]
MOVED = [f"{way}/{name}" for name in PACKED for way in ("pack", "unpack")]

ELEMENTS = 1 << 20
BUDGET_S = 0.05


# asv's limit applies to silence; each row has its own limit, and first waits while others measure on the same device.
@silent_for(24 * 3600)
def setup_cache() -> dict[str, dict]:
    """Measure the rows; return their metrics by row."""
    # asv passes Ctrl-C on as SIGTERM, and a second later as SIGKILL: time enough to end the child.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Isolation(SETTINGS.memory_limit) as isolation:
            measured = list(measure_rows([*ENCODED, *DECODED, *MOVED], isolation, ELEMENTS, BUDGET_S))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    for row in measured:
        if row.died:
            print(f"{row.row}: {row.died}", file=sys.stderr)
    return {row.row: metrics_of(row) for row in measured}


def metrics_of(row: SpeedRow) -> dict[str, float]:
    """Return the metrics of a row; NaN, which asv treats as skipped, for missing ones."""
    own = row.timed.get(OWN)
    return {
        "time": own.per_element_s * 1e9 if own else math.nan,
        "against_ml_dtypes": _times_as_long(row, "ml_dtypes"),
        "against_copy": _times_as_long(row, COPY),
    }


def _times_as_long(row: SpeedRow, other: str) -> float:
    ratio = row.ratio(other)
    return 1 / ratio.median if ratio else math.nan


@tracked("ns", "row", [*ENCODED, *DECODED, *MOVED])
def track_time(cache, row):
    """Time for each element, on the CPU."""
    return cache[row]["time"]


@tracked("x", "row", [*ENCODED, *DECODED])
def track_time_against_ml_dtypes(cache, row):
    """Time over ml_dtypes', interleaved with it: below 1 is faster."""
    return cache[row]["against_ml_dtypes"]


@tracked("x", "row", [*DECODED, *MOVED])
def track_time_against_copy(cache, row):
    """Time over that of a plain copy of as many bytes, interleaved with it."""
    return cache[row]["against_copy"]

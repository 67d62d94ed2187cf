"""GPU support, for asv: in `setup_cache` the build's Triton compiles for GPUs that may be absent, and each metric is a
look-up.

asv treats larger as worse, so failures are counted. `fpxbench targets` lists them, with the compiler's messages. The
profile `smoke` compiles decodes to bf16 on one architecture, `quick` decodes on all, `full` everything.
"""

import math
import signal
import sys

from fpxbench.records.verdict import BROKEN, Status
from fpxbench.sweep.settings import Settings
from fpxbench.targets.architectures import architectures_like
from fpxbench.targets.operations import OPERATIONS

from .tracking import silent_for, tracked

SETTINGS = Settings.from_environment()
SMOKE = SETTINGS.profile == "smoke"
ASKED = list(OPERATIONS) if SETTINGS.profile == "full" else ["decode"]
PROBES = "{}/*/bf16" if SMOKE else "{}"
ARCHITECTURES = ("sm_90",) if SMOKE else ()


# asv's limit applies to silence, and a matrix takes minutes: each compilation has its own limit.
@silent_for(3600)
def setup_cache() -> dict[str, dict[str, int]]:
    """Compile with the installed Triton; return numbers of cells by operation."""
    from fpxbench.targets.collection import evaluate_builds
    from fpxbench.targets.operations import probes_like
    from fpxbench.targets.triton_builds import INSTALLED

    # asv passes Ctrl-C on as SIGTERM, and a second later as SIGKILL: time enough to end the children.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    probes = []
    for name in ASKED:
        try:
            probes += probes_like([PROBES.format(name)])
        except ModuleNotFoundError as error:    # an environment with Triton alone: triton_fused needs PyTorch
            print(f"{name} is left out: no {error.name}", file=sys.stderr)
    try:
        judged, = evaluate_builds([INSTALLED], probes, architectures_like(ARCHITECTURES),
                                  notify=lambda text: print(text, file=sys.stderr))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    return {name: _counts([outcome for (probe, _), outcome in judged.outcomes.items() if probe.startswith(f"{name}/")])
            for name in ASKED}


def _counts(outcomes: list) -> dict[str, int]:
    statuses = [outcome.status for outcome in outcomes]
    if set(statuses) <= {Status.MISSING}:       # nothing, or `inductor` without PyTorch
        return {}
    return {
        "not_compiling": sum(status not in (Status.OK, Status.WRONG) for status in statuses),
        "wrong": statuses.count(Status.WRONG),
        "failing": sum(status in BROKEN and status is not Status.WRONG for status in statuses),
    }


@tracked("cells", "operation", ASKED)
def track_not_compiling(cache, operation):
    """Cells (a kernel on an architecture) that do not compile, refused ones among them."""
    return cache.get(operation, {}).get("not_compiling", math.nan)


@tracked("cells", "operation", ASKED)
def track_wrong(cache, operation):
    """Cells that compile, and decode another format than was asked for."""
    return cache.get(operation, {}).get("wrong", math.nan)


@tracked("cells", "operation", ASKED)
def track_failing(cache, operation):
    """Cells on which the compiler crashes, raises or hangs."""
    return cache.get(operation, {}).get("failing", math.nan)

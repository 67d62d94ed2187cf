"""What `torch.compile` makes of ``(x @ w.to(x.dtype)) * s``, as probes: are upcast, product and scale one kernel?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fpxbench.targets.architectures import Architecture
from fpxbench.targets.operations import ProbeSpec, Request

UNFUSED = "unfused"
"""Flag of an outcome: it takes more than one kernel. The word is the records'."""

N = K = 4096
WEIGHTS = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "int8")
WAYS = (
    ("default", "nk", 16, "bf16"), ("max-autotune", "nk", 1, "bf16"), ("max-autotune", "nk", 16, "fp16"),
    ("max-autotune", "kn", 1, "bf16"), ("max-autotune", "kn", 16, "bf16"),
)
"""torch.compile's mode, the weight's layout, M, and the activation. By default a product is a library's, whatever M and layout are;
``kn`` at M = 1 is pytorch/ao#228's own case, ``nk`` that of a linear layer."""
ASKED_ALL = ("e4m3fn", "int8")
FEW_WAYS = tuple(way for way in WAYS if way[0] == "default" or way[1:3] in (("nk", 1), ("kn", 16)))
"""For what is decoded otherwise and fused alike: a launch of its own, a reduction, a template."""

_CHILD = Path(__file__).with_name("child") / "inductor.py"


def questions() -> Iterator[ProbeSpec]:
    for weight in WEIGHTS:
        for mode, layout, m, x in WAYS if weight in ASKED_ALL else FEW_WAYS:
            yield ProbeSpec("inductor", weight, f"{mode}-{layout}-m{m}-{x}", {"mode": mode, "layout": layout, "m": m, "x": x})


def request(question: ProbeSpec, architecture: Architecture) -> Request:
    return {"file": str(_CHILD), "inductor": {"weight": question.format, "n": N, "k": K} | question.options}


def told(launches: Sequence[dict[str, Any]]) -> str:
    """One sentence about what is launched: the same for all that come to the same."""
    if len(launches) == 1:
        return "upcast, product and scale are one kernel"
    return f"{len(launches)} launches: {', then '.join(map(_said, launches))}{_written(launches)}"


def _said(launch: dict[str, Any]) -> str:
    by = "a kernel" if launch["by"] == "triton" else launch["by"]
    return f"{' and '.join(launch['does']) or 'more'} by {by}"


def _written(launches: Sequence[dict[str, Any]]) -> str:
    """What an upcast of its own costs."""
    if "product" in next(launch["does"] for launch in launches if "upcast" in launch["does"]):
        return ""
    return f"; a 16-bit copy of the weight, {2 * N * K >> 20} MiB for {N * K >> 20} MiB of codes, goes through memory"

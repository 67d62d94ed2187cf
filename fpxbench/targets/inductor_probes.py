"""Probes of `torch.compile`: are upcast, product and scale of ``(x @ w.to(x.dtype)) * s`` one kernel?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fpxbench.targets.architectures import Architecture
from fpxbench.targets.operations import ProbeSpec, Request

UNFUSED = "unfused"
"""Flag of an outcome: it takes more than one kernel. Records have the same flag."""

N = K = 4096
WEIGHTS = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "int8")
WAYS = (
    ("default", "nk", 16, "bf16"), ("max-autotune", "nk", 1, "bf16"), ("max-autotune", "nk", 16, "fp16"),
    ("max-autotune", "kn", 1, "bf16"), ("max-autotune", "kn", 16, "bf16"),
)
"""torch.compile's mode, the weight's layout, M, and the activation. In mode ``default`` a product is always a
library's; ``kn`` at M = 1 is the case of pytorch/ao#228, ``nk`` that of a linear layer.
"""
ASKED_ALL = ("e4m3fn", "int8")
FEW_WAYS = tuple(way for way in WAYS if way[0] == "default" or way[1:3] in (("nk", 1), ("kn", 16)))
"""For formats that differ in decoding only: a separate launch, a reduction, a template."""

_CHILD = Path(__file__).with_name("child") / "inductor.py"


def probes() -> Iterator[ProbeSpec]:
    for weight in WEIGHTS:
        for mode, layout, m, x in WAYS if weight in ASKED_ALL else FEW_WAYS:
            yield ProbeSpec("inductor", weight, f"{mode}-{layout}-m{m}-{x}",
                            {"mode": mode, "layout": layout, "m": m, "x": x})


def request(spec: ProbeSpec, architecture: Architecture) -> Request:
    return {"file": str(_CHILD), "inductor": {"weight": spec.format, "n": N, "k": K} | spec.options}


STORED = ("e4m3fn", "e5m2")
ROWS, COLUMNS = 4080, 4112
"""Of a quantized matrix: divisible by 16, and by no block, so that tails are masked."""


def store_probes() -> Iterator[ProbeSpec]:
    """Yield one probe a format; it compiles every configuration that Inductor tries under ``max-autotune``."""
    for fmt in STORED:
        yield ProbeSpec("inductor_store", fmt, "max-autotune-rows", {"rows": ROWS, "columns": COLUMNS})


def store_request(spec: ProbeSpec, architecture: Architecture) -> Request:
    return {"file": str(_CHILD), "inductor": {"stored": spec.format, "mode": "max-autotune", **spec.options}}


def launch_summary(launches: Sequence[dict[str, Any]]) -> str:
    """Return one sentence about the launches, the same for equal ones."""
    if len(launches) == 1:
        return "upcast, product and scale are one kernel"
    return f"{len(launches)} launches: {', then '.join(map(_launch_text, launches))}{_copy_text(launches)}"


def _launch_text(launch: dict[str, Any]) -> str:
    by = "a kernel" if launch["by"] == "triton" else launch["by"]
    return f"{' and '.join(launch['does']) or 'more'} by {by}"


def _copy_text(launches: Sequence[dict[str, Any]]) -> str:
    """Return the memory traffic of a separate upcast, as text."""
    if "product" in next(launch["does"] for launch in launches if "upcast" in launch["does"]):
        return ""
    return f"; a 16-bit copy of the weight, {2 * N * K >> 20} MiB for {N * K >> 20} MiB of codes, goes through memory"

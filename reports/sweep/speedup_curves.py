"""Draw speedup over dense against M for each scheme and layer, and find the fastest implementations.

The drawings are inline SVG, as in `fpxbench.reports.sweep.dot_plot`. Only correct cases are drawn; both axes are
logarithmic.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from fpxbench.records.verdict import Status
from fpxbench.reports.sweep.case_row import CaseRow
from fpxbench.reports.sweep.sweep_table import SweepTable

OWN_KERNELS = ("triton_fused", "cpu_fused")
"""This suite's kernels, with which the others are compared."""
WIDTH, HEIGHT = 340.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 12.0, 10.0, 34.0
LOOKS = 8
"""Number of colours and shapes in the style sheet; further implementations reuse them."""
DRAWN_IN_FULL = 12
"""Number of drawings before the rest is collapsed."""
_RATIOS = [step * 10.0**decade for decade in range(-4, 3) for step in (1, 1.5, 2, 3, 5, 7)]
_MOST_TICKS = 7


@dataclass(frozen=True)
class Mark:
    """The position of one case in a drawing."""

    x: float
    y: float
    row: CaseRow


@dataclass(frozen=True)
class Curve:
    """One implementation's speedups, by M."""

    name: str
    look: int
    marks: tuple[Mark, ...]

    @property
    def path(self) -> str:
        return _path((mark.x, mark.y) for mark in self.marks)


@dataclass(frozen=True)
class Drawing:
    """One scheme on one layer, with positions in a drawing of `WIDTH` by `HEIGHT` units."""

    scheme: str
    workload: str
    shape: str
    curves: tuple[Curve, ...]
    roofline: str
    """The path of the largest possible speedup."""
    tokens: tuple[tuple[float, int], ...]
    """(x, M)"""
    ratios: tuple[tuple[float, float], ...]
    """(y, speedup)"""
    dense: float
    """y of a speedup of 1."""


@dataclass(frozen=True)
class Fastest:
    """The fastest case of a scheme, a layer and M, and this suite's fastest kernel."""

    best: CaseRow
    own: CaseRow | None

    @property
    def own_share(self) -> float | None:
        """The speed of this suite's kernel over the fastest one's; None if it has no correct, timed case."""
        return self.own.ranking_speedup / self.best.ranking_speedup if self.own else None


@dataclass(frozen=True)
class SpeedupCurves:
    """The drawings of one sweep.

    names : implementations drawn, with the library that provides the kernel ("" for this suite's), and their look
    measured_roofline : whether the roofline is the machine's measured read bandwidth, or else the largest that a case
        reached
    """

    drawings: tuple[Drawing, ...]
    names: tuple[tuple[str, str, int], ...]
    fastest: dict[tuple[str, str], dict[int, Fastest]]
    """By (scheme, workload), then M."""
    tokens: tuple[int, ...]
    measured_roofline: bool


@dataclass(frozen=True)
class Roofline:
    """The bounds of a product: a bandwidth in GB/s, and the largest rate of dense products in operations per µs."""

    gb_per_s: float
    operations_per_us: float

    @classmethod
    def of(cls, sweep: SweepTable, rows: Sequence[CaseRow]) -> Roofline:
        reached = max((row.gb_per_s for row in rows if row.gb_per_s), default=0.0)
        rates = (_operations(row) / row.baseline_us for row in rows if row.baseline_us)
        return cls(sweep.machine.read_gb_per_s or reached, max(rates, default=0.0))

    def speedup(self, rows: Sequence[CaseRow]) -> float | None:
        """Return the largest possible speedup over dense; `rows` are of one scheme, layer and M."""
        least = min((row.bytes_min for row in rows if row.bytes_min), default=0)
        dense = [row.baseline_us for row in rows if row.baseline_us]
        if not (least and dense and self.gb_per_s and self.operations_per_us):
            return None
        return median(dense) / max(least / (self.gb_per_s * 1e3), _operations(rows[0]) / self.operations_per_us)


def speedup_curves(sweep: SweepTable) -> SpeedupCurves | None:
    """Return the drawings of every scheme and layer timed at two or more M; None if there are none."""
    rows = [row for row in sweep.rows if row.status is Status.OK and row.quantized and row.ranked and row.case.m > 0
            and not row.is_canary]
    grouped: dict[tuple[str, str], list[CaseRow]] = defaultdict(list)
    for row in rows:
        grouped[row.case.scheme, row.case.workload].append(row)
    several = {key: of for key, of in grouped.items() if len({row.case.m for row in of}) > 1}
    if not several:
        return None
    shown = [row for of in several.values() for row in of]
    looks = {name: index % LOOKS for index, name in enumerate(sorted({row.case.implementation for row in shown}))}
    roofline = Roofline.of(sweep, rows)
    in_order = sorted(several, key=lambda key: (key[1], sweep.schemes.index(key[0])))
    libraries = {row.case.implementation: row.library for row in shown if row.library}
    return SpeedupCurves(
        drawings=tuple(drawing(key, several[key], roofline, looks) for key in in_order),
        names=tuple((name, libraries.get(name, ""), look) for name, look in looks.items()),
        fastest={key: fastest_of(several[key]) for key in in_order},
        tokens=tuple(sorted({row.case.m for row in shown})),
        measured_roofline=sweep.machine.read_gb_per_s is not None,
    )


def fastest_of(rows: Iterable[CaseRow]) -> dict[int, Fastest]:
    """Return the fastest case of each M; `rows` are correct cases of one scheme and layer."""
    by_m: dict[int, list[CaseRow]] = defaultdict(list)
    for row in rows:
        by_m[row.case.m].append(row)

    found = {}
    for m, of in sorted(by_m.items()):
        slowest_first = sorted(of, key=lambda row: (row.ranking_speedup, row.case.id))
        own = [row for row in slowest_first if row.case.implementation in OWN_KERNELS]
        found[m] = Fastest(slowest_first[-1], own[-1] if own else None)
    return found


def drawing(key: tuple[str, str], rows: Sequence[CaseRow], roofline: Roofline, looks: dict[str, int]) -> Drawing:
    """Draw one scheme on one layer; `rows` are its correct, timed cases."""
    tokens = sorted({row.case.m for row in rows})
    limits = {m: roofline.speedup([row for row in rows if row.case.m == m]) for m in tokens}
    values = [1.0, *map(_speedup, rows), *(limit for limit in limits.values() if limit)]
    low, high = math.log(min(values) / 1.1), math.log(max(values) * 1.1)

    def x(m: int) -> float:
        along = math.log(m / tokens[0]) / math.log(tokens[-1] / tokens[0])
        return round(LEFT + 8 + along * (WIDTH - LEFT - RIGHT - 16), 1)

    def y(speedup: float) -> float:
        return round(TOP + (high - math.log(speedup)) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    curves = []
    for name in sorted({row.case.implementation for row in rows}):
        best = {row.case.m: row for row in sorted(rows, key=_speedup) if row.case.implementation == name}
        marks = tuple(Mark(x(m), y(_speedup(best[m])), best[m]) for m in sorted(best))
        curves.append(Curve(name, looks[name], marks))
    inside = [ratio for ratio in _RATIOS if low <= math.log(ratio) <= high]
    inside = inside[::math.ceil(len(inside) / _MOST_TICKS)] if 1.0 not in inside else _thinned(inside)
    return Drawing(
        scheme=key[0], workload=key[1], shape=f"{rows[0].case.n} × {rows[0].case.k}", curves=tuple(curves),
        roofline=_path((x(m), y(limit)) for m, limit in limits.items() if limit),
        tokens=tuple((x(m), m) for m in tokens), ratios=tuple((y(ratio), ratio) for ratio in inside), dense=y(1.0),
    )


def _thinned(ratios: list[float]) -> list[float]:
    """Return at most `_MOST_TICKS` of `ratios`, including 1."""
    step = math.ceil(len(ratios) / _MOST_TICKS)
    return ratios[ratios.index(1.0) % step::step]


def _speedup(row: CaseRow) -> float:
    """Return the speedup of a timed case."""
    return row.speedup or 0.0


def _operations(row: CaseRow) -> float:
    return 2.0 * row.case.m * row.case.n * row.case.k


def _path(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{'M' if index == 0 else 'L'}{x:g} {y:g}" for index, (x, y) in enumerate(points))

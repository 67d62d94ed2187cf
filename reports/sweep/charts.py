"""The charts of a sweep, as plotly figures in JSON; `static/charts.js` draws them in the page's colours."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import plotly.graph_objects as go

from fpxbench.counted import counted
from fpxbench.records.verdict import Status
from fpxbench.reports.sweep.case_row import CaseRow
from fpxbench.reports.sweep.sweep_table import SweepTable

_LABEL_WIDE, _LABEL_HIGH = 0.1, 0.045
"""A label's size as a share of a chart's axes."""

# Okabe and Ito's palette, which is safe for colour-blind readers; symbols repeat the distinction.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8A8A8A", "#B8A800")
_RATIOS = [step * 10.0**decade for decade in range(-4, 3) for step in (1, 2, 5)]
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "x", "pentagon")
LEGEND_ABOVE = dict(orientation="h", x=0, y=1, xanchor="left", yanchor="bottom")


@dataclass(frozen=True)
class Chart:
    """A figure with its title and texts."""

    name: str
    title: str
    caption: str
    alternative: str
    """Alternative text."""
    figure: dict[str, Any]
_SEE_TABLE = "the table of cases below has the values."


def charts_of(sweep: SweepTable) -> list[Chart]:
    """Return the charts for which this sweep has data."""
    drawn = (speedup_chart(sweep), accuracy_chart(sweep), roofline_chart(sweep), energy_chart(sweep))
    return [chart for chart in drawn if chart is not None]


def log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Return the ticks of a logarithmic axis: decades, or 1, 2 and 5 of each if `values` span fewer than two."""
    narrow = bool(values) and max(values) < 100 * min(values)
    return {"dtick": "D2" if narrow else 1, "tickformat": "~g" if min(values, default=1.0) > 1e-4 else "~e"}


def speedup_chart(sweep: SweepTable) -> Chart | None:
    """Draw the speedup over dense for each scheme, implementations side by side, at the fewest tokens timed."""
    rows = _timed(sweep)
    if not rows:
        return None
    m = rows[0].case.m
    figure = _by_scheme(sweep, rows, lambda row: row.speedup, "%{x:.2f}× dense")
    _ratio_axis(figure, "speedup over the dense 16-bit product (log scale)")
    return Chart(
        "speedup", f"Speedup over dense at M = {m}",
        "Each mark is the median over the layers timed, the line through it their range. Right of the dashed line is "
        "faster than 16-bit.",
        f"Speedup over dense by scheme and implementation, {counted(len(rows), 'case')}; {_SEE_TABLE}",
        json.loads(figure.to_json()))


def _ratio_axis(figure: go.Figure, title: str) -> None:
    """Make x a ratio to the dense product, on a log scale, with a line where both are equal."""
    figure.update_xaxes(type="log", title_text=title, tickvals=_RATIOS, ticktext=[f"{ratio:g}×" for ratio in _RATIOS])
    figure.add_vline(x=1, line_dash="dash", line_width=1.5)


def roofline_chart(sweep: SweepTable) -> Chart | None:
    """Draw useful bandwidth as a fraction of the machine's read bandwidth."""
    rows = [row for row in _timed(sweep) if row.roofline_fraction is not None]
    if not rows:
        return None
    figure = _by_scheme(sweep, rows, lambda row: row.roofline_fraction, "%{x:.0%} of the roofline")
    figure.update_xaxes(title_text="useful bandwidth over the machine's read bandwidth", tickformat=".0%",
                        rangemode="tozero")
    figure.add_vline(x=1, line_dash="dash", line_width=1.5)
    return Chart(
        "roofline", f"Share of the roofline at M = {rows[0].case.m}",
        "Bytes that a call must move over the time it takes, relative to the measured read bandwidth. A correct kernel "
        "cannot be far right of the dashed line unless its weight stays in the cache.",
        f"Roofline fraction by scheme and implementation, {counted(len(rows), 'case')}; {_SEE_TABLE}",
        json.loads(figure.to_json()))


def energy_chart(sweep: SweepTable) -> Chart | None:
    """Draw the energy of a call over that of the dense product of the same layer, as `speedup_chart` draws the time."""
    dense = {(row.case.workload, row.case.activation, row.case.m): row.joules_per_call for row in sweep.rows
             if not row.quantized and row.status is Status.OK and row.joules_per_call}

    def share(row: CaseRow) -> float | None:
        of_dense = dense.get((row.case.workload, row.case.activation, row.case.m))
        return row.joules_per_call / of_dense if row.joules_per_call and of_dense else None

    rows = [row for row in _timed(sweep) if share(row) is not None]
    if not rows:
        return None
    figure = _by_scheme(sweep, rows, share, "%{x:.2f}× the energy of dense")
    _ratio_axis(figure, "energy of a call over the dense 16-bit product's (log scale)")
    return Chart(
        "energy", f"Energy of a call at M = {rows[0].case.m}",
        "By the device's own counter over repeated calls. Each mark is the median over the layers timed, the line "
        "through it their range. Left of the dashed line a call takes less energy than in 16 bits.",
        f"Energy over dense by scheme and implementation, {counted(len(rows), 'case')}; the table of cases has the"
        " joules.", json.loads(figure.to_json()))


def accuracy_chart(sweep: SweepTable) -> Chart | None:
    """Draw SQNR against bits per weight, one mark for each scheme."""
    # Schemes with the same size and SQNR (e5m2 and e5m2fnuz) share one mark with both names.
    together: dict[tuple[float, float], list[str]] = defaultdict(list)
    for choice in sweep.choices:
        if choice.bits_per_weight and choice.sqnr_db is not None and not choice.of_canaries:
            together[round(choice.bits_per_weight, 2), round(choice.sqnr_db, 1)].append(choice.scheme)
    if not together:
        return None
    places, count = list(together), sum(map(len, together.values()))
    figure = blank_figure(height=460)
    figure.add_trace(go.Scatter(
        x=[bits for bits, _ in places], y=[noise for _, noise in places],
        text=[", ".join(together[place]) for place in places],
        mode="markers+text", textposition=label_sides(places), cliponaxis=False, showlegend=False,
        marker=dict(size=11, color=COLOURS[0]),
        customdata=[sweep.filtered(scheme=together[place][0]).rpartition("#")[2] for place in places],
        hovertemplate="%{text}<br>%{x:.2f} bits per weight<br>%{y:.1f} dB<extra></extra>",
    ))
    widths = [bits for bits, _ in places]
    # Room for the labels beside the outermost marks.
    figure.update_xaxes(title_text="bits per weight, as stored", range=[min(widths) - 0.7, max(widths) + 1.1])
    figure.update_yaxes(title_text="SQNR of the stored weight, dB")
    return Chart(
        "accuracy", "Accuracy by size",
        "How well each scheme fits a normally distributed weight, against the bits that a correct implementation "
        "stores, scales included. Up and left is better.",
        f"SQNR against bits per weight for {counted(count, 'scheme')}; the table of schemes has the values.",
        json.loads(figure.to_json()))


def _timed(sweep: SweepTable) -> list[CaseRow]:
    """Return the correct, timed, quantized cases at the fewest tokens, without impossible numbers."""
    rows = [row for row in sweep.rows if row.status is Status.OK and row.ranked and row.quantized]
    fewest = min((row.case.m for row in rows), default=0)
    return [row for row in rows if row.case.m == fewest]


def _by_scheme(
    sweep: SweepTable, rows: list[CaseRow], value: Callable[[CaseRow], float | None], says: str
) -> go.Figure:
    """Return a dot plot with a row for each scheme and a mark for each implementation."""
    schemes = [scheme for scheme in sweep.schemes if any(row.case.scheme == scheme for row in rows)]
    names = sorted({row.case.implementation for row in rows})
    figure = blank_figure(height=110 + 30 * len(schemes))
    for index, name in enumerate(names):
        grouped: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row.case.implementation == name and (number := value(row)) is not None:
                grouped[row.case.scheme].append(number)
        own = [scheme for scheme in schemes if scheme in grouped]
        middles = [median(grouped[scheme]) for scheme in own]
        # Marks of one scheme are offset vertically, in the legend's order.
        offset = (index - (len(names) - 1) / 2) * min(0.7 / len(names), 0.14)
        figure.add_trace(go.Scatter(
            name=name, x=[round(middle, 5) for middle in middles],
            y=[schemes.index(scheme) + offset for scheme in own], mode="markers",
            marker=dict(size=10, color=COLOURS[index % len(COLOURS)], symbol=SYMBOLS[index % len(SYMBOLS)]),
            error_x=dict(
                type="data", symmetric=False, thickness=1.5, width=0, color=COLOURS[index % len(COLOURS)],
                array=[round(max(grouped[scheme]) - middle, 5) for scheme, middle in zip(own, middles, strict=True)],
                arrayminus=[round(middle - min(grouped[scheme]), 5)
                            for scheme, middle in zip(own, middles, strict=True)],
            ),
            text=own, customdata=[sweep.filtered(implementation=name, scheme=scheme).rpartition("#")[2]
                                  for scheme in own],
            hovertemplate=f"{name}, %{{text}}<br>{says}<extra></extra>",
        ))
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(schemes))),
                        ticktext=[_with_quality(sweep, scheme) for scheme in schemes],
                        range=[len(schemes) - 0.4, -0.6], zeroline=False)
    figure.update_layout(legend=LEGEND_ABOVE)
    return figure


def _with_quality(sweep: SweepTable, scheme: str) -> str:
    """Return a scheme with its SQNR, so that speed is never shown without quality."""
    return f"{scheme}  {sweep.sqnr_db[scheme]:.1f} dB" if scheme in sweep.sqnr_db else scheme


def label_sides(points: list[tuple[float, float]]) -> list[str]:
    """Return each label's position relative to its mark, so that neighbouring labels do not overlap."""
    sides = []
    for point in points:
        bits, noise = point
        near = [other for other in points if other != point and abs(other[0] - bits) < 1.2
                and abs(other[1] - noise) < 2.5]
        left, right = any(other[0] < bits for other in near), any(other[0] > bits for other in near)
        if left and right:
            sides.append("top center" if all(other[1] <= noise for other in near) else "bottom center")
        else:
            at_left = right or not near and bits > 7
            sides.append("middle left" if at_left else "middle right" if left else "top center")
    return sides


def shared_labels(points: Sequence[tuple[float, float]], names: Sequence[str], *, from_zero: bool) -> list[str]:
    """Return each mark's label on a logarithmic y axis; marks whose labels would overlap share one with all names.

    from_zero : whether the x axis begins at 0 instead of the first mark
    """
    wide = (max((x for x, _ in points), default=0.0)
            - (0.0 if from_zero else min((x for x, _ in points), default=0.0))) or 1.0
    heights = [math.log10(y) for _, y in points]
    high = (max(heights, default=0.0) - min(heights, default=0.0)) or 1.0
    labels, placed = [""] * len(points), list[int]()
    for at in sorted(range(len(points)), key=lambda at: heights[at]):
        near = [other for other in placed if abs(points[other][0] - points[at][0]) < _LABEL_WIDE * wide
                and abs(heights[other] - heights[at]) < _LABEL_HIGH * high]
        if not near:
            placed.append(at)
        first = near[-1] if near else at
        known = labels[first].split(", ") if labels[first] else []
        labels[first] = ", ".join(dict.fromkeys([*known, names[at]]))
    return labels


def blank_figure(height: int) -> go.Figure:
    """Return a figure in the page's colours."""
    figure = go.Figure()
    figure.update_layout(template="none", height=height, margin=dict(l=8, r=24, t=16, b=48), hovermode="closest",
                         dragmode=False, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)
    return figure

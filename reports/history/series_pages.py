"""The page of one series: charts of a case from build to build, and its confirmations."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any

import numpy as np

from fpxbench.counted import counted
from fpxbench.records.record import Build
from fpxbench.records.verdict import BY_SEVERITY, Status
from fpxbench.regressions.change_report import State, Suspect
from fpxbench.regressions.confirmation import Confirmation
from fpxbench.regressions.decision_rule import BEFORE
from fpxbench.regressions.events import METRIC_RULES
from fpxbench.regressions.result_changes import PanelChanges
from fpxbench.regressions.series import Panel
from fpxbench.reports.history.regression_groups import RegressionLine
from fpxbench.reports.history.sparkline import SIGMAS, band, not_ok
from fpxbench.reports.sweep.charts import Chart, blank_figure

ROOT = "../../../"
"""Relative path from the folder of these pages to the site's root."""
TICKS = 8
MOST_POINTS = 60
"""Largest number of builds in the page's table; the chart shows all."""

_TIME, _DENSE, _CONFIRMATION = "#0072B2", "#8A8A8A", "#CC79A7"
_STATUS_COLOURS = {
    Status.OK: "#009E73", Status.WRONG: "#D55E00", Status.NONFINITE: "#E69F00", Status.CRASH: "#8E1B5A",
    Status.TIMEOUT: "#6A51C7",
    Status.OOM: "#CC79A7", Status.ERROR: "#C8102E", Status.UNSUPPORTED: "#8A8A8A", Status.MISSING: "#B0B0B0",
}
"""Colours that are legible on light and dark pages."""


@dataclass(frozen=True)
class SeriesPoint:
    """One build in the table of the page."""

    tag: str
    date: str | None
    page: str
    """URL of the case's page on that build, relative to the site's root; empty if it has none."""
    status: Status
    summary: str
    median_us: float | None
    baseline_us: float | None


@dataclass(frozen=True)
class SeriesPage:
    """The contents of the page of one series."""

    page: str
    case: str
    machine: str
    device: str
    channel: str
    variant: str
    lines: tuple[RegressionLine, ...]
    """Its changes, the newest first."""
    confirmations: tuple[Confirmation, ...]
    charts: tuple[Chart, ...]
    points: tuple[SeriesPoint, ...]
    """Newest first."""
    builds: int


def series_pages(one: PanelChanges, lines: Iterable[RegressionLine], confirmations: Mapping[str, Confirmation],
                 pages: Mapping[str, str], page_of: Callable[[Build, str], str]) -> Iterable[SeriesPage]:
    """Yield the page of each series in `pages` (paths by case). `page_of` returns the URL of a case's page on a build,
    or an empty string."""
    by_case: dict[str, list[RegressionLine]] = {case: [] for case in pages}
    for line in lines:
        if line.case in by_case:
            by_case[line.case].append(line)
    suspects: dict[str, list[Suspect]] = {case: [] for case in pages}
    for suspect in one.suspects:
        if suspect.series.case in suspects:
            suspects[suspect.series.case].append(suspect)
    for case, page in pages.items():
        listed = sorted(by_case[case], key=lambda line: -one.panel.column[line.since_key])
        yield _series_page(one.panel, one.panel.row[case], page, listed, suspects[case], confirmations, page_of)


def _series_page(panel: Panel, row: int, page: str, lines: list[RegressionLine], suspects: list[Suspect],
                 confirmations: Mapping[str, Confirmation], page_of: Callable[[Build, str], str]) -> SeriesPage:
    points = list(_points(panel, row, page_of))
    answered = [confirmations[line.id] for line in lines if line.id in confirmations]
    charts = [time_chart(panel, row, suspects, confirmations,
                         [ROOT + point.page if point.page else "" for point in points])]
    charts += [figure_chart(panel, row, metric, [line for line in lines if line.metric == metric])
               for metric in METRIC_RULES if any(line.metric == metric for line in lines)]
    measured = [point for point in points if point.tag]
    return SeriesPage(
        page=page, case=panel.cases[row], machine=panel.machine, device=panel.device, channel=panel.channel,
        variant=panel.variant, lines=tuple(lines), confirmations=tuple(answered), charts=tuple(charts),
        points=tuple(measured[::-1][:MOST_POINTS]), builds=len(measured))


def _points(panel: Panel, row: int, page_of: Callable[[Build, str], str]) -> Iterable[SeriesPoint]:
    """Yield a point for each build of the panel; points of builds that did not measure the case have no tag."""
    case, numbers = panel.cases[row], panel.verdict[row].tolist()
    times = [[time if math.isfinite(time) else None for time in panel.metrics[name][row].tolist()]
             for name in ("median_us", "baseline_us")]
    for build, tag, number, *both in zip(panel.builds, panel.tags, numbers, *times, strict=True):
        if number < 0:
            yield SeriesPoint("", build.date, "", Status.MISSING, "", *both)
        else:
            verdict = panel.verdicts[number]
            yield SeriesPoint(tag, build.date, page_of(build, case), Status(verdict.status), verdict.summary, *both)


# ---- charts ----------------------------------------------------------------------------------------------------------

def time_chart(panel: Panel, row: int, suspects: Sequence[Suspect], confirmations: Mapping[str, Confirmation],
               links: list[str]) -> Chart:
    """Draw times, levels with their noise, changes with their intervals, confirmations, verdicts, and the dense product
    of the same runs."""
    figure, traces = _Figure(height=470), _Traces()
    times = panel.metrics["median_us"][row]
    timed = bool(np.isfinite(times).any())
    believed = [suspect for suspect in suspects if suspect.state is not State.REFUTED]
    if timed:
        steps = sorted({0, *(panel.column[suspect.first_bad.key] for suspect in believed)})
        for begin, end in zip(steps, [*steps[1:], len(panel.builds)], strict=True):
            _add_band(traces, panel, row, begin, end, show=begin == 0)
        levels = {suspect.id: level_before(panel, row, panel.column[suspect.first_bad.key], steps)
                  for suspect in suspects}
        for number, suspect in enumerate(believed):
            _add_change(figure, traces, panel, suspect, levels[suspect.id], show=number == 0)
        _add_points(traces, "time", panel, times, links, _TIME, "y", "circle")
        _add_points(traces, "dense, same run", panel, panel.metrics["baseline_us"][row], links, _DENSE, "y2", "square")
        confirmed = [(suspect, confirmations[suspect.id]) for suspect in suspects if suspect.id in confirmations
                     and confirmations[suspect.id].time]
        _add_confirmations(traces, panel, confirmed, levels)
    _add_verdicts(traces, panel, row, links)
    for begin, end, status in not_ok(panel, row, 0, len(panel.builds)):
        figure.shapes.append({"type": "rect", "xref": "x", "yref": "paper", "x0": begin - 0.5, "x1": end - 0.5,
                              "y0": 0, "y1": 1, "line": {"width": 0}, "layer": "below",
                              "fillcolor": _STATUS_COLOURS[status], "opacity": 0.16})
    _dress(figure, panel)
    verdicts = {"showticklabels": False, "showgrid": False, "zeroline": False, "range": [-1, 1], "fixedrange": True}
    if timed:
        figure.set("yaxis", domain=[0.4, 1], title={"text": "time, µs"})
        figure.set("yaxis2", domain=[0.13, 0.34], title={"text": "dense, µs"}, automargin=True, zeroline=False)
        figure.set("yaxis3", domain=[0, 0.07], **verdicts)
    else:
        figure.layout["height"] = 190
        figure.set("yaxis3", domain=[0, 1], **verdicts)
    return Chart(
        "time", "Time and verdict, build by build" if timed else "Verdict, build by build",
        f"Blue: the median time on each build, and the level ± {SIGMAS:g} σ of the builds around it (§2). Orange: a "
        "change, with the 95% interval of the new level when the change was found (§3, §7). Purple: the confirmation, "
        "both builds run again. Grey: the dense product in the same runs; where it moves too, the machine changed "
        "(§5). The row below has a mark for each build; a coloured background means that the case was not ok. Click a "
        "mark to open the case on that build, if it has a page.",
        f"Time of {panel.cases[row]} on {counted(len(panel.builds), 'build')}; the table below has the newest.",
        figure.of(traces))


def figure_chart(panel: Panel, row: int, metric: str, lines: Sequence[RegressionLine]) -> Chart:
    """Draw an exact metric that changed between runs."""
    words, unit, _ = METRIC_RULES[metric]
    figure, traces = _Figure(height=260), _Traces()
    _add_points(traces, words, panel, panel.metrics[metric][row], [], _TIME, "y", "circle")
    for line in lines:
        figure.mark_change(panel.column[line.since_key])
    _dress(figure, panel)
    figure.layout["showlegend"] = False
    figure.set("yaxis", title={"text": f"{words}, {unit}" if unit else words})
    return Chart(metric.replace("_", "-"), words[0].upper() + words[1:], "The dashed line marks the change (§8).",
                 f"{words} of {panel.cases[row]} on {counted(len(panel.builds), 'build')}.", figure.of(traces))


class _Traces(list[dict[str, Any]]):
    """Traces of a figure in plotly.js's JSON. plotly.py would validate and copy each of thousands of points."""

    def add(self, **trace: Any) -> None:
        self.append({"type": "scatter"} | {name: value for name, value in trace.items() if value is not None})


@cache
def _blank_layout() -> str:
    return json.dumps(json.loads(blank_figure(height=100).to_json())["layout"])


class _Figure:
    """A figure's layout in plotly.js's JSON, made without plotly.py for speed: there are thousands of pages."""

    def __init__(self, height: int) -> None:
        self.layout: dict[str, Any] = json.loads(_blank_layout()) | {"height": height}
        self.shapes: list[dict[str, Any]] = []

    def set(self, axis: str, **values: Any) -> None:
        """Set properties of an axis."""
        self.layout[axis] = self.layout.get(axis, {}) | values

    def mark_change(self, column: int) -> None:
        """Draw a dashed line before a column, through the uppermost chart."""
        self.shapes.append({"type": "line", "xref": "x", "yref": "y domain", "x0": column - 0.5, "x1": column - 0.5,
                            "y0": 0, "y1": 1, "line": {"dash": "dash", "width": 1.5}})

    def of(self, traces: _Traces) -> dict[str, Any]:
        """Return the figure with these traces, as JSON."""
        return {"data": list(traces), "layout": self.layout | ({"shapes": self.shapes} if self.shapes else {})}


def _add_band(traces: _Traces, panel: Panel, row: int, begin: int, end: int, show: bool) -> None:
    level = band(panel, row, begin, end)
    if level is None:
        return
    low, high = (round(math.exp(value), 4) for value in level)
    traces.add(
        name=f"level ± {SIGMAS:g} σ", legendgroup="level", showlegend=show,
        x=[begin - 0.5, end - 0.5, end - 0.5, begin - 0.5], y=[low, low, high, high],
        fill="toself", fillcolor="rgba(0,114,178,0.16)", line=dict(width=0), mode="lines", hoverinfo="skip")


def level_before(panel: Panel, row: int, change: int, steps: Sequence[int]) -> float | None:
    """Return the level before column `change`, in µs, over at most `BEFORE` builds since the previous of the `steps`
    (§2, §6)."""
    level = band(panel, row, max(change - BEFORE, max((step for step in steps if step < change), default=0)), change)
    return math.exp((level[0] + level[1]) / 2) if level else None


def _add_change(figure: _Figure, traces: _Traces, panel: Panel, suspect: Suspect, before_us: float | None,
                show: bool) -> None:
    """Draw the change, and the interval of the new level over the builds that showed it."""
    first, raised = panel.column[suspect.first_bad.key], panel.column[suspect.raised_at.key]
    figure.mark_change(first)
    if before_us is None:
        return
    low, high = (round(before_us * (1 + end), 4) for end in suspect.interval)
    traces.add(
        name="95% interval of the change", legendgroup="change", showlegend=show,
        x=[first - 0.5, raised + 0.5, raised + 0.5, first - 0.5],
        y=[low, low, high, high], fill="toself", fillcolor="rgba(213,94,0,0.30)", line=dict(width=0), mode="lines",
        hoverinfo="skip")


def _add_confirmations(traces: _Traces, panel: Panel, confirmed: Sequence[tuple[Suspect, Confirmation]],
                      levels: Mapping[str, float | None]) -> None:
    known = [(suspect, confirmation, confirmation.time, before_us) for suspect, confirmation in confirmed
             if (before_us := levels[suspect.id]) is not None and confirmation.time is not None]
    for number, (suspect, confirmation, ratio, before_us) in enumerate(known):
        value = before_us * ratio.value
        low, high = (before_us * end if end else value for end in (ratio.low, ratio.high))
        traces.add(
            name="both builds again", legendgroup="again", showlegend=number == 0,
            x=[panel.column[suspect.raised_at.key]], y=[round(value, 4)],
            mode="markers", marker=dict(symbol="diamond", size=12, color=_CONFIRMATION),
            error_y=dict(type="data", symmetric=False, array=[high - value], arrayminus=[value - low], thickness=2,
                         width=6, color=_CONFIRMATION),
            text=[escape(confirmation.headline)], hovertemplate="%{text}<extra></extra>")


def _add_points(traces: _Traces, name: str, panel: Panel, values: np.ndarray, links: list[str], colour: str,
                axis: str, symbol: str) -> None:
    # A missing value breaks the line.
    shown = [float(f"{value:.6g}") if math.isfinite(value) else None for value in values.tolist()]
    traces.add(
        name=name, x=list(range(len(shown))), y=shown, yaxis=axis, mode="lines+markers",
        line=dict(width=1, color=colour), marker=dict(size=6 if len(shown) < 200 else 4, color=colour, symbol=symbol),
        text=[_label(panel, column) for column in range(len(shown))], customdata=links or None,
        hovertemplate="%{text}<br>%{y:.6g}<extra>" + name + "</extra>")


def _add_verdicts(traces: _Traces, panel: Panel, row: int, links: list[str]) -> None:
    places = panel.severity[row]
    shown = np.flatnonzero(places >= 0).tolist()
    statuses = [BY_SEVERITY[places[column]] for column in shown]
    traces.add(
        name="verdict", x=shown, y=[0] * len(shown), yaxis="y3", mode="markers", showlegend=False,
        marker=dict(size=8, symbol=["square" if status is Status.OK else "x" for status in statuses],
                    color=[_STATUS_COLOURS[status] for status in statuses]),
        text=[f"{_label(panel, column)}<br>{panel.verdicts[int(panel.verdict[row, column])].headline}"
              for column in shown],
        customdata=[links[column] for column in shown], hovertemplate="%{text}<extra></extra>")


def _label(panel: Panel, column: int) -> str:
    date, tag = panel.builds[column].date, panel.tags[column]
    return tag if not date or date.replace("-", "") in tag else f"{tag}, {date}"


def _dress(figure: _Figure, panel: Panel) -> None:
    """Label the builds along the x axis, evenly spaced, since only their order counts (§1)."""
    count = len(panel.builds)
    ticks = sorted({round(number * (count - 1) / max(1, min(TICKS, count) - 1)) for number in range(min(TICKS, count))})
    figure.set("xaxis", tickmode="array", tickvals=ticks,
               ticktext=[panel.tags[column].removeprefix("nightly-") for column in ticks],
               range=[-1, count], anchor="free", position=0)
    figure.layout["legend"] = {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}

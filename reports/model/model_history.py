"""A model's rows from build to build on one machine: speed, quality, memory and energy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import plotly.graph_objects as go

from fpxbench.counted import counted
from fpxbench.model.generate_record import GenerationRecord
from fpxbench.records.record import Build, Machine
from fpxbench.reports.model.generation_table import ModelPage
from fpxbench.reports.model.tensor_table import build_age
from fpxbench.reports.sweep.charts import COLOURS, LEGEND_ABOVE, SYMBOLS, Chart, blank_figure, log_ticks

FILE = "models.html"


@dataclass(frozen=True)
class Metric:
    """A number of a row over builds, with its confidence interval if it has one.

    log : logarithmic axis
    timed : whether it depends on how steps are run and timed
    """

    name: str
    unit: str
    value: Callable[[GenerationRecord], float | None]
    interval: Callable[[GenerationRecord], tuple[float, float] | None] = lambda record: None
    log: bool = False
    timed: bool = False


def _kl(record: GenerationRecord) -> float | None:
    return record.quality[0].kl.mean.value if record.quality and record.quality[0].kl else None


def _kl_interval(record: GenerationRecord) -> tuple[float, float] | None:
    mean = record.quality[0].kl.mean if record.quality and record.quality[0].kl else None
    return (mean.low, mean.high) if mean else None


def _peak_gb(record: GenerationRecord) -> float | None:
    return record.traffic.peak_bytes / 1e9 if record.traffic and record.traffic.peak_bytes else None


METRICS = (
    Metric("Speed", "tokens/s", lambda record: record.speed.tokens_per_s if record.speed else None,
           lambda record: record.speed.tokens_per_s_ci95 if record.speed else None, timed=True),
    Metric("KL divergence from the unquantized model", "nats", _kl, _kl_interval, log=True),
    Metric("Peak memory", "GB", _peak_gb),
    Metric("Energy", "joules per token", lambda record: record.traffic.joules_per_token if record.traffic else None,
           timed=True),
)


_GAP: tuple[str | None, float | None, tuple[float, float], int | None] = (None, None, (0.0, 0.0), None)
"""Between two points that no line connects."""


def _method(record: GenerationRecord) -> int | None:
    return record.speed.method if record.speed else None


@dataclass(frozen=True)
class HistoryRow:
    """One row of a model's table, with its record on each build; None where it was not measured."""

    name: str
    records: list[GenerationRecord | None]


@dataclass(frozen=True)
class ModelHistory:
    """One model at one batch size, on two builds or more, oldest first."""

    title: str
    builds: list[Build]
    rows: list[HistoryRow]

    @property
    def labels(self) -> list[str]:
        return [build.stem for build in self.builds]

    def charts(self, number: int) -> list[Chart]:
        """Return a chart for each metric that any record has."""
        return [chart for at, metric in enumerate(METRICS) if (chart := self._chart(metric, f"history-{number}-{at}"))]

    def _chart(self, metric: Metric, name: str) -> Chart | None:
        figure, drawn, broken = blank_figure(height=380), [], False
        for index, row in enumerate(self.rows):
            points = [(label, metric.value(record), metric.interval(record), _method(record) if metric.timed else None)
                      for label, record in zip(self.labels, row.records, strict=True) if record is not None]
            known = [(label, value, interval or (value, value), method) for label, value, interval, method in points
                     if value is not None and (value > 0 or not metric.log)]
            if not known:
                continue
            drawn.append([value for _, value, _, _ in known])
            parts = [list(part) for _, part in groupby(known, lambda point: point[3])]
            broken |= len(parts) > 1
            drawn_points = [point for part in parts for point in (_GAP, *part)][1:]
            figure.add_trace(go.Scatter(
                x=[label for label, *_ in drawn_points], y=[value for _, value, *_ in drawn_points], name=row.name,
                mode="lines+markers", line=dict(color=COLOURS[index % len(COLOURS)], width=1.5),
                marker=dict(symbol=SYMBOLS[index % len(SYMBOLS)], size=8),
                error_y=dict(type="data", symmetric=False, thickness=1.2, width=3,
                             array=[None if value is None else high - value
                                    for _, value, (_, high), _ in drawn_points],
                             arrayminus=[None if value is None else value - low
                                         for _, value, (low, _), _ in drawn_points]),
                hovertemplate=f"%{{x}}<br>{row.name}<br>%{{y:.3g}} {metric.unit}<extra></extra>"))
        if not drawn:
            return None
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=self.labels, title_text="build")
        figure.update_yaxes(title_text=f"{metric.unit}{' (log scale)' if metric.log else ''}",
                            type="log" if metric.log else "linear",
                            **(log_ticks(sum(drawn, [])) if metric.log else {"rangemode": "tozero"}))
        figure.update_layout(legend=LEGEND_ABOVE)
        gaps = " A line is broken where fpxbench began to run or time steps in another way." if broken else ""
        return Chart(name, metric.name,
                     f"Each mark is the newest measurement on a build, with its 95% interval if there is one.{gaps}",
                     f"{metric.name} of {len(drawn)} rows on {counted(len(self.builds), 'build')}; the table has the"
                     " numbers.", json.loads(figure.to_json()))


@dataclass(frozen=True)
class MachineModels:
    """Every model of a machine that was measured on two builds or more."""

    name: str
    machine: Machine
    models: list[ModelHistory]

    @property
    def path(self) -> str:
        return f"machines/{self.name}/{FILE}"


def machine_histories(pages: Sequence[ModelPage]) -> list[MachineModels]:
    """Return the histories of the machines that have any."""
    found = []
    for name in dict.fromkeys(page.folder[0] for page in pages):
        of_machine = sorted((page for page in pages if page.folder[0] == name), key=lambda page: build_age(page.build))
        titles = dict.fromkeys(table.title for page in of_machine for table in page.tables)
        models = [model for title in titles if len((model := _history(title, of_machine)).builds) > 1]
        if models:
            found.append(MachineModels(name, of_machine[-1].machine, models))
    return found


def _history(title: str, pages: Sequence[ModelPage]) -> ModelHistory:
    tables = [(page.build, table) for page in pages for table in page.tables if table.title == title]
    rows = {row.name: row.name for _, table in tables for row in table.rows}
    by_build = [{row.name: row.record for row in table.rows} for _, table in tables]
    return ModelHistory(title, [build for build, _ in tables],
                        [HistoryRow(name, [one.get(name) for one in by_build]) for name in rows])

"""An encoder's ranking of schemes, as a table and a chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from fpxbench.counted import counted
from fpxbench.model.ranking_record import RankingRecord
from fpxbench.reports.sweep.charts import Chart, blank_figure, log_ticks, shared_labels

_LEAST = 1e-8
_LEFT_BITS = 5.5
"""Below this many bits a mark is near the left edge, so its label is on the right."""


@dataclass(frozen=True)
class RankingTable:
    """The ranking of one encoder on one set of sentences, by ascending distance."""

    rows: list[RankingRecord]

    @property
    def first(self) -> RankingRecord:
        return self.rows[0]

    @property
    def title(self) -> str:
        return f"{self.first.model.name}, {self.first.sentences} sentences of {self.first.text}"

    def chart(self, number: int) -> Chart:
        """Return the chart of the distance of embeddings against bits per weight."""
        ranks = [row.rank for row in self.rows]
        points = [(each.bits_per_weight, max(each.distance.value, _LEAST)) for each in ranks]
        figure = blank_figure(height=460)
        figure.add_trace(go.Scatter(
            x=[x for x, _ in points], y=[y for _, y in points],
            text=shared_labels(points, [each.scheme for each in ranks], from_zero=False), mode="markers+text",
            cliponaxis=False,
            textposition=["middle right" if x < _LEFT_BITS else "middle left" for x, _ in points],
            customdata=[each.scheme for each in ranks],
            marker=dict(size=9, color="#0072B2"),
            error_y=dict(type="data", symmetric=False, thickness=1.5, width=3,
                         array=[each.distance.high - each.distance.value for each in ranks],
                         arrayminus=[each.distance.value - each.distance.low for each in ranks]),
            hovertemplate="%{customdata}<br>%{x:.3g} bits per weight<br>1 - cosine %{y:.3g}<extra></extra>"))
        figure.update_xaxes(title_text="bits per weight, scales included")
        figure.update_yaxes(title_text="mean of 1 − cosine (log scale)", type="log",
                            **log_ticks([y for _, y in points]))
        figure.update_layout(showlegend=False)
        return Chart(f"ranking-{number}", "Embeddings against bits",
                     "Each mark is a scheme, with weights decoded exactly. Down and left is better.",
                     f"Mean distance of embeddings against bits per weight for {counted(len(ranks), 'scheme')}; the"
                     " table has the numbers.", json.loads(figure.to_json()))


def ranking_tables(records: Sequence[RankingRecord]) -> list[RankingTable]:
    """Return the rankings among the newest records of one machine and build."""
    groups: dict[tuple[str, str, int], list[RankingRecord]] = {}
    for record in records:
        groups.setdefault((record.model.name, record.text, record.sentences), []).append(record)
    return [RankingTable(sorted(group, key=lambda record: record.rank.distance.value)) for group in groups.values()]

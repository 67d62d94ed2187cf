"""Mixed precision by layer compared with uniform schemes, as a table and a chart."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import plotly.graph_objects as go

from fpxbench.model.recommendation import MixedRecord
from fpxbench.reports.sweep.charts import Chart, blank_figure, log_ticks, shared_labels

_LEAST_KL = 1e-7


@dataclass(frozen=True)
class MixedTable:
    """The measurement of `fpxbench recommend` for one budget."""

    record: MixedRecord

    @property
    def title(self) -> str:
        return f"{self.record.model.name}, mixed precision within {self.record.mixed.budget_bits:g} bits per weight"

    @property
    def counts(self) -> list[tuple[str, int]]:
        """Number of layers of each scheme, the most first."""
        return Counter(self.record.mixed.schemes.values()).most_common()

    def chart(self, number: int) -> Chart:
        """Return the chart of KL divergence against bits per weight."""
        mixed = self.record.mixed
        found = [(one.scheme, one.bits, one.kl) for one in mixed.uniform] + [("mixed", mixed.bits, mixed.kl)]
        points = [(bits, max(kl.value, _LEAST_KL)) for _, bits, kl in found]
        figure = blank_figure(height=440)
        figure.add_trace(go.Scatter(
            x=[x for x, _ in points], y=[y for _, y in points], mode="markers+text", cliponaxis=False,
            text=shared_labels(points, [name for name, _, _ in found], from_zero=True), textposition="middle left",
            customdata=[name for name, _, _ in found],
            marker=dict(size=10, color=["#0072B2"] * len(mixed.uniform) + ["#D55E00"],
                        symbol=["circle"] * len(mixed.uniform) + ["star"]),
            error_y=dict(type="data", symmetric=False, thickness=1.5, width=3,
                         array=[kl.high - kl.value for _, _, kl in found],
                         arrayminus=[kl.value - kl.low for _, _, kl in found]),
            hovertemplate="%{customdata}<br>%{x:.3g} bits per weight<br>KL %{y:.3g}<extra></extra>"))
        figure.add_vline(x=mixed.budget_bits, line_dash="dash", line_width=1.5)
        figure.update_xaxes(title_text="bits per quantized weight, scales included", rangemode="tozero")
        figure.update_yaxes(title_text="mean KL divergence, nats (log scale)", type="log",
                            **log_ticks([y for _, y in points]))
        figure.update_layout(showlegend=False)
        return Chart(f"mixed-{number}", "Mixed precision against uniform schemes",
                     "Weights are decoded exactly, without a kernel. The star is mixed precision by layer, the"
                     " dashed line its budget. Down and left is better.",
                     f"KL divergence against bits of {len(mixed.uniform)} uniform schemes and of the mixed precision.",
                     json.loads(figure.to_json()))

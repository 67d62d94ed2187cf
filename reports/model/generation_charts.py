"""The charts of a model's table, as plotly figures in JSON."""

from __future__ import annotations

import json

import plotly.graph_objects as go

from fpxbench.counted import counted
from fpxbench.reports.model.generation_table import ModelRow, ModelTable
from fpxbench.reports.sweep.charts import COLOURS, LEGEND_ABOVE, Chart, blank_figure, log_ticks, shared_labels

_BAR, _LINE, _WRONG = "#0072B2", "#8A8A8A", "#D55E00"
_PARTS = {"products": "products_us", "attention": "attention_us", "other kernels": "between_us", "no kernel": "gaps_us"}
_LEAST_KL = 1e-7


def charts_of(table: ModelTable, number: int) -> list[Chart]:
    """Return the charts for which a table has data; `number` makes their names unique on a page."""
    drawn = (_quality_chart(table, number), _speed_chart(table, number), _parts_chart(table, number),
             _depth_chart(table, number))
    return [chart for chart in drawn if chart is not None]


def _quality_chart(table: ModelTable, number: int) -> Chart | None:
    """Draw KL divergence against the bytes of a step: the trade-off of a format."""
    placed = [(row, (row.record.traffic.step_bytes / 1e6, max(row.quality.kl.mean.value, _LEAST_KL)))
              for row in table.rows if row.quality and row.quality.kl and row.record.traffic]
    if not placed:
        return None
    rows, points = [row for row, _ in placed], [point for _, point in placed]
    front, names = _front(points), [row.record.scheme for row in rows]
    figure = blank_figure(height=440)
    figure.add_trace(go.Scatter(
        x=[points[at][0] for at in front], y=[points[at][1] for at in front], mode="lines", name="Pareto front",
        line=dict(color=_LINE, dash="dot", shape="hv"), hoverinfo="skip"))
    figure.add_trace(go.Scatter(
        x=[x for x, _ in points], y=[y for _, y in points], text=shared_labels(points, names, from_zero=True),
        mode="markers+text", textposition="middle left", cliponaxis=False, name="scheme",
        marker=dict(size=10, color=_BAR),
        customdata=[(row.name, row.tokens_per_s or 0.0) for row in rows],
        hovertemplate="%{customdata[0]}<br>%{x:.4g} MB a step<br>KL %{y:.3g}<br>%{customdata[1]:.3g} tokens/s"
                      "<extra></extra>"))
    figure.update_xaxes(title_text="weights read per step, MB", rangemode="tozero")
    figure.update_yaxes(title_text="mean KL divergence, nats (log scale)", type="log",
                        **log_ticks([y for _, y in points]))
    figure.update_layout(showlegend=False)
    return Chart(f"quality-{number}", "Quality against bytes",
                 "Each mark is a correct row. On the dotted line no other row has fewer bytes and a smaller KL"
                 " divergence. Down and left is better.",
                 f"KL divergence against bytes for {counted(len(rows), 'row')}; the table has the values.",
                 json.loads(figure.to_json()))


def _front(points: list[tuple[float, float]]) -> list[int]:
    """Return the indices of the Pareto-optimal points (both coordinates minimized), by ascending first coordinate."""
    best, found = float("inf"), []
    for at in sorted(range(len(points)), key=lambda at: points[at]):
        if points[at][1] < best:
            best = points[at][1]
            found.append(at)
    return found


def _speed_chart(table: ModelTable, number: int) -> Chart | None:
    """Draw tokens per second, with lines for bf16 and marks for the roofline."""
    timed = [(row, row.record.speed) for row in table.rows if row.possible and row.record.speed]
    if not timed:
        return None
    rows = [row for row, _ in timed]
    labels = [_with_quality(row) for row in rows]
    figure = blank_figure(height=120 + 30 * len(rows))
    figure.add_trace(go.Bar(
        y=labels, x=[speed.tokens_per_s for _, speed in timed], orientation="h", name="tokens/s", marker_color=_BAR,
        error_x=dict(type="data", symmetric=False, thickness=1.5, width=3,
                     array=[speed.tokens_per_s_ci95[1] - speed.tokens_per_s for _, speed in timed],
                     arrayminus=[speed.tokens_per_s - speed.tokens_per_s_ci95[0] for _, speed in timed]),
        hovertemplate="%{y}<br>%{x:.3g} tokens/s<extra></extra>"))
    limits = [(label, row.roofline_tokens_per_s) for label, row in zip(labels, rows, strict=True)
              if row.roofline_tokens_per_s]
    figure.add_trace(go.Scatter(
        y=[label for label, _ in limits], x=[limit for _, limit in limits], mode="markers", name="roofline",
        marker=dict(symbol="line-ns-open", size=18, color=_WRONG, line=dict(width=2)),
        hovertemplate="the memory allows %{x:.3g} tokens/s<extra></extra>"))
    for plain in table.plain:
        figure.add_vline(x=plain.speed.tokens_per_s if plain.speed else 0.0, line_width=1.5,
                         line_dash="dot" if plain.compiled else "dash")
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="tokens per second", rangemode="tozero")
    figure.update_layout(legend=LEGEND_ABOVE)
    return Chart(f"speed-{number}", "Speed against bf16 and the roofline",
                 "Median with its 95% interval, each with its KL divergence. The dashed line is bf16 in the same run"
                 f"{', the dotted one bf16 compiled' if any(plain.compiled for plain in table.plain) else ''};"
                 " the upright marks are what the memory's read bandwidth allows.",
                 f"Tokens per second of {len(rows)} rows; the table has the values.", json.loads(figure.to_json()))


def _parts_chart(table: ModelTable, number: int) -> Chart | None:
    """Draw the parts of each row's captured step."""
    traced = [(row, row.record.step) for row in table.rows if row.record.step]
    if not traced:
        return None
    labels = [_with_quality(row) for row, _ in traced]
    figure = blank_figure(height=140 + 30 * len(traced))
    for (name, part), colour in zip(_PARTS.items(), COLOURS, strict=False):
        figure.add_trace(go.Bar(
            y=labels, x=[getattr(step, part) / 1e3 for _, step in traced], orientation="h", name=name,
            marker_color=colour, hovertemplate=f"%{{y}}<br>{name} %{{x:.3g}} ms<extra></extra>"))
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(title_text="milliseconds per step", rangemode="tozero")
    figure.update_layout(barmode="stack",
                         legend={**LEGEND_ABOVE, "traceorder": "normal"})
    return Chart(f"parts-{number}", "What a step is made of",
                 "One decode step as the profiler traces it. Products are the kernels that multiply by weights; other"
                 " kernels are norms, rotary embeddings, the cache and activations. Only products read fewer bytes in"
                 " a smaller format.",
                 f"Parts of a step of {len(traced)} rows, in milliseconds.", json.loads(figure.to_json()))


def _with_quality(row: ModelRow) -> str:
    """Return a row's name with its KL divergence, so that speed is never shown without quality."""
    quality = row.quality
    return f"{row.name}  KL {quality.kl.mean.value:.2g}" if quality and quality.kl else row.name


def _depth_chart(table: ModelTable, number: int) -> Chart | None:
    """Draw the relative difference of each layer's output from the exactly decoded model's, over depth."""
    rows = [row for row in table.rows if row.record.layers]
    if not rows:
        return None
    figure = blank_figure(height=420)
    for index, row in enumerate(rows):
        layers = row.record.layers
        figure.add_trace(go.Scatter(
            x=list(range(len(layers))), y=[layer.relative or None for layer in layers], name=row.name, mode="lines",
            text=[layer.layer for layer in layers], line=dict(color=COLOURS[index % len(COLOURS)]),
            hovertemplate="%{text}<br>%{y:.2%}<extra></extra>"))
    widest = max(rows, key=lambda row: len(row.record.layers)).record.layers
    figure.add_trace(go.Scatter(
        x=list(range(len(widest))), y=[layer.noise or None for layer in widest], name="sums in another order",
        mode="lines", line=dict(color=_LINE, dash="dash"), hovertemplate="noise %{y:.2%}<extra></extra>"))
    figure.update_xaxes(title_text="quantized layer, in the order of depth")
    figure.update_yaxes(title_text="relative difference (log scale)", type="log", tickformat=".0e")
    figure.update_layout(legend=LEGEND_ABOVE)
    return Chart(f"depth-{number}", "Layer by layer",
                 "Difference of each layer's output from that of the same codes decoded exactly. A correct kernel stays"
                 " near the dashed line, which is the effect of another order of summation.",
                 f"Relative differences of the outputs of {len(widest)} layers; hovering names the layer.",
                 json.loads(figure.to_json()))

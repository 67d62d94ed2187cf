"""The page of one checkpoint: layers by findings, with a histogram of codes for each layer that was read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fpxbench.checkpoint.checkpoint_report import CheckpointReport, Evidence, LayerReport
from fpxbench.numbers.scheme import scheme_named
from fpxbench.reports import formatting
from fpxbench.reports.pages import static_files

MOST_LAYERS = 1000
"""Rows of the page; layers with findings come first, then those that were read."""
WIDTH, HEIGHT = 192, 40


@dataclass(frozen=True)
class Bar:
    """One code of a histogram: its place in pixels, what it is, and whether it is a number."""

    x: float
    width: float
    height: float
    title: str
    finite: bool


@dataclass(frozen=True)
class LayerRow:
    """A layer, the conventions that its numbers contradict, and its histogram."""

    layer: LayerReport
    doubts: list[Evidence]
    bars: list[Bar]

    @property
    def wrong(self) -> bool:
        return bool(self.layer.problems or self.doubts)


def write_checkpoint_page(report: CheckpointReport, output: Path) -> Path:
    """Write ``index.html`` and its style sheet to the folder `output`; return the page's path.

    Names and messages come from the file: all are escaped, and the page runs no script.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("fpxbench.reports"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    templates.filters.update(nbytes=formatting.nbytes)
    rows = sorted(map(_row, report.layers), key=lambda row: (not row.wrong, not row.bars))
    findings = Counter(problem.split(": ", 1)[-1] for each in report.layers for problem in each.problems)
    page = templates.get_template("checkpoint.html").render(
        report=report, rows=rows[:MOST_LAYERS], left_out=len(rows) - MOST_LAYERS, WIDTH=WIDTH, HEIGHT=HEIGHT,
        wrong=sum(row.wrong for row in rows), groups=_groups(report.layers), findings=findings.most_common(20),
    )
    (output / "assets").mkdir(parents=True, exist_ok=True)
    (output / "assets" / "style.css").write_bytes(static_files()["style.css"])
    (output / "index.html").write_text(page, encoding="utf-8")
    return output / "index.html"


def _row(layer: LayerReport) -> LayerRow:
    return LayerRow(layer, [found for found in layer.evidence if found.fits_better], _bars(layer))


def _bars(layer: LayerReport) -> list[Bar]:
    """Return a bar for each code, by ascending value; codes that are no numbers come last."""
    if not layer.histogram or layer.scheme is None or not any(layer.histogram):
        return []
    fmt = scheme_named(layer.scheme).format
    if fmt is None:
        return []
    values = [fmt.value(code) for code in range(len(layer.histogram))]
    order = sorted(range(len(values)), key=lambda code: (
        not math.isfinite(values[code]), values[code] if math.isfinite(values[code]) else 0.0,
        -math.copysign(1.0, values[code]), code))
    width, most = WIDTH / len(order), max(layer.histogram)
    return [
        Bar(round(at * width, 3), round(width * 0.9, 3), max(round(HEIGHT * layer.histogram[code] / most, 2), 1.0),
            f"{code:#04x} = {values[code]:g}: {layer.histogram[code]}", math.isfinite(values[code]))
        for at, code in enumerate(order) if layer.histogram[code]
    ]


def _groups(layers: list[LayerReport]) -> list[tuple[str, str, int, int, float]]:
    """Return dialect, scheme, layers, bytes and bits a weight."""
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for each in layers:
        groups.setdefault((each.dialect, each.scheme or f"{each.stored_as}, of no scheme"), []).append(each)
    return [
        (dialect, scheme, len(found), sum(each.nbytes for each in found),
         8 * sum(each.nbytes for each in found) / max(1, sum(each.n * each.k * each.experts for each in found)))
        for (dialect, scheme), found in groups.items()
    ]

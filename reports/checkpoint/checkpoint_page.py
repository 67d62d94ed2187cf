"""The page of one checkpoint: its layers, those with findings first, with histograms of codes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fpxbench.checkpoint.checkpoint_report import CheckpointReport, Evidence, LayerReport
from fpxbench.numbers.scheme import scheme_named
from fpxbench.reports.rendering import templates
from fpxbench.reports.static_files import static_files

MOST_LAYERS = 1000
"""Largest number of rows of the page."""
WIDTH, HEIGHT = 192, 40


@dataclass(frozen=True)
class Bar:
    """One code of a histogram: its position in pixels, title, and whether it is a finite number."""

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


@dataclass(frozen=True)
class CheckpointPage:
    """One examined checkpoint as its page shows it.

    name : stem of its file in ``RESULTS/checkpoints`` and of its page
    rows : layers with findings, then those that were read, at most `MOST_LAYERS`
    wrong : number of layers with a finding
    groups : dialect, scheme, number of layers, bytes and bits per weight
    findings : messages with the number of layers that have them, the most frequent first
    """

    name: str
    report: CheckpointReport
    rows: list[LayerRow]
    wrong: int
    groups: list[tuple[str, str, int, int, float]]
    findings: list[tuple[str, int]]

    @property
    def left_out(self) -> int:
        return len(self.report.layers) - len(self.rows)

    @property
    def path(self) -> str:
        """The page's path, relative to the site's root."""
        return f"checkpoints/{self.name}.html"

    @property
    def title(self) -> str:
        """The checkpoint's own name."""
        return Path(self.report.path).name or self.report.path


def checkpoint_page(name: str, report: CheckpointReport) -> CheckpointPage:
    """Return the contents of the page of `report`."""
    rows = sorted(map(_row, report.layers), key=lambda row: (not row.wrong, not row.bars))
    findings = Counter(problem.split(": ", 1)[-1] for each in report.layers for problem in each.problems)
    return CheckpointPage(name, report, rows[:MOST_LAYERS], sum(row.wrong for row in rows), _groups(report.layers),
                          findings.most_common(20))


def render(page: CheckpointPage, *, root: str = "", home: str | None = None) -> str:
    """Return the page's HTML. `root` is the relative path to the folder of ``assets``; `home`, if any, to the first
    page.

    Names and messages come from the file: all are escaped, and the page runs no script.
    """
    return templates().get_template("checkpoint.html").render(
        page=page, report=page.report, root=root, home=home, WIDTH=WIDTH, HEIGHT=HEIGHT)


def write_checkpoint_page(report: CheckpointReport, output: Path) -> Path:
    """Write ``index.html`` and its style sheet to the folder `output`; return the page's path."""
    (output / "assets").mkdir(parents=True, exist_ok=True)
    (output / "assets" / "style.css").write_bytes(static_files()["style.css"])
    (output / "index.html").write_text(render(checkpoint_page("index", report)), encoding="utf-8")
    return output / "index.html"


def _row(layer: LayerReport) -> LayerRow:
    return LayerRow(layer, [found for found in layer.evidence if found.fits_better], _bars(layer))


def _bars(layer: LayerReport) -> list[Bar]:
    """Return a bar for each code, by ascending value; codes that are not numbers come last."""
    if not layer.histogram or layer.scheme is None or not any(layer.histogram):
        return []
    try:
        fmt = scheme_named(layer.scheme).format
    except ValueError:      # a newer fpxbench's
        return []
    if fmt is None or len(layer.histogram) > 1 << fmt.bits:
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
    """Return dialect, scheme, number of layers, bytes and bits per weight of each group."""
    groups: dict[tuple[str, str], list[LayerReport]] = {}
    for each in layers:
        groups.setdefault((each.dialect, each.scheme or f"{each.stored_as}, no scheme"), []).append(each)
    return [
        (dialect, scheme, len(found), sum(each.nbytes for each in found),
         8 * sum(each.nbytes for each in found) / max(1, sum(each.n * each.k * each.experts for each in found)))
        for (dialect, scheme), found in groups.items()
    ]

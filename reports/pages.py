"""Render the site's pages: one method for each, from a view to HTML.

Records may come from other machines: every template is autoescaped, JSON goes through ``tojson``, URLs are quoted, and
each page's content security policy forbids scripts that are not files of the site."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fpxbench.model.tensor_record import OperationOutcome
from fpxbench.records.record import Record
from fpxbench.records.store import BrokenLine
from fpxbench.records.verdict import SEVERITY, Status
from fpxbench.reports.casts.conversion_pages import CastChanges, CastSweep, ConversionMatrix, ConversionRow
from fpxbench.reports.casts.decode_speed_table import DecodeTable
from fpxbench.reports.checkpoint.checkpoint_page import CheckpointPage, render as render_checkpoint
from fpxbench.reports.history.build_pages import BuildPage
from fpxbench.reports.history.regression_groups import RegressionSummary
from fpxbench.reports.history.series_pages import ROOT, SeriesPage
from fpxbench.reports.model import generation_charts
from fpxbench.reports.model.generation_table import FILE as MODELS, ModelPage
from fpxbench.reports.model.model_chapter import ModelChapter
from fpxbench.reports.model.model_history import MachineModels
from fpxbench.reports.model.tensor_table import BADGES, TensorPage
from fpxbench.reports.rendering import templates
from fpxbench.reports.sweep.case_row import CaseRow
from fpxbench.reports.sweep.charts import Chart, charts_of
from fpxbench.reports.sweep.device_spread_table import SpreadTable
from fpxbench.reports.sweep.dot_plot import dot_plot_of, floor_of
from fpxbench.reports.sweep.problems import ReportProblem, Section, headline
from fpxbench.reports.sweep.speedup_curves import speedup_curves
from fpxbench.reports.sweep.sweep_table import SweepHeading, SweepTable
from fpxbench.reports.targets.support_build import BuildDiff
from fpxbench.reports.targets.support_row import CHECKS, ArchitectureDetail, Scripts
from fpxbench.reports.targets.support_table import SupportMatrix, SupportRow, detail
from fpxbench.sweep.repro_script import repro_script
from fpxbench.targets.operations import OPERATIONS
from fpxbench.whole_file import write_whole

FOLDERS = "machines", "builds", "support", "checkpoints"
"""The report's folders: pages of an earlier report that are not written again are removed from them."""
SWEEPS_IN_FULL = 3
"""Number of newest sweeps whose matrix the overview shows; the others are rows of a table."""
MOST_BROKEN_LINES = 50


class Pages:
    """Renders the site's pages into a folder.

    failures : pages that could not be rendered, with the reason
    written : files of the pages so far, including those kept
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self.written: set[Path] = set()
        self.failures: list[str] = []
        self._templates = templates()

    def write(self, path: str, render: Callable[..., str], *views: Any) -> None:
        """Write ``render(*views)`` to `path` below the site's folder.

        A single odd record must not prevent the report: a page that cannot be rendered becomes a page with the reason,
        and is listed in `failures`. Raise ValueError for a folder that is not one of `FOLDERS`."""
        if "/" in path and path.partition("/")[0] not in FOLDERS:
            raise ValueError(f"{path} is in none of {', '.join(FOLDERS)}: add its folder to FOLDERS")
        try:
            page = render(*views)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.failures.append(f"{path} could not be made: {reason}")
            page = self._render("failed_page.html", root="../" * path.count("/"), path=path, reason=reason)
        target = self._output / path
        self.written.add(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, page)

    def keep(self, path: str) -> None:
        """Keep the page that an earlier report wrote."""
        self.written.add(self._output / path)

    def overview(self, sweeps: Sequence[SweepTable], problems: Sequence[ReportProblem],
                 broken_lines: Sequence[BrokenLine], older: int, casts: Sequence[CastSweep],
                 support: SupportMatrix, models: ModelChapter,
                 checkpoints: Sequence[CheckpointPage] = ()) -> str:
        """Render the first page: problems, recommended schemes, and every machine. `sweeps` and `casts` are the newest
        of each machine; `older` is the number of other sweeps."""
        of_cases = [one for one in problems if not one.link.endswith(MODELS)]
        sections = {section: found for section in Section
                    if (found := [problem for problem in problems if problem.section is section])}
        return self._render(
            "overview.html", root="", sweeps=sweeps, shown=sweeps[:SWEEPS_IN_FULL], sections=sections, older=older,
            casts=casts, support=support, models=models, checkpoints=checkpoints,
            headline=_with_models(headline(of_cases, swept=bool(sweeps)) if sweeps or casts else "", models.models),
            charts=_with_page(charts_of(sweeps[0])[:2], sweeps[0].path + "index.html") if len(sweeps) == 1 else [],
            broken_lines=broken_lines[:MOST_BROKEN_LINES], broken_count=len(broken_lines),
        )

    def sweep(self, sweep: SweepTable, problems: Sequence[ReportProblem], casts: CastSweep | None = None,
              tag: str = "", decodes: DecodeTable | None = None) -> str:
        """Render one machine and build: the matrix with filters, charts and every case. `casts` : this build's, if they
        have a page; `tag` : the build's on the timeline, if any; `decodes` : its decode speeds, if measured"""
        return self._render(
            "sweep.html", root="../../../", sweep=sweep, problems=problems, casts=casts, tag=tag,
            charts=_with_page(charts_of(sweep), ""), curves=speedup_curves(sweep),
            decodes=decodes)

    def machine(self, sweeps: Sequence[SweepHeading], casts: Sequence[tuple[CastSweep, CastChanges | None]] = (),
                older: int = 0, models: ModelChapter | None = None, spread: SpreadTable | None = None) -> str:
        """Render one machine and the builds measured on it, newest first. `older` : number of builds without a page;
        `spread` : comparison of its devices"""
        newest = sweeps[0] if sweeps else casts[0][0]
        return self._render("machine.html", root="../../", sweeps=sweeps, casts=casts, newest=newest, older=older,
                            models=models or ModelChapter(), spread=spread)

    def numerics(self, casts: CastSweep, changes: CastChanges | None, matrix: ConversionMatrix, has_sweep: bool) -> str:
        """Render the casts of one machine and build: conversions by engine."""
        return self._render("numerics.html", root="../../../", casts=casts, changes=changes, matrix=matrix,
                            has_sweep=has_sweep)

    def models(self, page: ModelPage, of_machine: ModelChapter, has_machine: bool) -> str:
        """Render the tables of models of one machine and build. `of_machine` : the chapter's part about this machine;
        `has_machine` : whether the machine has a page"""
        tables = [(table, _with_page(generation_charts.charts_of(table, number), ""))
                  for number, table in enumerate(page.tables)]
        rankings = [(table, _with_page([table.chart(number)], "")) for number, table in enumerate(page.rankings)]
        mixed = [(table, _with_page([table.chart(number)], "")) for number, table in enumerate(page.mixed)]
        return self._render("models.html", root="../../../", page=page, tables=tables, rankings=rankings, mixed=mixed,
                            has_machine=has_machine, history=bool(of_machine.histories),
                            tensors=any(one.folder == page.folder for one in of_machine.tensors))

    def model_history(self, page: MachineModels, has_machine: bool) -> str:
        """Render one machine's models from build to build."""
        return self._render("model_history.html", root="../../", page=page, has_machine=has_machine,
                            models=[(model, _with_page(model.charts(at), "")) for at, model in enumerate(page.models)])

    def tensors(self, page: TensorPage, has_machine: bool) -> str:
        """Render the operations that tensor classes support on one build."""
        return self._render("tensors.html", root="../../../", page=page, has_machine=has_machine, badges=BADGES,
                            outcomes=OperationOutcome)

    def conversion(self, casts: CastSweep, row: ConversionRow) -> str:
        """Render one conversion, its engines side by side."""
        return self._render("conversion.html", root="../../../../", casts=casts, row=row)

    def support(self, support: SupportMatrix, diffs: Sequence[BuildDiff]) -> str:
        """Render the support matrix of GPU architectures, with filters, and the miscompiled kernels."""
        return self._render("support.html", root="../", support=support, build_diffs=diffs)

    def support_row(self, support: SupportMatrix, row: SupportRow, found: Sequence[ArchitectureDetail],
                    scripts: Scripts) -> str:
        """Render one operation with one format on every architecture, build by build."""
        return self._render("support_row.html", root="../", support=support, row=row, found=found, scripts=scripts,
                            checks=CHECKS, detail=detail,
                            needs_torch=row.operation.name in OPERATIONS and OPERATIONS[row.operation.name].needs_torch)

    def support_build(self, support: SupportMatrix, diff: BuildDiff) -> str:
        """Render the gains and losses of one Triton build."""
        pages = {(row.operation.name, row.format): row.page for row in support.rows}
        return self._render("support_build.html", root="../", diff=diff, pages=pages)

    def case(self, sweep: SweepTable, row: CaseRow, record: Record) -> str:
        """Render one case in full."""
        rivals = sweep.rivals[row.case.scheme, row.case.layer]
        return self._render(
            "case.html", root="../../../", sweep=sweep, row=row, record=record, verdict=record.verdict,
            dot_plot=dot_plot_of(record),
            floor_us=floor_of(record), script=repro_script(record), rivals=sorted(rivals, key=_fastest_first),
            record_json=json.dumps(json.loads(record.to_json()), indent=1, ensure_ascii=False),
        )

    def regressions(self, summary: RegressionSummary, troubles: Sequence[str]) -> str:
        """Render changes from build to build, by state. `troubles` : messages about their records"""
        return self._render("regressions.html", root="", summary=summary, troubles=troubles[:MOST_BROKEN_LINES],
                            trouble_count=len(troubles))

    def series(self, series: SeriesPage) -> str:
        """Render one case on one machine from build to build."""
        return self._render("history.html", root=ROOT, series=series, charts=_with_page(series.charts, None))

    def builds(self, builds: Sequence[BuildPage]) -> str:
        """Render the list of builds, newest first, with counts of their changes."""
        return self._render("builds.html", root="", builds=builds[::-1])

    def build(self, build: BuildPage) -> str:
        """Render the changes of one build on all machines."""
        return self._render("build.html", root="../", build=build)

    def about(self) -> str:
        """Render the glossary."""
        return self._render("about.html", root="", schema=Record.SCHEMA)

    def checkpoint(self, page: CheckpointPage) -> str:
        """Render one examined checkpoint."""
        return render_checkpoint(page, root="../", home="../index.html")

    def _render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(**values)


def _with_models(title: str, models: Sequence[ModelPage]) -> str:
    """Return the first page's title with the number of faulty rows in models' tables, if there are any tables."""
    models = [page for page in models if page.tables]
    faulty = sum(page.ran - page.right for page in models)
    of_models = f"{faulty or 'no'} faulty {'row' if faulty == 1 else 'rows'} in models' tables"
    if not models or (title and not faulty):
        return title
    return f"{title}, {of_models}" if title else of_models.capitalize()


def _fastest_first(row: CaseRow) -> tuple:
    return SEVERITY[row.status] != SEVERITY[Status.OK], row.median_us or math.inf, row.case.implementation


def _with_page(charts: Sequence[Chart], page: str | None) -> list[dict[str, Any]]:
    """Return the charts with the page that a click on a mark opens; None if each mark has its own."""
    return [{"name": c.name, "title": c.title, "caption": c.caption, "alternative": c.alternative,
             "json": {"figure": c.figure, "page": page}} for c in charts]

"""Pages from views: the templates' environment, what they can say about a figure, and one function for each page.

Everything on a record may come from another machine. Autoescape is on for every template, JSON goes through ``tojson``,
URLs are quoted, and a policy in each page forbids scripts that are not files of the site.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fpxbench.records.kinds import Kind
from fpxbench.records.record import Flag, Record
from fpxbench.records.store import BrokenLine
from fpxbench.records.verdict import BROKEN, SEVERITY, SIGNS, Status
from fpxbench.regressions.suspect import Direction, State
from fpxbench.reports import words
from fpxbench.reports.casts.conversion_pages import Judged, Matrix, Row as ConversionRow, Since, cell_text
from fpxbench.reports.history.build_pages import BuildPage
from fpxbench.reports.history.regression_groups import STATES, Summary
from fpxbench.reports.history.series_pages import ROOT, History
from fpxbench.reports.sweep.charts import Chart, charts_of
from fpxbench.reports.sweep.dot_plot import floor_of, strip_of
from fpxbench.reports.sweep.problems import CHANGED, DISAGREES, REGRESSED, Finding
from fpxbench.reports.sweep.table import Heading, Row, Sweep
from fpxbench.reports.targets.support_build import Step
from fpxbench.reports.targets.support_row import CHECKS, OnArchitecture, Scripts
from fpxbench.reports.targets.support_table import Row as SupportRow, Support, detail
from fpxbench.reports.words import FLAG_SIGN
from fpxbench.sweep.repro_script import repro_script
from fpxbench.targets.operations import OPERATIONS

SWEEPS_IN_FULL = 3
"""Newest sweeps whose matrix the overview shows; of further ones it shows the figures only."""
MOST_CASES_LISTED = 24
FINDINGS_IN_FULL = 5
"""Of each kind, on the overview; the rest is folded away."""
MISTAKES_IN_SHORT = 3
"""Of what compiles and computes something else, on the overview."""
MOST_GROUPS_LISTED = 100
"""Of the findings in one state; each build's page has all of its own."""
MOST_BROKEN_LINES = 50
CUT_LOG_BYTES = 3500
"""From this size on a log may have lost its beginning: `fpxbench.sweep.isolation` keeps 4 kB, of which paths may since have been shortened."""
MOST_OF_A_CUT_LINE = 400
"""Characters that are given up for a log to begin with a whole line."""


class Pages:
    """Renders pages; each is a string of HTML."""

    def __init__(self) -> None:
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("fpxbench.reports"), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )
        self._templates.filters.update(
            us=microseconds, nbytes=nbytes, capacity=capacity, times=times, figure=figure, share=share, code_names=code_names, log=from_line,
            pretty=pretty, when=when, clipped=clipped, cell_text=cell_text, commits=commits,
            unquoted=words.unquoted,
        )
        self._templates.globals.update(
            words=words, signs=SIGNS, Status=Status, Kind=Kind, Flag=Flag, BROKEN=BROKEN, SEVERITY=SEVERITY, flag_sign=FLAG_SIGN,
            MOST_CASES_LISTED=MOST_CASES_LISTED, MOST_GROUPS_LISTED=MOST_GROUPS_LISTED, STATES=STATES, State=State, Direction=Direction,
            MISTAKES_IN_SHORT=MISTAKES_IN_SHORT, FINDINGS_IN_FULL=FINDINGS_IN_FULL,
        )

    def overview(self, sweeps: Sequence[Sweep], findings: Sequence[Finding], broken_lines: Sequence[BrokenLine], older: int,
                 judged: Sequence[Judged], support: Support) -> str:
        """What is wrong, then what there is; `sweeps` and `judged` are the newest of each machine, `older` counts the other sweeps."""
        shown = sweeps[:SWEEPS_IN_FULL]
        wrong = [f for f in findings if f.severity in set(map(str, BROKEN))]
        of = {severity: [f for f in findings if f.severity == severity] for severity in (REGRESSED, DISAGREES, CHANGED)}
        suspicious = [f for f in findings if f.severity not in {*of, *map(str, BROKEN)}]
        return self._render(
            "overview.html", root="", sweeps=sweeps, shown=shown, findings=findings, older=older, judged=judged, support=support,
            headline=_headline(len(wrong), len(of[REGRESSED]), len(of[DISAGREES]), len(suspicious)),
            wrong=wrong, regressed=of[REGRESSED], disagreeing=of[DISAGREES], changed=of[CHANGED], suspicious=suspicious,
            charts=_prefixed(charts_of(sweeps[0])[:2], sweeps[0].path + "index.html") if len(sweeps) == 1 else [],
            broken_lines=broken_lines[:MOST_BROKEN_LINES], broken_count=len(broken_lines),
        )

    def sweep(self, sweep: Sweep, findings: Sequence[Finding], judged: Judged | None = None, tag: str = "") -> str:
        """The matrix of one machine and build, with filters, charts and every case; `judged`: its casts, which have a page of their own;
        `tag`: its build's, which has one too, if it has a place in time."""
        return self._render(
            "sweep.html", root="../../../", sweep=sweep, findings=findings, judged=judged, tag=tag, charts=_prefixed(charts_of(sweep), ""))

    def machine(self, sweeps: Sequence[Heading], judged: Sequence[tuple[Judged, Since | None]] = (), older: int = 0) -> str:
        """One machine and the builds measured on it, newest first; `older` counts those that have no page of their own on it."""
        newest = sweeps[0] if sweeps else judged[0][0]
        return self._render("machine.html", root="../../", sweeps=sweeps, judged=judged, newest=newest, older=older)

    def numerics(self, judged: Judged, since: Since | None, matrix: Matrix, has_sweep: bool) -> str:
        """What the casts of one machine and build do: conversions by who carries them out."""
        return self._render("numerics.html", root="../../../", judged=judged, since=since, matrix=matrix, has_sweep=has_sweep)

    def conversion(self, judged: Judged, row: ConversionRow) -> str:
        """One conversion, everyone who carries it out side by side."""
        return self._render("conversion.html", root="../../../../", judged=judged, row=row)

    def support(self, support: Support, steps: Sequence[Step]) -> str:
        """Which GPU takes what, since when: the table of the matrix, with filters, and what is silently wrong."""
        return self._render("support.html", root="../", support=support, steps=steps)

    def support_row(self, support: Support, row: SupportRow, found: Sequence[OnArchitecture], scripts: Scripts) -> str:
        """One operation with one format on every architecture, build by build."""
        return self._render("support_row.html", root="../", support=support, row=row, found=found, scripts=scripts, checks=CHECKS, detail=detail,
                            needs_torch=row.operation.name in OPERATIONS and OPERATIONS[row.operation.name].needs_torch)

    def support_build(self, support: Support, step: Step) -> str:
        """What one Triton gained and lost."""
        pages = {(row.operation.name, row.format): row.page for row in support.rows}
        return self._render("support_build.html", root="../", step=step, pages=pages)

    def case(self, sweep: Sweep, row: Row, record: Record) -> str:
        """All that is known of one case."""
        rivals = [other for other in sweep.rows if other.case.scheme == row.case.scheme and other.case.layer == row.case.layer]
        return self._render(
            "case.html", root="../../../", sweep=sweep, row=row, record=record, verdict=record.verdict, strip=strip_of(record),
            floor_us=floor_of(record), script=repro_script(record), rivals=sorted(rivals, key=_fastest_first),
            record_json=json.dumps(json.loads(record.to_json()), indent=1, ensure_ascii=False),
        )

    def regressions(self, summary: Summary, troubles: Sequence[str]) -> str:
        """What changed for the worse, by state, and the rest; `troubles`: what is to be known of the records behind it."""
        return self._render("regressions.html", root="", summary=summary, troubles=troubles[:MOST_BROKEN_LINES], trouble_count=len(troubles))

    def history(self, history: History) -> str:
        """One series: a case on one machine from build to build."""
        return self._render("history.html", root=ROOT, history=history, charts=_prefixed(history.charts, None))

    def builds(self, builds: Sequence[BuildPage]) -> str:
        """Every build, newest first, and how much it changed."""
        return self._render("builds.html", root="", builds=builds[::-1])

    def build(self, build: BuildPage) -> str:
        """What one build changed, on all machines."""
        return self._render("build.html", root="../", build=build)

    def about(self) -> str:
        """The glossary."""
        return self._render("about.html", root="", schema=Record.SCHEMA)

    def _render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(**values)


def write_page(path: Path, page: str) -> None:
    """With the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def static_files() -> dict[str, bytes]:
    """The style and scripts of the site, by name."""
    return {entry.name: entry.read_bytes() for entry in files("fpxbench.reports").joinpath("static").iterdir() if entry.is_file()}


def _headline(wrong: int, regressed: int, disagreeing: int, suspicious: int) -> str:
    """``12 things are wrong, 2 depend on who computes them, 11 look slow or suspicious``."""
    parts = [f"{wrong or 'Nothing'} {'things are' if wrong > 1 else 'is'} wrong" if wrong != 1 else "One thing is wrong"]
    if regressed:
        parts.append(f"{regressed} confirmed {'regression' if regressed == 1 else 'regressions'}")
    if disagreeing:
        parts.append(f"{disagreeing} {'depends' if disagreeing == 1 else 'depend'} on who computes {'it' if disagreeing == 1 else 'them'}")
    if suspicious:
        parts.append(f"{suspicious} {'looks' if suspicious == 1 else 'look'} slow or suspicious")
    return ", ".join(parts)


def _fastest_first(row: Row) -> tuple:
    return SEVERITY[row.status] != SEVERITY[Status.OK], row.median_us or math.inf, row.case.implementation


def _prefixed(charts: Sequence[Chart], page: str | None) -> list[dict[str, Any]]:
    """Charts with the page that a click on one of their marks leads to; None if each mark names its own."""
    return [{"name": c.name, "title": c.title, "caption": c.caption, "alternative": c.alternative,
             "json": {"figure": c.figure, "page": page}} for c in charts]


# ---- figures --------------------------------------------------------------------------------------------------------

def figure(value: float | None, digits: int = 3) -> str:
    """`value` with that many significant digits, or a dash."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def microseconds(value: float | None) -> str:
    """A time in the unit that suits it."""
    if value is None:
        return "–"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if abs(value) >= size:
            return f"{figure(value / size)} {unit}"
    return f"{figure(value)} µs"


def nbytes(value: int | None) -> str:
    """Bytes in the unit that suits them, powers of ten."""
    if value is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{figure(value / size)} {unit}"
    return f"{value} B"


def capacity(value: int | None) -> str:
    """The size of a memory, in the powers of two that it is sold in."""
    if value is None:
        return "–"
    return f"{figure(value / 2**30)} GiB" if value >= 2**30 else f"{figure(value / 2**20)} MiB"


def times(value: float | None) -> str:
    """A ratio: ``2.31×``."""
    return "–" if value is None else f"{figure(value, 2 if abs(value) < 0.995 else 3)}×"


def share(value: float | None) -> str:
    """A fraction in percent."""
    if value is None:
        return "–"
    return f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"


def when(stamp: str) -> str:
    """A record's time for people; what is no time stays as it is."""
    try:
        return datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return stamp


# ---- text -----------------------------------------------------------------------------------------------------------

_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")

_KEPT = dict.fromkeys(map(ord, "\n\t"))


def printable(text: str) -> str:
    """A log without its terminal colours; other control characters as visible signs."""
    text = _ESCAPE_SEQUENCE.sub("", text).replace("\r\n", "\n")
    if text.translate(_KEPT).isprintable():     # as most are, and long ones often repeated
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd" for c in text)


def from_line(log: str) -> str:
    """`printable`, from the first line that is whole: of a long log only the end is kept, and that begins anywhere."""
    first, newline, rest = log.partition("\n")
    cut = newline and len(log.encode()) >= CUT_LOG_BYTES
    return printable(rest if cut and len(first) < MOST_OF_A_CUT_LINE else log)


def clipped(text: str, most: int = 600) -> str:
    """A sentence from a record on one line, and not longer than a page can bear."""
    line = " ".join(printable(text).split())
    return line if len(line) <= most else line[:most - 1] + "…"


_COMPARISON = re.compile(r"https://github\.com/pytorch/pytorch/compare/[0-9a-f]{7,40}\.\.\.[0-9a-f]{7,40}")


def commits(url: str) -> Markup:
    """Where the commits between two builds can be read: a link if it is one to PyTorch's own history, whoever wrote it, else text."""
    if _COMPARISON.fullmatch(url):
        return Markup('<a href="{}">{}</a>').format(url, url.rpartition("/")[2])
    return Markup("<code>{}</code>").format(clipped(url, 300))


def pretty(value: Any) -> str:
    """A value of evidence or a machine's fact: text as it is, what is nested as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, indent=1 if isinstance(value, dict) else None, ensure_ascii=False)


def code_names(sentence: str, names: Sequence[str]) -> Markup:
    """`sentence`, escaped, with these names set as code."""
    if not names:
        return escape(sentence)
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    parts = re.split(rf"(?<![\w-])({pattern})(?![\w-])", sentence)
    return Markup("").join(Markup("<code>{}</code>").format(part) if index % 2 else escape(part) for index, part in enumerate(parts))

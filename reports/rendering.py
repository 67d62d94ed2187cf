"""The templates of all pages, with their filters and globals."""

from __future__ import annotations

from functools import cache

import jinja2

from fpxbench.counted import counted
from fpxbench.records.kinds import Kind
from fpxbench.records.record import Flag
from fpxbench.records.verdict import BROKEN, SEVERITY, SIGNS, Status
from fpxbench.regressions.change_report import Direction, State
from fpxbench.reports import formatting, words
from fpxbench.reports.casts.conversion_pages import cell_text
from fpxbench.reports.history.regression_groups import STATES
from fpxbench.reports.sweep.speedup_curves import DRAWN_IN_FULL

PROBLEMS_IN_FULL = 5
"""Number of problems shown in each section of the overview; the rest is collapsed."""
MOST_CASES_LISTED = 24
MISCOMPILES_IN_SHORT = 3
"""Number of miscompiled kernels listed on the overview."""
MOST_GROUPS_LISTED = 100
"""Largest number of groups of regressions listed in one state; each build's page lists all of its own."""


@cache
def templates() -> jinja2.Environment:
    """Return the environment of all templates, which compiles each once per process."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fpxbench.reports"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )
    environment.filters.update(
        us=formatting.microseconds, nbytes=formatting.nbytes, capacity=formatting.capacity, times=formatting.times,
        number=formatting.number, share=formatting.share, code_names=formatting.code_names, log=formatting.whole_lines,
        pretty=formatting.pretty, when=formatting.when, clipped=formatting.clipped, commits=formatting.commits,
        cell_text=cell_text, counted=counted, signed=formatting.signed, unquoted=words.unquoted,
    )
    environment.globals.update(
        words=words, signs=SIGNS, Status=Status, Kind=Kind, Flag=Flag, BROKEN=BROKEN, SEVERITY=SEVERITY,
        flag_sign=words.FLAG_SIGN, MOST_CASES_LISTED=MOST_CASES_LISTED, MOST_GROUPS_LISTED=MOST_GROUPS_LISTED,
        STATES=STATES, State=State, Direction=Direction, DRAWN_IN_FULL=DRAWN_IN_FULL,
        MISCOMPILES_IN_SHORT=MISCOMPILES_IN_SHORT, PROBLEMS_IN_FULL=PROBLEMS_IN_FULL,
    )
    return environment

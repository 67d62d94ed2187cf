"""Format numbers and text for the pages; the templates use these functions as filters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from markupsafe import Markup, escape

CUT_LOG_BYTES = 3500
"""A log of this size may have lost its beginning: `fpxbench.sweep.isolation` keeps 4 kB, and its paths may have been
shortened since."""
LONGEST_CUT_LINE = 400
"""Most characters that are dropped so that a log begins with a whole line."""
EVIDENCE_DIGITS = 5


# ---- numbers --------------------------------------------------------------------------------------------------------

def number(value: float | None, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits; a dash for None."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    return f"{round(value, decimals):,.{max(0, decimals)}f}"


def microseconds(value: float | None) -> str:
    """Return a time in µs, ms or s; a dash for None."""
    if value is None:
        return "–"
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value)} µs"


def joules(value: float) -> str:
    """Return an energy in J, mJ or µJ."""
    for unit, size in (("J", 1.0), ("mJ", 1e-3)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{number(value * 1e6)} µJ"


def nbytes(value: int | None) -> str:
    """Return a size in B, kB, MB or GB (powers of ten); a dash for None."""
    if value is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size)} {unit}"
    return f"{value} B"


def capacity(value: int | None) -> str:
    """Return the size of a memory in MiB or GiB; a dash for None."""
    if value is None:
        return "–"
    return f"{number(value / 2**30)} GiB" if value >= 2**30 else f"{number(value / 2**20)} MiB"


def times(value: float | None) -> str:
    """Return a ratio: ``2.31×``; a dash for None."""
    return "–" if value is None else f"{number(value, 2 if abs(value) < 0.995 else 3)}×"


def share(value: float | None) -> str:
    """Return a fraction in percent; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"


def signed(value: float, decimals: int = 1) -> str:
    """Return `value` with its sign; a negative value that is rounded to zero becomes ``+0.0``."""
    return f"{value:+z.{decimals}f}"


def when(stamp: str) -> str:
    """Return an ISO 8601 time as ``2026-11-29 04:08 UTC``; text that is not a time is returned unchanged."""
    try:
        return datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return stamp


# ---- text -----------------------------------------------------------------------------------------------------------

_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")

_KEPT = dict.fromkeys(map(ord, "\n\t"))


def printable(text: str) -> str:
    """Return a log without terminal colours, and with other control characters made visible."""
    text = _ESCAPE_SEQUENCE.sub("", text).replace("\r\n", "\n")
    if text.translate(_KEPT).isprintable():     # most logs are
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else chr(0x2400 + ord(c)) if ord(c) < 32 else "\ufffd"
                   for c in text)


def whole_lines(log: str) -> str:
    """Return the printable log from its first whole line on, since only the end of a long log is stored."""
    first, newline, rest = log.partition("\n")
    cut = newline and len(log.encode()) >= CUT_LOG_BYTES
    return printable(rest if cut and len(first) < LONGEST_CUT_LINE else log)


def clipped(text: str, most: int = 600) -> str:
    """Return text from a record on one line, of at most `most` characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= most else line[:most - 1] + "…"


_COMPARISON = re.compile(r"https://github\.com/pytorch/pytorch/compare/[0-9a-f]{7,40}\.\.\.[0-9a-f]{7,40}")


def commits(url: str) -> Markup:
    """Return a link if `url` compares two commits of PyTorch, else the URL as text, since records may come from
    anywhere."""
    if _COMPARISON.fullmatch(url):
        return Markup('<a href="{}">{}</a>').format(url, url.rpartition("/")[2])
    return Markup("<code>{}</code>").format(clipped(url, 300))


_LONG_NUMBER = re.compile(rf"-?(?=[\d.]{{{EVIDENCE_DIGITS + 2}}})\d+\.\d+(e[+-]\d+)?")


def pretty(value: Any) -> str:
    """Return a value of a verdict's evidence with rounded numbers: text and single numbers as they are, the rest as
    JSON.

    Evidence has many numbers as text, since JSON has neither NaN nor infinity."""
    if isinstance(value, float):
        return f"{value:.{EVIDENCE_DIGITS}g}"
    value = _shortened(value)
    if isinstance(value, str):
        return value
    return json.dumps(value, indent=1 if isinstance(value, dict) else None, ensure_ascii=False)


def _shortened(value: Any) -> Any:
    """Return `value` with every float in it, also as text, rounded to `EVIDENCE_DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{EVIDENCE_DIGITS}g}")
    if isinstance(value, str):
        return f"{float(value):.{EVIDENCE_DIGITS}g}" if _LONG_NUMBER.fullmatch(value) else value
    if isinstance(value, dict):
        return {name: _shortened(part) for name, part in value.items()}
    return [_shortened(part) for part in value] if isinstance(value, list | tuple) else value


def code_names(message: str, names: Sequence[str]) -> Markup:
    """Return `message`, escaped, with `names` marked up as code."""
    if not names:
        return escape(message)
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    parts = re.split(rf"(?<![\w-])({pattern})(?![\w-])", message)
    return Markup("").join(Markup("<code>{}</code>").format(part) if index % 2 else escape(part)
                           for index, part in enumerate(parts))

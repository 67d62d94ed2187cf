"""Types of a record's fields, each bounded to meaningful values.

Records come from other machines. A line with a number far outside what can be measured (10**30 tokens, 1e308 µs) is
broken: it is reported and skipped. Text is cut to a length that a page can show.
"""

from __future__ import annotations

import math
from datetime import date, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, Field

LARGEST = 1e100
"""Largest magnitude of any number: above every ratio of two 32-bit floats, and its square is finite in float64."""
LONGEST_TIME_US = 1e12
"""Eleven days."""
LARGEST_DIMENSION = 2**31
LARGEST_INTEGER = 2**62
"""Largest integer, which SQLite, JavaScript's readers and NumPy's int64 can hold."""

_MOST_NODES, _DEEPEST, _LONGEST_TEXT = 20_000, 16, 8192


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{value} cannot be stored: JSON has no such number")
    if value is not None and abs(value) > LARGEST:
        raise ValueError(f"{value:g} is not a measurement: its magnitude is above {LARGEST:g}")
    return value


def _head(length: int) -> AfterValidator:
    return AfterValidator(lambda text: text if len(text) <= length else text[:length - 1] + "…")


def _tail(length: int) -> AfterValidator:
    return AfterValidator(lambda text: text if len(text) <= length else "…" + text[1 - length:])


def _moment(text: str) -> str:
    if not 1970 <= datetime.fromisoformat(text).year <= 2200:
        raise ValueError(f"{text!r} is not a time between 1970 and 2200")
    return text


def _day(text: str | None) -> str | None:
    if text and not 1970 <= date.fromisoformat(text).year <= 2200:
        raise ValueError(f"{text!r} is not a day between 1970 and 2200")
    return text


def _bounded(value: Any) -> Any:
    """Return `value`, JSON of any shape, with long texts cut. Raise ValueError if it is too large for a page."""
    nodes = 0

    def visit(value: Any, depth: int) -> Any:
        nonlocal nodes
        nodes += 1
        if nodes > _MOST_NODES or depth > _DEEPEST:
            raise ValueError(f"more than {_MOST_NODES} values, or deeper than {_DEEPEST} levels")
        if isinstance(value, dict):
            return {str(key)[:200]: visit(each, depth + 1) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [visit(each, depth + 1) for each in value]
        if isinstance(value, str) and len(value) > _LONGEST_TEXT:
            return value[:_LONGEST_TEXT - 1] + "…"
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise ValueError(f"an integer of {value.bit_length()} bits")
        return value

    return visit(value, 0)


Finite = Annotated[float, AfterValidator(_finite)]
Positive = Annotated[float, AfterValidator(_finite), Field(gt=0)]
Microseconds = Annotated[float, AfterValidator(_finite), Field(gt=0, lt=LONGEST_TIME_US)]
Seconds = Annotated[float, AfterValidator(_finite), Field(ge=0, lt=LONGEST_TIME_US / 1e6)]
Rate = Annotated[float, AfterValidator(_finite), Field(ge=0, le=1e12)]
"""In 1e9 bytes per second, or as a multiple."""
Count = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Integer = Annotated[int, Field(ge=-LARGEST_INTEGER, le=LARGEST_INTEGER)]
Tokens = Annotated[int, Field(ge=0, le=LARGEST_DIMENSION)]
Dimension = Annotated[int, Field(ge=1, le=LARGEST_DIMENSION)]

# Names become file names and links: a record from another machine must not inject a path or a tag through them.
NAME_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=120)]
Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]*$", max_length=120)]
"""A commit, a digest, a version; may be empty."""
Label = Annotated[str, _head(200)]
"""A device's own name, a kernel's name."""
Text = Annotated[str, _head(4000)]
Log = Annotated[str, _tail(_LONGEST_TEXT)]
Moment = Annotated[str, AfterValidator(_moment)]
"""ISO 8601."""
Day = Annotated[str, AfterValidator(_day)]
"""YYYY-MM-DD, or empty."""
Tree = Annotated[dict[str, Any], AfterValidator(_bounded)]
"""Evidence and metadata: JSON of any shape, of bounded size."""

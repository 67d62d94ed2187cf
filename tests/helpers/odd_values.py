"""JSON documents with single fields made odd: what a broken or hostile machine could have written."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 10**30, -(10**30), 2**63, 1e308, -1e308, 5e-324, 1e13, float("inf"), float("nan"),
    "", "x" * 5000, "../../etc/passwd", "<script>alert(1)</script>", "\x00\x1b[31m", "\ud800", "\u202e½", "9999-99-99",
    "0001-01-01", [], [[]], [None], [1e308] * 3, {}, {"": {}}, {"x": [{"y": 10**400}]},
)
"""Values that a field may be given."""


def paths(document: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every field of a JSON document, and of every first element of a list."""
    if at:
        yield at
    if isinstance(document, dict):
        for name, value in document.items():
            yield from paths(value, (*at, name))
    elif isinstance(document, list) and document:
        yield from paths(document[0], (*at, 0))


def with_value(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """Return a copy of `document` with another value at `path`."""
    changed = copy.deepcopy(document)
    parent = changed
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = value
    return changed


def without(document: Any, path: tuple[str | int, ...]) -> Any:
    """Return a copy of `document` without what is at `path`."""
    changed = copy.deepcopy(document)
    parent = changed
    for step in path[:-1]:
        parent = parent[step]
    del parent[path[-1]]
    return changed


def odd_ones(line: str) -> Iterator[str]:
    """Yield `line`, a JSON object, with each field in turn left out, and with each odd value."""
    document = json.loads(line)
    for path in paths(document):
        yield json.dumps(without(document, path))
        for value in ODD:
            yield json.dumps(with_value(document, path, value))

"""Extension of griffe for `make docs`: the fields of a docstring (``name : meaning``) become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"^(\w+(?:, \w+)*) : (.*)$")


class DocstringFields(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(docstring: str) -> str:
    """Return `docstring` with every paragraph of fields as a Markdown list.

    A line of such a paragraph that is no field continues the one before.
    """
    paragraphs = (paragraph.split("\n") for paragraph in docstring.split("\n\n"))
    return "\n\n".join("\n".join(map(_item, lines) if FIELD.match(lines[0]) else lines) for lines in paragraphs)


def _item(line: str) -> str:
    field = FIELD.match(line)
    if field is None:
        return "    " + line.strip()
    return f"- {', '.join(f'`{name}`' for name in field[1].split(', '))}: {field[2]}"

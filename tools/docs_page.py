"""Write tables into a page of docs, each between the two lines that name it. For the other tools here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path


def write(page: Path, tables: Mapping[str, str], script: str, *, check: bool) -> int:
    """Put each table between its lines, and return 0. With `check`, write nothing, and return 1 if the page is stale.

    Exit if the page lacks a table's lines.

    tables : name -> Markdown
    script : the tool's file, which the lines name
    """
    tool = f"tools/{Path(script).name}"
    old = new = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by {tool} -->", f"<!-- end of {name} -->"
        before, begun, rest = new.partition(begin)
        _, ended, after = rest.partition(end)
        if not begun or not ended:
            sys.exit(f"{page} needs the lines {begin!r} and {end!r}: the table goes between them")
        new = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    if not check:
        page.write_text(new, encoding="utf-8")
    elif new != old:
        print(f"{page} is stale: run python {tool}")
        return 1
    return 0

"""Write the tables of statuses, kinds and flags into docs/verdicts.md; with ``--check``, fail if they are stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fpxbench.records.kinds import Group, Kind, describe_stages
from fpxbench.records.record import Flag
from fpxbench.records.verdict import Status

PAGE = Path(__file__).resolve().parents[1] / "docs" / "verdicts.md"
BEGIN, END = "<!-- {}: written by tools/kinds_table.py -->", "<!-- end of {} -->"


def statuses() -> str:
    """Return the statuses as a table in Markdown."""
    rows = [f"| `{status}` | {status.sign} | {status.meaning} |" for status in Status]
    return "\n".join(["| status | sign | means |", "|---|---|---|", *rows])


def flags() -> str:
    """Return the flags as a table in Markdown."""
    return "\n".join(["| flag | means |", "|---|---|", *(f"| `{flag}` | {flag.seen} |" for flag in Flag)])


def kinds() -> str:
    """Return the kinds as Markdown, a table for each group that has any."""
    sections = []
    for group in Group:
        rows = [f"| `{kind}` | {kind.seen} | {describe_stages(kind.emitted_by) or 'old records only'} |"
                for kind in Kind if kind.group is group]
        if rows:
            title = group[0].upper() + group[1:]
            sections.append("\n".join([f"### {title}\n", "| kind | what is seen | found by |", "|---|---|---|", *rows]))
    return "\n\n".join(sections)


def rewritten(page: str) -> str:
    """Return `page` with each table between its two marks. Raise ValueError if it lacks them."""
    for name, table in (("statuses", statuses()), ("kinds", kinds()), ("flags", flags())):
        begin, end = BEGIN.format(name), END.format(name)
        if begin not in page or end not in page:
            raise ValueError(f"{PAGE} needs the lines {begin!r} and {end!r}: the table goes between them")
        between = f"(?<={re.escape(begin)}).*(?={re.escape(end)})"
        page = re.sub(between, lambda _, table=table: f"\n\n{table}\n\n", page, flags=re.DOTALL)
    return page


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    new = rewritten(page)
    if "--check" in sys.argv[1:]:
        if page != new:
            print(f"{PAGE} is stale: run python tools/kinds_table.py")
        return int(page != new)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

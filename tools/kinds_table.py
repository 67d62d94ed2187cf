"""Write the table of kinds (fpxbench/records/kinds.py) into docs/verdicts.md; with ``--check``, fail if it is stale."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from fpxbench.records.kinds import Group, Kind, describe_stages

PAGE = Path(__file__).resolve().parents[1] / "docs" / "verdicts.md"
BEGIN, END = "<!-- kinds: written by tools/kinds_table.py -->", "<!-- end of kinds -->"


def table() -> str:
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
    """Return `page` with the table between its two marks. Raises ValueError if it lacks them."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"{PAGE} needs the lines {BEGIN!r} and {END!r}: the table goes between them")
    between = f"(?<={re.escape(BEGIN)}).*(?={re.escape(END)})"
    return re.sub(between, lambda _: f"\n\n{table()}\n\n", page, flags=re.DOTALL)


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

"""Write the tables of statuses, kinds and flags into docs/verdicts.md; with ``--check``, fail if they are stale."""

from __future__ import annotations

import sys
from pathlib import Path

import docs_page

from fpxbench.records.kinds import Group, Kind, describe_stages
from fpxbench.records.record import Flag
from fpxbench.records.verdict import Status

PAGE = Path(__file__).resolve().parents[1] / "docs" / "verdicts.md"


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


def main() -> int:
    tables = {"statuses": statuses(), "kinds": kinds(), "flags": flags()}
    return docs_page.write(PAGE, tables, __file__, check="--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

"""The Atom feed (RFC 4287) of confirmed regressions: ``feed.xml`` beside the report."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from fpxbench.regressions.confirmation import Confirmation
from fpxbench.reports.history.issue_texts import Issue, confirmed, issues

FILE = "feed.xml"
MOST_ENTRIES = 100
_ATOM = "http://www.w3.org/2005/Atom"
_NEVER = "1970-01-01T00:00:00+00:00"
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def feed(results: Path, report: str = "") -> bytes:
    """Return the feed of the confirmed regressions under `results`, newest first; those fixed later stay. `report` is
    the URL of the report's folder; by default links are relative to the feed.

    The same records give the same bytes.
    """
    return atom(issues(confirmed(results)), report)


def atom(found: Iterable[Issue], report: str = "") -> bytes:
    """Return an Atom feed with one entry for each issue."""
    ElementTree.register_namespace("", _ATOM)
    base = report.rstrip("/") + "/" if report else ""
    entries = sorted(found, key=lambda issue: (_updated(issue), issue.id), reverse=True)[:MOST_ENTRIES]
    root = ElementTree.Element(f"{{{_ATOM}}}feed")
    _text(root, "id", "urn:fpxbench:regressions")
    _text(root, "title", "fpxbench: confirmed regressions")
    _text(root, "updated", _updated(entries[0]) if entries else _NEVER)
    _text(ElementTree.SubElement(root, f"{{{_ATOM}}}author"), "name", "fpxbench")
    _link(root, "self", base + FILE)
    _link(root, "alternate", base + "regressions.html")
    for issue in entries:
        entry = ElementTree.SubElement(root, f"{{{_ATOM}}}entry")
        _text(entry, "id", f"urn:fpxbench:regression:{issue.id}")
        _text(entry, "title", issue.title)
        _text(entry, "updated", _updated(issue))
        _link(entry, "alternate", base + "regressions.html")
        _text(entry, "content", issue.body).set("type", "text")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _updated(issue: Issue) -> str:
    return max(map(_moment, issue.confirmations)).isoformat(timespec="seconds")


def _moment(confirmation: Confirmation) -> datetime:
    moment = datetime.fromisoformat(confirmation.started_at)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)


def _text(parent: ElementTree.Element, name: str, text: str) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, f"{{{_ATOM}}}{name}")
    element.text = _NOT_XML.sub("\ufffd", text)
    return element


def _link(parent: ElementTree.Element, relation: str, target: str) -> None:
    ElementTree.SubElement(parent, f"{{{_ATOM}}}link", rel=relation, href=target)

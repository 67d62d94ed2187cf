"""A report as a reader meets it: what its pages say, load and link to."""

from __future__ import annotations

import os
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

PYTORCH_COMMITS = "https://github.com/pytorch/pytorch/compare/"
"""The one place outside a report that its pages link to."""


class Page(HTMLParser):
    """Links, loads, ids and running text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.scripts: list[dict[str, str | None]] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.handlers += [name for name in values if name.startswith("on")]
        if "id" in values:
            self.ids.add(values["id"] or "")
        if tag == "a":
            self.links.append(values["href"] or "")
        if tag == "script":
            self.scripts.append(values)
        if tag == "link":
            self.loads.append(values["href"] or "")
        if "src" in values:
            self.loads.append(values["src"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def pages_of(folder: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.html"))}


def dead_links(folder: Path) -> list[str]:
    """Return links and loads that lead nowhere: no file, or no such place in it. Filters (``#scheme=mxfp4``) are no
    places."""
    pages, dead = pages_of(folder), []
    for path, page in pages.items():
        for link in page.links + page.loads:
            if link.startswith(("data:", PYTORCH_COMMITS)):
                continue
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment) if "=" not in parts.fragment else ""
            if not target.is_file() or place and place not in pages[target].ids:
                dead.append(f"{path}: {link}")
    return dead


def unlinked_pages(folder: Path) -> list[str]:
    """Return pages that a reader who begins at ``index.html`` cannot come to."""
    pages, reached, ahead = pages_of(folder), set(), [folder / "index.html"]
    while ahead:
        path = ahead.pop()
        if path in pages and path not in reached:
            reached.add(path)
            ahead += [Path(os.path.normpath(path.parent / unquote(urlsplit(link).path))) for link in pages[path].links
                      if "://" not in link and urlsplit(link).path]
    return [str(path.relative_to(folder)) for path in pages if path not in reached]


def scripts_of_their_own(folder: Path) -> list[str]:
    """Return the pages in which text from a record could run: a script in the page itself, or a handler of an event."""
    return [
        str(path)
        for path, page in pages_of(folder).items()
        if page.handlers
        or not all(script.get("src") or script.get("type") == "application/json" for script in page.scripts)
    ]

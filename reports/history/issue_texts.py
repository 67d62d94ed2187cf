"""Write confirmed regressions as texts of issues: one for each build, implementation and kind of regression, over all
cases."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from fpxbench.records.store import Store, latest
from fpxbench.regressions.confirmation import Confirmation, ConfirmationOutcome

TEMPLATE = "templates/issue.md.j2"
_MOST_LOG_LINES = 40


@dataclass(frozen=True)
class Issue:
    """One regression as the text of an issue."""

    id: str
    """Ten hex digits that identify an open issue; they stay the same as cases and machines are added."""
    title: str
    body: str
    what: str
    """``slower``, ``crash (compiler_abort)``."""
    confirmations: tuple[Confirmation, ...]
    """Worst first."""


def confirmed(results: Path) -> list[Confirmation]:
    """Return the newest confirmations under `results` that confirm a change for the worse, worst first."""
    found, _ = Store(results, Confirmation).read_all()
    open_ones = [
        each for each in latest(found) if each.outcome is ConfirmationOutcome.CONFIRMED and each.direction == "worse"
    ]
    return sorted(
        open_ones, key=lambda each: (each.metric != "verdict", -(each.time.value if each.time else 0.0), each.case.id)
    )


def issues(confirmations: Iterable[Confirmation]) -> list[Issue]:
    """Return an issue for each group of confirmations with the same builds, implementation and outcome."""
    groups: dict[tuple[str, ...], list[Confirmation]] = {}
    for each in confirmations:
        groups.setdefault((each.good.key, each.build.key, each.case.implementation, _what(each)), []).append(each)
    return [_issue(key, group) for key, group in groups.items()]


def _issue(key: tuple[str, ...], group: list[Confirmation]) -> Issue:
    worst = group[0]
    identity = identity_of(*key)
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    title = f"{worst.case.id}{more}: {_what(worst)} since {worst.build.label} [fpx-{identity}]"
    text = importlib.resources.files("fpxbench.reports").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"code": as_code, "block": _block, "log": _log}
    body = environment.from_string(text).render(id=identity, worst=worst, confirmations=group, what=_what(worst))
    return Issue(identity, title, body, _what(worst), tuple(group))


def identity_of(good_key: str, bad_key: str, implementation: str, what: str) -> str:
    """Return the id of an implementation's regression `what` from the build `good_key` to `bad_key`."""
    return hashlib.sha256("\n".join((good_key, bad_key, implementation, what)).encode()).hexdigest()[:10]


def _what(confirmation: Confirmation) -> str:
    """Return ``slower``, ``crash (compiler_abort)``."""
    if confirmation.time is not None:
        return "slower"
    return next((name for name in confirmation.bad_counts if name != "ok"), "another verdict")


def as_code(text: object) -> str:
    """Return `text` as Markdown's inline code, so that text of a log or another machine becomes no markup, mention or
    link."""
    plain = re.sub(r"[`\s|]+", " ", str(text)).strip()
    return f"`{plain}`" if plain else ""


def _block(text: str) -> str:
    """Return `text` as a block of code, fenced by more backticks than any line has."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text.rstrip()}\n{fence}"


def _log(text: str) -> str:
    return "\n".join(text.rstrip().splitlines()[-_MOST_LOG_LINES:])

"""Inject every known fault, and put what each was named into docs/diagnosis.md: ``PYTHONPATH=.:tests/helpers python
tests/helpers/confusion_run.py RESULTS.jsonl [--mode sweep] [--every 9] [SCHEME]``, then with ``--write``.

Each fault is a line of RESULTS, so that a run can be continued.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import activation_injection
import torch
from confusion import (
    NAMED,
    PART,
    SCHEMES,
    UNCERTAIN,
    UNSEEN,
    WRONG,
    Outcome,
    outcome_of,
    outcome_of_activation,
    pairs,
    singles,
)
from injections import Injection

from fpxbench.numbers.scheme import scheme_named

PAGE = Path(__file__).parents[2] / "docs" / "diagnosis.md"
BEGIN, END = "<!-- confusion: written by tests/helpers/confusion_run.py -->", "<!-- end of confusion -->"
OUTCOMES = (NAMED, PART, UNCERTAIN, UNSEEN, WRONG)
MODES: dict[str, tuple[str, Callable[[str, tuple[Injection, ...]], Outcome]]] = {
    "inspect": ("`inspect`", outcome_of),
    "sweep": ("a sweep", lambda scheme, injected: outcome_of(scheme, injected, sweep=True)),
    "opaque": ("codes unseen", lambda scheme, injected: outcome_of(scheme, injected, opaque=True)),
    "activations": ("activations", lambda scheme, injected: outcome_of_activation(scheme, injected[0])),
    "pairs": ("two at once", outcome_of),
}


@dataclass(frozen=True)
class Row:
    """One or two faults, injected, as they are kept in a file."""

    mode: str
    scheme: str
    about: str
    kinds: list[str]
    outcome: str
    said: str
    message: str
    seconds: float


def injected_in(mode: str, scheme: str) -> Iterator[tuple[Injection, ...]]:
    if mode == "activations":
        return ((each,) for each in activation_injection.activation_injections(scheme_named(scheme)))
    return pairs(scheme) if mode == "pairs" else singles(scheme)


def about(injected: tuple[Injection, ...]) -> str:
    return " and ".join(f"{each.kind}{' when stored' if each.storing else ''} ({each.about})" for each in injected)


def row_of(mode: str, outcome: Outcome) -> Row:
    return Row(mode, outcome.scheme, about(outcome.injected), outcome.kinds, outcome.outcome, outcome.said,
               outcome.message, round(outcome.seconds, 2))


def run(file: Path, mode: str, schemes: list[str], every: int) -> None:
    """Append to `file` what one in `every` fault of each scheme is named, but for those that it has."""
    done = {(row.mode, row.scheme, row.about) for row in rows_in(file)}
    for scheme in schemes:
        for number, injected in enumerate(injected_in(mode, scheme)):
            if number % every == 0 and (mode, scheme, about(injected)) not in done:
                row = row_of(mode, MODES[mode][1](scheme, injected))
                with file.open("a") as lines:
                    lines.write(json.dumps(asdict(row)) + "\n")


def rows_in(file: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def table(rows: list[Row]) -> str:
    """Return Markdown: a row a kind, how many of its faults were named in each mode, and what became of the others."""
    modes = [mode for mode in MODES if mode != "pairs" and any(row.mode == mode for row in rows)]
    by_cell: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.mode in modes:
            by_cell[" + ".join(row.kinds), row.mode].append(row)
    lines = ["| injected | " + " | ".join(MODES[mode][0] for mode in modes) + " |", "|---|" + "---|" * len(modes)]
    for kind in sorted({kind for kind, _ in by_cell}):
        lines.append(f"| `{kind}` | " + " | ".join(_cell(by_cell[kind, mode]) for mode in modes) + " |")
    return "\n".join(lines)


def _cell(rows: list[Row]) -> str:
    if not rows:
        return ""
    others = Counter(f"{row.outcome} {row.said}" if row.outcome == WRONG else row.outcome
                     for row in rows if row.outcome != NAMED)
    named = f"{sum(row.outcome == NAMED for row in rows)} of {len(rows)}"
    return ", ".join([named, *(f"{count} {outcome}" for outcome, count in others.items())])


def totals(rows: list[Row]) -> str:
    """Return Markdown: a row a mode, how many faults were injected and what became of them."""
    lines = ["| | schemes | injected | " + " | ".join(OUTCOMES) + " | CPU seconds a fault |",
             "|---|---:|---:|" + "---:|" * (len(OUTCOMES) + 1)]
    for mode, (title, _) in MODES.items():
        of_it = [row for row in rows if row.mode == mode]
        if of_it:
            counts = Counter(row.outcome for row in of_it)
            cells = [str(counts[outcome] or "·") for outcome in OUTCOMES]
            seconds = sum(row.seconds for row in of_it) / len(of_it)
            lines.append(f"| {title} | {len({row.scheme for row in of_it})} | {len(of_it)} | {' | '.join(cells)} |"
                         f" {seconds:.2f} |")
    wrong = sum(row.outcome == WRONG for row in rows)
    return "\n".join([*lines, "", f"{len(rows)} injected, {wrong} wrong names."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("schemes", nargs="*")
    parser.add_argument("--mode", choices=list(MODES), default="inspect")
    parser.add_argument("--every", type=int, default=1, help="one in so many")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if not arguments.write:
        schemes = activation_injection.SCHEMES if arguments.mode == "activations" else SCHEMES
        run(arguments.results, arguments.mode, arguments.schemes or list(schemes), arguments.every)
        return
    rows = rows_in(arguments.results)
    written = f"{BEGIN}\n\n{totals(rows)}\n\n{table(rows)}\n\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: written, PAGE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()

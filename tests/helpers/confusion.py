"""Plant every known mistake and count what it is taken for: ``python -m tests.confusion [--pairs] [--sweep] [SCHEME ...]``.

Prints the confusion matrix, planted kind × named kind, as Markdown (docs/diagnosis.md holds the last one).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from planting import Plant, Planted, plants, read, store

from fpxbench.checking import inputs
from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import inspect_implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial

SCHEMES = (
    "e4m3fn-tensor", "e4m3fn-row", "e4m3fn-g32", "mxfp8_e4m3fn", "mxfp8_e5m2", "e4m3fnuz-row", "e5m2-row", "e5m2fnuz-row", "e3m4-row",
    "mxfp6_e3m2", "e2m3-g128", "e2m2-row", "mxfp4", "nvfp4", "int8-row",
)
SHAPE = 33, 77, 203
NAMED, UNCERTAIN, PART, UNSEEN, WRONG = "named", "cannot tell", "named as one", "no difference", "WRONG NAME"
"""What became of a plant. As one: both act as a single mistake of a kind that was named. No difference: it acts as the
definition says on every weight that it was tried on."""


class Outcome(NamedTuple):
    """One or two mistakes, planted, and what was said."""

    scheme: str
    planted: tuple[Plant, ...]
    said: str
    """The kind named, or one of the outcomes above."""
    outcome: str
    sentence: str
    seconds: float


def outcome_of(scheme: str, planted: tuple[Plant, ...], *, layout: str = "planar", opaque: bool = False, activation: str = "bf16",
               shape: tuple[int, int, int] = SHAPE, seed: int = 1, sweep: bool = False) -> Outcome:
    """Plant and inspect; with `sweep` what a sweep says, which has the case's own weight to go by."""
    reading = {key: value for plant in planted if not plant.storing for key, value in plant.how.items()}
    storing = {key: value for plant in planted if plant.storing for key, value in plant.how.items()}
    implementation = Planted(reading, storing or None, layout=layout, opaque=opaque)
    m, n, k = shape
    started = time.perf_counter()
    if sweep:
        case = Case(implementation="planted", scheme=scheme, workload="planted", m=m, n=n, k=k, activation=activation)
        verdict = diagnosed_trial(implementation, TrialRequest(case=case, seed=seed, timing_budget_s=0))
        named = verdict.evidence.get("kinds") or ([verdict.kind] if verdict.kind else [])
        evidence = verdict.evidence
    else:
        inspection = inspect_implementation(implementation, InspectRequest(
            subject="planted", scheme=scheme, n=n, k=k, m=m, activation=activation, device="cpu", seed=seed))
        verdict, named, evidence = inspection.verdict, inspection.kinds, inspection.verdict.evidence
    seconds = time.perf_counter() - started
    kinds = {str(plant.kind) for plant in planted}
    named = {str(kind) for kind in named}
    uncertain = "fitting" in evidence or "cannot tell" in verdict.summary or "no known mistake" in verdict.summary \
        or "which several mistakes would explain" in verdict.summary or named <= {"inaccurate", "gibberish"} or not named
    if verdict.status is Status.OK:
        outcome = UNSEEN
    elif uncertain:
        outcome = UNCERTAIN
    elif named == kinds:
        outcome = NAMED
    elif named < kinds:
        outcome = PART if _acts_as_one(scheme, planted, named, layout) else WRONG
    else:
        outcome = WRONG
    said = " + ".join(sorted(named)) if outcome in (NAMED, PART, WRONG) else outcome
    return Outcome(scheme, planted, said, outcome, verdict.summary, seconds)


def _acts_as_one(scheme: str, planted: tuple[Plant, ...], named: set[str], layout: str) -> bool:
    """Whether one mistake of a kind that was named gives the same weights as both: the other leaves no trace, or both make up
    another known one."""
    weights = [inputs.make_weight(Case(implementation="planted", scheme=scheme, workload=workload, m=1, n=64, k=256), seed=5)
               for workload in ("planted", "canary.codes")]

    def acted_by(made: tuple[Plant, ...]) -> list[torch.Tensor]:
        how = {key: value for plant in made for key, value in plant.how.items()}
        stored = [store(weight, scheme_named(scheme), layout, **(how if made[0].storing else {})) for weight in weights]
        return [read(one, **({} if made[0].storing else how)).nan_to_num(7e30) for one in stored]

    both = acted_by(planted)
    candidates = [plant for plant in plants(scheme_named(scheme), layout) if str(plant.kind) in named and plant.storing == planted[0].storing]
    return any(all(map(torch.equal, both, acted_by((plant,)))) for plant in candidates)


def singles(scheme: str, layout: str = "planar") -> Iterator[tuple[Plant, ...]]:
    return ((plant,) for plant in plants(scheme_named(scheme), layout))


def pairs(scheme: str, layout: str = "planar") -> Iterator[tuple[Plant, ...]]:
    return ((a, b) for a, b in combinations(plants(scheme_named(scheme), layout), 2) if a.made_with(b))


def matrix(outcomes: list[Outcome]) -> str:
    """Markdown: a row a planted kind, a column what was said."""
    counts = Counter((" + ".join(sorted({str(plant.kind) for plant in one.planted})), one.said) for one in outcomes)
    rows = sorted({row for row, _ in counts})
    last = [UNCERTAIN, UNSEEN]
    columns = sorted({column for _, column in counts} - set(last)) + last
    short = {column: str(number) for number, column in enumerate(rows, start=1)}
    head = "| planted | " + " | ".join(short.get(column, column) for column in columns) + " |"
    lines = [head, "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [str(counts[row, column] or "·") for column in columns]
        lines.append(f"| {short[row]} `{row}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pair_table(outcomes: list[Outcome]) -> str:
    """Markdown: a row a scheme, what became of its pairs."""
    columns = (NAMED, PART, UNCERTAIN, UNSEEN, WRONG)
    counts = Counter((one.scheme, one.outcome) for one in outcomes)
    lines = ["| scheme | pairs | " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) + 1)]
    for scheme in dict.fromkeys(one.scheme for one in outcomes):
        cells = [counts[scheme, column] for column in columns]
        lines.append(f"| {scheme} | {sum(cells)} | " + " | ".join(str(cell or "·") for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--pairs", action="store_true", help="two mistakes at once")
    parser.add_argument("--sweep", action="store_true", help="what a sweep says, not `fpxbench inspect`")
    parser.add_argument("--opaque", action="store_true", help="implementations whose codes cannot be seen")
    parser.add_argument("--activation", default="bf16")
    parser.add_argument("--every", type=int, default=1, help="one in so many")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    for scheme in asked.schemes:
        for number, planted in enumerate((pairs if asked.pairs else singles)(scheme)):
            if number % asked.every:
                continue
            one = outcome_of(scheme, planted, sweep=asked.sweep, opaque=asked.opaque, activation=asked.activation)
            outcomes.append(one)
            if one.outcome in (WRONG, UNSEEN, UNCERTAIN):
                about = " + ".join(f"{plant.kind}{' stored' if plant.storing else ''} ({plant.about})" for plant in planted)
                print(f"{one.outcome}: {scheme}: {about}: {one.said}: {one.sentence[:300]}", file=sys.stderr, flush=True)
        print(f"{scheme}: {len(outcomes)} so far, {sum(one.seconds for one in outcomes):.0f} s", file=sys.stderr, flush=True)
    print(pair_table(outcomes) if asked.pairs else matrix(outcomes))
    print(f"\n{len(outcomes)} planted, {sum(one.outcome == WRONG for one in outcomes)} wrong names, {sum(one.seconds for one in outcomes):.0f} s")


if __name__ == "__main__":
    main()

"""Inject every known fault and count what it is named: ``python tests/helpers/confusion.py [--pairs] [--sweep] [SCHEME
...]``.

Prints the confusion matrix, injected kind × named kind, as Markdown (docs/diagnosis.md holds the last one).
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
from fault_injection import Faulty, read, store
from injections import Injection, injections

from fpxbench.checking import inputs
from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import inspect_implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.verdict import Status
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.trial import diagnosed_trial

SCHEMES = ("e4m3fn-tensor", "e4m3fn-row", "e4m3fn-g32", "mxfp8_e4m3fn", "mxfp8_e5m2", "e4m3fnuz-row", "e5m2-row",
           "e5m2fnuz-row", "e3m4-row", "mxfp6_e3m2", "e2m3-g128", "e2m2-row", "mxfp4", "nvfp4", "int8-row",
           # Scalings whose rule is another, and lists of values.
           "mxfp4.ceil", "mxfp4.even", "mxfp4.rceil", "nvfp4.div", "nvfp4.4over6", "e2m1-nv16x16", "int4-g128.bf16",
           "nf4-g64", "bnbfp4-g64")
SHAPE = 33, 77, 203
NAMED, UNCERTAIN, PART, UNSEEN, WRONG = "named", "cannot tell", "named as one", "no difference", "WRONG NAME"
"""The outcomes of an injection. As one: both act as a single fault of a kind that was named. No difference: it acts as
the definition says on every weight that it was tried on."""

GENERAL = {"scale_misread", "scale_permuted", "scale_shared", "block_size_mistaken", "code_permuted"}
"""Kinds that state the structure of a whole map, in which two faults of that map are one."""


class Outcome(NamedTuple):
    """One or two faults, injected, and what was said."""

    scheme: str
    injected: tuple[Injection, ...]
    said: str
    """The kind named, or one of the outcomes above."""
    outcome: str
    message: str
    seconds: float


def outcome_of(
    scheme: str,
    injected: tuple[Injection, ...],
    *,
    layout: str = "planar",
    opaque: bool = False,
    activation: str = "bf16",
    shape: tuple[int, int, int] = SHAPE,
    seed: int = 1,
    sweep: bool = False,
) -> Outcome:
    """Return what `inspect` reports of an injected fault; with `sweep`, what a sweep reports from the case's own
    weight."""
    reading = {key: value for injection in injected if not injection.storing for key, value in injection.how.items()}
    storing = {key: value for injection in injected if injection.storing for key, value in injection.how.items()}
    implementation = Faulty(reading, storing or None, layout=layout, opaque=opaque)
    m, n, k = shape
    started = time.perf_counter()
    if sweep:
        case = Case(implementation="injected", scheme=scheme, workload="injected", m=m, n=n, k=k, activation=activation)
        verdict = diagnosed_trial(implementation, TrialRequest(case=case, seed=seed, timing_budget_s=0))
        named = verdict.evidence.get("kinds") or ([verdict.kind] if verdict.kind else [])
        evidence = verdict.evidence
    else:
        inspection = inspect_implementation(implementation, InspectRequest(
            subject="injected", scheme=scheme, n=n, k=k, m=m, activation=activation, device="cpu", seed=seed))
        verdict, named, evidence = inspection.verdict, inspection.kinds, inspection.verdict.evidence
    seconds = time.perf_counter() - started
    kinds = {str(injection.kind) for injection in injected}
    named = {str(kind) for kind in named}
    uncertain = "fitting" in evidence or "cannot tell" in verdict.summary or "no known fault" in verdict.summary \
        or "which several faults would explain" in verdict.summary or named <= {"inaccurate", "gibberish"} or not named
    if verdict.status is Status.OK:
        outcome = UNSEEN
    elif uncertain:
        outcome = UNCERTAIN
    elif named == kinds:
        outcome = NAMED
    elif named <= GENERAL and len(injected) > 1:
        outcome = PART
    elif named < kinds:
        outcome = PART if _acts_as_one(scheme, injected, named, layout) else WRONG
    else:
        outcome = WRONG
    said = " + ".join(sorted(named)) if outcome in (NAMED, PART, WRONG) else outcome
    return Outcome(scheme, injected, said, outcome, verdict.summary, seconds)


def _acts_as_one(scheme: str, injected: tuple[Injection, ...], named: set[str], layout: str) -> bool:
    """Return whether one fault of a kind that was named gives the same weights as both: the other leaves no trace, or
    both make up another known one."""
    weights = [
        inputs.make_weight(Case(implementation="injected", scheme=scheme, workload=workload, m=1, n=64, k=256), seed=5)
        for workload in ("injected", "canary.codes")
    ]

    def effective(made: tuple[Injection, ...]) -> list[torch.Tensor]:
        how = {key: value for injection in made for key, value in injection.how.items()}
        stored = [store(weight, scheme_named(scheme), layout, **(how if made[0].storing else {})) for weight in weights]
        return [read(one, **({} if made[0].storing else how)).nan_to_num(7e30) for one in stored]

    both = effective(injected)
    candidates = [
        injection
        for injection in injections(scheme_named(scheme), layout)
        if str(injection.kind) in named and injection.storing == injected[0].storing
    ]
    return any(all(map(torch.equal, both, effective((injection,)))) for injection in candidates)


def singles(scheme: str, layout: str = "planar") -> Iterator[tuple[Injection, ...]]:
    return ((injection,) for injection in injections(scheme_named(scheme), layout))


def pairs(scheme: str, layout: str = "planar") -> Iterator[tuple[Injection, ...]]:
    return ((a, b) for a, b in combinations(injections(scheme_named(scheme), layout), 2) if a.made_with(b))


def matrix(outcomes: list[Outcome]) -> str:
    """Return Markdown: a row per injected kind, a column per named kind."""
    counts = Counter(
        (" + ".join(sorted({str(injection.kind) for injection in one.injected})), one.said) for one in outcomes
    )
    rows = sorted({row for row, _ in counts})
    last = [UNCERTAIN, UNSEEN]
    columns = sorted({column for _, column in counts} - set(last)) + last
    short = {column: str(number) for number, column in enumerate(rows, start=1)}
    head = "| injected | " + " | ".join(short.get(column, column) for column in columns) + " |"
    lines = [head, "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [str(counts[row, column] or "·") for column in columns]
        lines.append(f"| {short[row]} `{row}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pair_table(outcomes: list[Outcome]) -> str:
    """Return Markdown: a row a scheme, what became of its pairs."""
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
    parser.add_argument("--pairs", action="store_true", help="two faults at once")
    parser.add_argument("--sweep", action="store_true", help="what a sweep says, not `fpxbench inspect`")
    parser.add_argument("--opaque", action="store_true", help="implementations whose codes cannot be seen")
    parser.add_argument("--activation", default="bf16")
    parser.add_argument("--every", type=int, default=1, help="one in so many")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = []
    for scheme in asked.schemes:
        for number, injected in enumerate((pairs if asked.pairs else singles)(scheme)):
            if number % asked.every:
                continue
            one = outcome_of(scheme, injected, sweep=asked.sweep, opaque=asked.opaque, activation=asked.activation)
            outcomes.append(one)
            if one.outcome in (WRONG, UNSEEN, UNCERTAIN):
                about = " + ".join(
                    f"{injection.kind}{' stored' if injection.storing else ''} ({injection.about})"
                    for injection in injected
                )
                print(f"{one.outcome}: {scheme}: {about}: {one.said}: {one.message[:300]}", file=sys.stderr, flush=True)
        print(f"{scheme}: {len(outcomes)} so far, {sum(one.seconds for one in outcomes):.0f} s", file=sys.stderr,
              flush=True)
    print(pair_table(outcomes) if asked.pairs else matrix(outcomes))
    print(
        f"\n{len(outcomes)} injected, {sum(one.outcome == WRONG for one in outcomes)} wrong names, "
        f"{sum(one.seconds for one in outcomes):.0f} s"
    )


if __name__ == "__main__":
    main()

"""Inject known faults, one or two at once, in weights and activations, and compare what they are named with what they
are. `confusion_run` does so for all of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from activation_injection import FaultyActivation
from fault_injection import Faulty, read, store
from injections import Injection, injections

from fpxbench.checking import inputs
from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import inspect_implementation
from fpxbench.implementation import Implementation
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

    @property
    def kinds(self) -> list[str]:
        return sorted({str(injection.kind) for injection in self.injected})


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
    return _outcome(implementation, scheme, injected, layout, activation, shape, seed, sweep)


def outcome_of_activation(scheme: str, injected: Injection, *, sweep: bool = False) -> Outcome:
    """Return what `inspect`, or a sweep, reports of a fault injected in quantizing the activation."""
    return _outcome(FaultyActivation(injected), scheme, (injected,), "bytes", "bf16", SHAPE, 1, sweep)


def _outcome(implementation: Implementation, scheme: str, injected: tuple[Injection, ...], layout: str, activation: str,
             shape: tuple[int, int, int], seed: int, sweep: bool) -> Outcome:
    m, n, k = shape
    started = time.process_time()
    if sweep:
        case = Case(implementation="injected", scheme=scheme, workload="injected", m=m, n=n, k=k, activation=activation)
        verdict = diagnosed_trial(implementation, TrialRequest(case=case, seed=seed, timing_budget_s=0))
        named = verdict.evidence.get("kinds") or ([verdict.kind] if verdict.kind else [])
        evidence = verdict.evidence
    else:
        inspection = inspect_implementation(implementation, InspectRequest(
            subject="injected", scheme=scheme, n=n, k=k, m=m, activation=activation, device="cpu", seed=seed))
        verdict, evidence = inspection.verdict, inspection.verdict.evidence
        named = inspection.kinds or ([verdict.kind] if verdict.kind else [])
    seconds = time.process_time() - started
    kinds = {str(injection.kind) for injection in injected}
    named = {str(kind) for kind in named}
    uncertain = "fitting" in evidence or "cannot tell" in verdict.summary or "no known fault" in verdict.summary \
        or "no known rule" in verdict.summary \
        or "which several faults would explain" in verdict.summary or not named \
        or (named <= {"inaccurate", "gibberish"} and named != kinds)
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

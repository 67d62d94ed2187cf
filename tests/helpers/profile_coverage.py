"""Measure which fault `smoke`, `quick` and `inspect` find and name on a CPU, one fault of each kind:
``PYTHONPATH=.:tests/helpers python tests/helpers/profile_coverage.py RESULTS.jsonl [--write] [--part 1/4]``.

Each measured fault is a line of RESULTS, so that a run can be continued; ``--write`` puts all of them into the table of
docs/diagnosis.md.
"""

from __future__ import annotations

import argparse
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from fault_injection import Faulty
from injections import Injection, injections

from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import inspect_implementation
from fpxbench.numbers.scheme import scheme_named
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.selection import PROFILES
from fpxbench.sweep.trial import diagnosed_trial
from fpxbench.workloads import CANARIES

PAGE = Path(__file__).parents[2] / "docs" / "diagnosis.md"
BEGIN, END = "<!-- profiles: written by tests/helpers/profile_coverage.py -->", "<!-- end of profiles -->"
SCHEMES = ("mxfp4", "nvfp4", "e4m3fn-row", "e4m3fnuz-row", "e5m2-row", "mxfp8_e4m3fn", "mxfp8_e5m2", "mxfp6_e3m2",
           "e3m2-g128", "int8-row")
"""Of each kind, the fault on the first of these that has it is measured: `smoke` asks the first four."""
NAMED, FOUND, MISSED, NOT_ASKED = "named", "found, not named", "not seen", "scheme not asked"


def chosen() -> list[tuple[str, Injection]]:
    """Return one fault of each kind, and its scheme."""
    first: dict[Kind, tuple[str, Injection]] = {}
    for scheme in SCHEMES:
        for injection in injections(scheme_named(scheme)):
            first.setdefault(injection.kind, (scheme, injection))
    return sorted(first.values(), key=lambda pair: str(pair[1].kind))


def layers_of(profile: str, scheme: str) -> list[tuple[str, int]]:
    """Return the canaries, with their token counts, on which a profile asks a scheme on a CPU."""
    asked = []
    for canary in CANARIES:
        for m in canary.m if canary.experts is None else ():
            layer = f"{canary.name}/m{m}"
            if any(any(fnmatchcase(scheme, glob) for glob in block.schemes)
                   and any(fnmatchcase(layer, glob) for glob in block.layers) for block in PROFILES[profile, "cpu"]):
                asked.append((canary.name, m))
    return asked


def made(injection: Injection) -> Faulty:
    return Faulty({} if injection.storing else injection.how, injection.how if injection.storing else None)


def judged(kind: Kind, verdicts: list[Verdict]) -> str:
    wrong = [verdict for verdict in verdicts if verdict.status is not Status.OK]
    if any(verdict.kind is kind or str(kind) in verdict.evidence.get("kinds", ()) for verdict in wrong):
        return NAMED
    return FOUND if wrong else MISSED if verdicts else NOT_ASKED


def measured(scheme: str, injection: Injection) -> dict[str, str]:
    """Return what each profile and `inspect` say of a fault."""
    verdicts: dict[tuple[str, int], Verdict] = {}
    found = {"kind": str(injection.kind), "scheme": scheme, "fault": injection.about}
    shapes = {canary.name: canary for canary in CANARIES}
    for profile in ("smoke", "quick"):
        layers = layers_of(profile, scheme)
        for name, m in layers:
            if (name, m) not in verdicts:
                case = Case(implementation="injected", scheme=scheme, workload=name, m=m, n=shapes[name].n,
                            k=shapes[name].k)
                verdicts[name, m] = diagnosed_trial(made(injection), TrialRequest(case=case, seed=1, timing_budget_s=0))
        found[profile] = judged(injection.kind, [verdicts[layer] for layer in layers])
    request = InspectRequest(subject="injected", scheme=scheme, n=64, k=160, m=64, device="cpu", seed=1)
    inspection = inspect_implementation(made(injection), request)
    found["inspect"] = NAMED if injection.kind in inspection.kinds else judged(injection.kind, [inspection.verdict])
    return found


def table(rows: list[dict[str, str]]) -> str:
    lines = ["| kind | fault, and its scheme | `smoke` | `quick` | `inspect` |", "|---|---|---|---|---|"]
    lines += [f"| `{row['kind']}` | {row['fault']}, {row['scheme']} | {row['smoke']} | {row['quick']} |"
              f" {row['inspect']} |"
              for row in sorted(rows, key=lambda row: row["kind"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--part", default="1/1", help="of the faults, the i-th of n parts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, arguments.part.split("/"))
    results = arguments.results
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for scheme, injection in [] if arguments.write else chosen()[part - 1::parts]:
        if all(row["kind"] != injection.kind for row in rows):
            with results.open("a") as file:
                file.write(json.dumps(measured(scheme, injection)) + "\n")
    if arguments.write:
        text = PAGE.read_text()
        written = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table(rows)}\n\n{END}", text, flags=re.DOTALL)
        PAGE.write_text(written)


if __name__ == "__main__":
    main()

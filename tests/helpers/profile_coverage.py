"""Measure which fault `smoke`, `quick` and `inspect` find and name on a CPU, one fault of each kind:
``PYTHONPATH=.:tests/helpers python tests/helpers/profile_coverage.py RESULTS.jsonl [--write] [--part 1/4]``.

Each measured fault is a line of RESULTS, so that a run can be continued; ``--write`` puts them into the table of
docs/diagnosis.md, in the place of the rows that it has of their kinds.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from kind_examples import Example, examples

from fpxbench.diagnosis.blackbox.inspection import InspectRequest
from fpxbench.diagnosis.blackbox.inspector import inspect_implementation
from fpxbench.implementation import Implementation
from fpxbench.records.case import Case
from fpxbench.records.kinds import Kind
from fpxbench.records.verdict import Status, Verdict, classify_exception
from fpxbench.sweep.messages import TrialRequest
from fpxbench.sweep.selection import PROFILES
from fpxbench.sweep.trial import diagnosed_trial
from fpxbench.workloads import CANARIES, workloads

PAGE = Path(__file__).parents[2] / "docs" / "diagnosis.md"
BEGIN, END = "<!-- profiles: written by tests/helpers/profile_coverage.py -->", "<!-- end of profiles -->"
NAMED, FOUND, MISSED, NOT_ASKED = "named", "found, not named", "not seen", "scheme not asked"
NOT_TIMED, NO_EXPERTS = "not timed", "experts not asked"
_SMALL_TIMED = 1024, 1024


def cases_of(profile: str, example: Example) -> list[Case]:
    """Return the canaries on which a profile asks an example's scheme on a CPU; where it shows only if it is timed, a
    small case that stands for the profile's timed layers, if it has any."""
    grouped = type(example.make()).grouped_matmul is not Implementation.grouped_matmul
    found = []
    for layer in workloads().values():
        asked = [m for m in layer.m if any(
            any(fnmatchcase(example.scheme, glob) for glob in block.schemes)
            and any(fnmatchcase(f"{layer.name}/m{m}", glob) for glob in block.layers)
            for block in PROFILES[profile, "cpu"])]
        if example.timed and layer not in CANARIES and asked:
            n, k = _SMALL_TIMED
            return [Case(implementation="injected", scheme=example.scheme, workload="timed", m=1, n=n, k=k)]
        if not example.timed and layer in CANARIES and (layer.experts is not None) == grouped:
            found += [layer.case("injected", example.scheme, m) for m in asked]
    return found


def judged(kind: Kind, verdicts: list[Verdict], unasked: str) -> str:
    wrong = [verdict for verdict in verdicts if verdict.status is not Status.OK]
    if any(verdict.kind is kind or str(kind) in verdict.evidence.get("kinds", ()) for verdict in wrong):
        return NAMED
    return FOUND if wrong else MISSED if verdicts else unasked


def measured(example: Example) -> dict[str, str]:
    """Return what each profile and `inspect` say of a fault."""
    found = {"kind": str(example.kind), "scheme": example.scheme, "fault": example.fault}
    if example.elsewhere:
        return found | dict.fromkeys(("smoke", "quick", "inspect"), example.elsewhere)
    grouped = type(example.make()).grouped_matmul is not Implementation.grouped_matmul
    unasked = NO_EXPERTS if grouped else NOT_TIMED if example.timed else NOT_ASKED
    verdicts: dict[str, Verdict] = {}
    for profile in ("smoke", "quick"):
        of_profile = []
        for case in cases_of(profile, example):
            if case.id not in verdicts:
                request = TrialRequest(case=case, seed=1, timing_budget_s=0.02 if example.timed else 0)
                verdicts[case.id] = verdict_on(example.make(), request)
            of_profile.append(verdicts[case.id])
            if judged(example.kind, of_profile, unasked) == NAMED:
                break       # another canary adds nothing
        found[profile] = judged(example.kind, of_profile, unasked)
    if grouped:
        return found | {"inspect": NO_EXPERTS}
    request = InspectRequest(subject="injected", scheme=example.scheme, n=64, k=160, m=64, device="cpu", seed=1)
    inspection = inspect_implementation(example.make(), request)
    found["inspect"] = NAMED if example.kind in inspection.kinds else judged(
        example.kind, [inspection.verdict], unasked)
    return found


def verdict_on(implementation: Implementation, request: TrialRequest) -> Verdict:
    """Return the verdict on a case, what it raises included; put back what it replaced."""
    linear, clock = F.linear, time.perf_counter
    try:
        return diagnosed_trial(implementation, request)
    except Exception as error:
        return classify_exception(type(error).__name__, str(error), "")
    finally:
        F.linear, time.perf_counter = linear, clock


def rows_of(page: str) -> list[dict[str, str]]:
    """Return the rows of the table on a page."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    rows = []
    for kind, fault, *found in re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \| (.*) \|$", table, re.MULTILINE):
        what, _, scheme = fault.rpartition(", ")
        rows.append({"kind": kind, "fault": what, "scheme": scheme}
                    | dict(zip(("smoke", "quick", "inspect"), found, strict=True)))
    return rows


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
    for example in [] if arguments.write else examples()[part - 1::parts]:
        if all(row["kind"] != example.kind for row in rows):
            with results.open("a") as file:
                file.write(json.dumps(measured(example)) + "\n")
    if arguments.write:
        text = PAGE.read_text()
        by_kind = {row["kind"]: row for row in [*rows_of(text), *rows]}
        written = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{table(list(by_kind.values()))}\n\n{END}", text,
                         flags=re.DOTALL)
        PAGE.write_text(written)


if __name__ == "__main__":
    main()

"""Turn a results folder in which one build was measured again and again into `fpxbench/regressions/recorded.jsonl`.

    for i in $(seq 60); do fpxbench run --cases CASES --fresh --results noise; done
    python tools/record_noise.py noise "two idle cores of an AMD EPYC" >> fpxbench/regressions/recorded.jsonl

Each of these runs is a process of its own, as a night's is. Cases without a time in every run are left out, and said to
be.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from fpxbench.records.record import Record
from fpxbench.records.store import Store


def main() -> None:
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir():
        sys.exit(
            f"usage: python {sys.argv[0]} RESULTS WHERE: a folder that `fpxbench run --fresh --results RESULTS` has "
            "written to many times; the machine, and what else ran on it, as text"
        )
    by_case: dict[tuple[str, str], list[Record]] = defaultdict(list)
    store = Store(Path(sys.argv[1]))
    for path in store.files():
        for record in store.read(path)[0]:
            by_case[record.build.torch, record.case.id].append(record)
    for (build, case), records in by_case.items():
        if not all(record.timing and record.timing.baseline_us for record in records):
            print(f"{case}: left out, as not every run has a time of it and of the dense product", file=sys.stderr)
            continue
        print(json.dumps({
            "where": sys.argv[2], "build": build, "case": case,
            "times_us": [float(f"{record.timing.median_us:.5g}") for record in records],
            "baseline_us": [float(f"{record.timing.baseline_us:.5g}") for record in records],
        }))


if __name__ == "__main__":
    main()
